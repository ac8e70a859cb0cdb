"""What the threads of the pool ask of system and CPU: the clock, a pause, another thread's turn, the rounding mode."""

from __future__ import annotations

import time

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ..arguments import SCHED_YIELD, TICK_COUNT
from ..target import target
from .vector import I32, I64, pointer, vector_intrinsic

_X86 = target()[0].startswith(("x86_64", "amd64", "i386", "i686"))
_ARM = target()[0].startswith(("aarch64", "arm64"))
_WINDOWS = "windows" in target()[0]
# Round to nearest, no trap, and no flush to zero: what a thread begins with.  MXCSR of x86, FPCR of ARM.
DEFAULT_FLOAT_MODE = 0x1F80 if _X86 else 0


def _declare(builder, name, result, *arguments):
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _emit_pause(builder):
    if _X86:
        builder.call(_declare(builder, "llvm.x86.sse2.pause", ir.VoidType()), [])
    elif _ARM:  # its yield does nothing on most CPUs; a barrier of instructions takes some 20 ns, as x86's pause does
        builder.call(_declare(builder, "llvm.aarch64.isb", ir.VoidType(), I32), [ir.Constant(I32, 15)])


def _emit_yield(builder):
    builder.call(_declare(builder, SCHED_YIELD, I32), [])


def _emit_clock(builder):
    """Nanoseconds of a clock that only goes forward; on Windows in steps of about 16 ms."""
    if _WINDOWS:
        return builder.mul(builder.call(_declare(builder, TICK_COUNT, I64), []), ir.Constant(I64, 1_000_000))
    place = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
    address = builder.ptrtoint(place, I64)
    function = _declare(builder, "clock_gettime", I32, I32, I64)
    builder.call(function, [ir.Constant(I32, time.CLOCK_MONOTONIC), address])
    seconds = builder.load(pointer(builder, address, I64))
    nanoseconds = builder.load(pointer(builder, builder.add(address, ir.Constant(I64, 8)), I64))
    return builder.add(builder.mul(seconds, ir.Constant(I64, 1_000_000_000)), nanoseconds)


def _emit_float_mode(builder):
    if _ARM:
        return builder.call(_declare(builder, "llvm.aarch64.get.fpcr", I64), [])
    if not _X86:
        return ir.Constant(I64, 0)
    place = cgutils.alloca_once(builder, I32)
    byte = ir.PointerType(ir.IntType(8))
    builder.call(_declare(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), byte), [builder.bitcast(place, byte)])
    return builder.zext(builder.load(place), I64)


def _emit_set_float_mode(builder, mode):
    if _ARM:
        builder.call(_declare(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), I64), [mode])
    elif _X86:
        place = cgutils.alloca_once(builder, I32)
        byte = ir.PointerType(ir.IntType(8))
        builder.store(builder.trunc(mode, I32), place)
        builder.call(_declare(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), byte), [builder.bitcast(place, byte)])


pause = vector_intrinsic((), types.void, _emit_pause)
sched_yield = vector_intrinsic((), types.void, _emit_yield)
clock = vector_intrinsic((), types.intp, _emit_clock)
float_mode = vector_intrinsic((), types.intp, _emit_float_mode)
set_float_mode = vector_intrinsic((types.intp,), types.void, _emit_set_float_mode)
