"""Tests with the machine code of another system: `python windows_code.py PYTEST ARGUMENT...` on Linux, x86-64.

Kernels are compiled as on Windows (the format of object files that MCJIT wants there is ELF) for this CPU, and loaded
by minibeit itself.  They call, and are called, by the convention of Windows: what Python calls is a small function
around each of them, and what they call on Windows is there under the same names.
"""

from __future__ import annotations

import ctypes
import os
import sys

from cross_compile import aim
from llvmlite import binding as llvm
from llvmlite import ir

HERE, CPU = llvm.get_process_triple(), llvm.get_host_cpu_name()
I32, I64 = ir.IntType(32), ir.IntType(64)
_engines = []


def loaded(build) -> int:
    """The address of a function that `build(module)` makes, compiled for this machine."""
    module = ir.Module()
    module.triple = HERE
    name = build(module)
    machine = llvm.Target.from_triple(HERE).create_target_machine(cpu=CPU, jit=True)
    _engines.append(llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine))
    _engines[-1].finalize_object()
    return _engines[-1].get_function_address(name)


def around(address: int, arity: int) -> int:
    """A function of this system's convention that calls one of Windows' convention."""

    def build(module):
        kind = ir.FunctionType(ir.VoidType(), [I64] * arity)
        function = ir.Function(module, kind, "around")
        builder = ir.IRBuilder(function.append_basic_block())
        builder.call(builder.inttoptr(I64(address), kind.as_pointer()), function.args, cconv="win64cc")
        builder.ret_void()
        return "around"

    return loaded(build)


def of_windows(result: ir.Type, body) -> int:
    """A function without arguments of Windows' convention."""

    def build(module):
        function = ir.Function(module, ir.FunctionType(result, []), "of_windows")
        function.calling_convention = "win64cc"
        builder = ir.IRBuilder(function.append_basic_block())
        builder.ret(body(module, builder))
        return "of_windows"

    return loaded(build)


def give_up_turn(module, builder):
    """What SwitchToThread does."""
    return builder.call(ir.Function(module, ir.FunctionType(I32, []), "sched_yield"), [])


def milliseconds(module, builder):
    """What GetTickCount64 tells."""
    clock = ir.Function(module, ir.FunctionType(I32, [I32, I64.as_pointer()]), "clock_gettime")
    place = builder.alloca(I64, 2)
    builder.call(clock, [I32(1), place])
    nanoseconds = builder.load(builder.gep(place, [I64(1)]))
    return builder.add(builder.mul(builder.load(place), I64(1000)), builder.sdiv(nanoseconds, I64(1_000_000)))


def use() -> None:
    """From here on minibeit compiles, loads and runs kernels of Windows."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    functions = {"sched_yield": of_windows(I32, give_up_turn), "GetTickCount64": of_windows(I64, milliseconds)}
    for name, address in functions.items():  # the first one has found this system's function by now
        llvm.add_symbol(name, address)
    aim("x86_64-pc-windows-msvc-elf", CPU)
    from minibeit.ops.numba_cpu import machine_code
    from minibeit.ops.numba_cpu.kernels import compiler
    from minibeit.ops.numba_cpu.target import target_machine

    def compile_kernel(function, name, arity):
        return target_machine().emit_object(compiler.linked(function, name, arity)._final_module)

    def load(kernel):
        with machine_code._lock:
            if not kernel._address:
                address = found(kernel)
                kind = ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * kernel.arity)
                kernel._call = kind(around(address, kernel.arity))
        return kernel._address

    found, machine_code.Kernel.load, compiler.compile_kernel = machine_code.Kernel.load, load, compile_kernel


if __name__ == "__main__":
    os.environ["NUMBA_CACHE_DIR"] = os.environ["MINIBEIT_TEST_FOLDER"]
    use()
    import pytest

    sys.exit(pytest.main(sys.argv[1:]))
