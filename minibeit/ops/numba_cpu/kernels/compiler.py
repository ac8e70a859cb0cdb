"""A Python function of integers becomes the bytes of an object file with one C function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.compiler_lock import global_compiler_lock

from ..arguments import SCHED_YIELD, TICK_COUNT

# What machine code may ask of the process that loads it: these, and nothing of Python or numba.
_EXTERNAL = ("llvm.", "memcpy", "memmove", "memset", "clock_gettime", SCHED_YIELD, TICK_COUNT)


@global_compiler_lock
def compile_kernel(function: Callable[..., object], name: str, arity: int) -> bytes:
    """Machine code of `function`, which takes `arity` integers and returns nothing, under the name `name`.

    Exceptions and allocations are not for kernels: raises RuntimeError for one that would call Python or numba.
    """
    library = linked(function, name, arity)
    library.get_pointer_to_function(name)  # makes the machine code
    _, _, (code, _) = library.serialize_using_object_code()
    return code


@global_compiler_lock
def linked(function: Callable[..., object], name: str, arity: int) -> Any:
    """numba's library of that kernel, optimised, before there is machine code."""
    options = {"error_model": "numpy", "fastmath": {"contract"}, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    signature = types.void(*[types.intp] * arity)
    (compiled,) = njit(signature, **options)(function).overloads.values()
    context = compiled.target_context
    library = context.codegen().create_library(name)
    library.enable_object_caching()
    library.add_ir_module(_c_function(context, compiled, name, arity))
    library.add_linking_library(compiled.library)
    library.finalize()
    for used in library._final_module.functions:
        if used.is_declaration and not used.name.startswith(_EXTERNAL):
            raise RuntimeError(f"kernel {name} calls {used.name}, which is not there when it runs")
    return library


def _c_function(context: Any, compiled: Any, name: str, arity: int) -> ir.Module:
    """LLVM's `void name(i64, ...)`, which calls the compiled function by numba's own convention."""
    module = context.codegen()._create_empty_module(name)
    integers = [ir.IntType(64)] * arity
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), integers), name)
    builder = ir.IRBuilder(function.append_basic_block())
    callee = context.declare_function(module, compiled.fndesc)
    context.call_conv.call_function(builder, callee, types.none, [types.intp] * arity, function.args)
    builder.ret_void()
    return module
