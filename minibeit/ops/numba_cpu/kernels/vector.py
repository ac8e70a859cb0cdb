"""Vectors of LANES floats, raw memory and atomics as numba values: what the kernels are written in.

numba has no vector type, and a loop with an exponential or a maximum in it is vectorised only under promises
(`nnan`) that a softmax must not make.  Here a vector is a value, each operation is one LLVM instruction, and the result
is the same on every run.  Addresses are plain integers (`intp`), in bytes.
"""

from __future__ import annotations

import operator
from collections import namedtuple
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.datamodel import models
from numba.core.extending import lower_builtin, type_callable
from numba.extending import intrinsic, register_model

from ..arguments import Arguments
from ..target import LANES, target

if config.CPU_NAME and config.CPU_FEATURES is None:
    # Every kernel's module imports this one first.  By the first function that numba sees it would keep the host's
    # features beside the forced name: an AVX-512 haswell.
    config.CPU_FEATURES = target()[2]

I1, I32, I64, F32 = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.FloatType()
FLOATS, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


vector = _VectorType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, FLOATS)


def pointer(builder: ir.IRBuilder, address: ir.Value, type_: ir.Type) -> ir.Value:
    """An integer address as a pointer."""
    return builder.inttoptr(address, ir.PointerType(type_))


def splat_ir(builder: ir.IRBuilder, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
    """A vector with the same scalar in every lane."""
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def constant(value: float) -> ir.Constant:
    """The same float32 in every lane; a value beyond float32's precision is rounded here."""
    return ir.Constant(FLOATS, [float(np.float32(value))] * LANES)


def call_ir(builder: ir.IRBuilder, name: str, *arguments: ir.Value) -> ir.Value:
    """Calls the LLVM intrinsic `llvm.<name>.vNf32`; result and arguments are float vectors."""
    kind = ir.FunctionType(arguments[0].type, [a.type for a in arguments])
    suffix = f"v{arguments[0].type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.{suffix}"), arguments)


def fma_ir(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c, fused where the target has the instruction (a library call per lane elsewhere would be useless)."""
    return call_ir(builder, "fmuladd", a, b, c)


def polynomial_ir(builder: ir.IRBuilder, x: ir.Value, coefficients: tuple[float, ...]) -> ir.Value:
    """Horner's rule, highest power first."""
    total = constant(coefficients[0])
    for coefficient in coefficients[1:]:
        total = fma_ir(builder, total, x, constant(coefficient))
    return total


def loop_ir(builder: ir.IRBuilder, name: str, count: ir.Value, values: Any, body: Any) -> list[ir.Value]:
    """`values` after `count` times values = body(values), count >= 0; leaves the builder behind the loop."""
    zero = ir.Constant(I64, 0)
    entry, loop, after = builder.block, builder.append_basic_block(name), builder.append_basic_block(f"after_{name}")
    builder.cbranch(builder.icmp_signed(">", count, zero), loop, after)
    builder.position_at_end(loop)
    left = builder.phi(I64)
    left.add_incoming(count, entry)
    carried = [builder.phi(value.type) for value in values]
    results = body(carried)
    following, end = builder.sub(left, ir.Constant(I64, 1)), builder.block
    left.add_incoming(following, end)
    builder.cbranch(builder.icmp_signed(">", following, zero), loop, after)
    for phi, value, result in zip(carried, values, results):
        phi.add_incoming(value, entry)
        phi.add_incoming(result, end)
    builder.position_at_end(after)
    finals = [builder.phi(value.type) for value in values]
    for phi, value, result in zip(finals, values, results):
        phi.add_incoming(value, entry)
        phi.add_incoming(result, end)
    return finals


def vector_intrinsic(argument_types, return_type, emit):
    """An intrinsic of fixed types from `emit(builder, *arguments)`."""

    def codegen(context, builder, signature, arguments):
        result = emit(builder, *arguments)
        return context.get_dummy_value() if result is None else result

    parameters = ", ".join(f"a{i}" for i in range(len(argument_types)))
    scope = {"signature": return_type(*argument_types), "codegen": codegen}
    exec(f"def template(typingctx, {parameters}):\n    return signature, codegen\n", scope)  # numba reads the arity
    return intrinsic(scope["template"])


def _emit_load(builder, address):
    value = builder.load(pointer(builder, address, FLOATS))
    value.align = 4
    return value


def _emit_store(builder, address, value):
    builder.store(value, pointer(builder, address, FLOATS)).align = 4


def _emit_store_f32(builder, address, value):
    builder.store(value, pointer(builder, address, F32)).align = 4


def _emit_load_f32(builder, address):
    value = builder.load(pointer(builder, address, F32))
    value.align = 4
    return value


def _emit_load_int(builder, address):
    return builder.load(pointer(builder, address, I64))


@intrinsic(prefer_literal=True)
def arguments(typingctx, block, count):
    """The first `count` (a literal) int64 numbers at the address `block`, as a tuple."""
    if not isinstance(count, types.IntegerLiteral):
        return None  # numba asks again with the literal
    number = count.literal_value
    signature = types.UniTuple(types.intp, number)(types.intp, count)

    def codegen(context, builder, signature, values):
        addresses = [builder.add(values[0], ir.Constant(I64, 8 * i)) for i in range(number)]
        return cgutils.pack_array(builder, [_emit_load_int(builder, address) for address in addresses])

    return signature, codegen


def reader(arguments: Arguments) -> Any:
    """An intrinsic (args, thread) -> the arguments of a kernel, as a named tuple.

    At `args` lie the scratch memory of all threads, the bytes of it for each, and what `arguments` names.
    """
    kind = types.NamedUniTuple(types.intp, len(arguments.names), namedtuple("arguments", arguments.names))

    def emit(builder, args, thread):
        places = [builder.add(args, ir.Constant(I64, 8 * i)) for i in range(len(arguments.names) + 1)]
        scratch, size, *others = (_emit_load_int(builder, place) for place in places)
        return cgutils.pack_array(builder, [builder.add(scratch, builder.mul(thread, size)), *others])

    read = vector_intrinsic((types.intp, types.intp), kind, emit)
    read.arguments = arguments
    return read


def _reduce(builder, value, combine):
    """Folds the upper half on the lower half until one lane is left: the same order on every target of this width."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        low = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        high = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes, 2 * lanes)))
        value = combine(builder.shuffle_vector(value, value, low), builder.shuffle_vector(value, value, high))
    return builder.extract_element(value, ir.Constant(I32, 0))


def _maximum(builder, a, b):
    """The larger one; where either is NaN, b."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


# exp: 2^n * e^r with n = round(x / ln 2), |r| <= 0.35; adding 1.5 * 2^23 rounds and leaves n in the low bits, which
# also keeps NaN harmless (a float-to-integer conversion of NaN would be undefined).  Below -87.3 the result stays at
# e^-87.3 = 1e-38, nothing beside the largest term of a softmax, which is 1.
_MAGIC = 12582912.0
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP = (
    1.395048097601983e-3, 8.368883566404084e-3, 4.166620595410952e-2, 1.6666518887707296e-1, 5.0000000951382e-1,
    1.0, 1.0,
)  # fmt: skip


def emit_exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^max(x, -87.3) for x <= 88, within 1 ulp; NaN stays NaN."""
    x = _maximum(builder, constant(-87.33), x)
    shifted = fma_ir(builder, x, constant(1.4426950408889634), constant(_MAGIC))
    n = builder.fsub(shifted, constant(_MAGIC))
    r = fma_ir(builder, n, constant(-_LN2_HIGH), x)
    r = fma_ir(builder, n, constant(-_LN2_LOW), r)
    exponent = builder.add(builder.bitcast(shifted, INTS), ir.Constant(INTS, [127] * LANES))
    scale = builder.bitcast(builder.shl(exponent, ir.Constant(INTS, [23] * LANES)), FLOATS)
    return builder.fmul(polynomial_ir(builder, r, _EXP), scale)


# erf(y) = y * P(y^2 / 8 - 1) for |y| < 4, a minimax fit made for this file; beyond, it is 1 in float32.
_ERF = (
    4.935527884052096e-4, -1.3212791606182217e-3, 1.0023255902103833e-3, -1.2573148686036357e-3, 4.992459795905926e-3,
    -9.834677924268611e-3, 1.4367625895910544e-2, -2.18396775745371e-2, 3.301823194492825e-2, -4.594789325141042e-2,
    5.990236083121862e-2, -7.470021213286838e-2, 9.020677536243339e-2, -1.0771230444288979e-1, 1.3167522710582535e-1,
    -1.7657619703585536e-1, 3.5353099479540506e-1,
)  # fmt: skip


def _erf_of_root_half(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """erf(x / sqrt 2): absolute error below 1.7e-7, that is 1.5 ulp of 1."""
    y = builder.fmul(x, constant(0.7071067811865476))
    u = fma_ir(builder, builder.fmul(y, y), constant(0.125), constant(-1.0))
    erf = builder.fmul(y, polynomial_ir(builder, u, _ERF))
    erf = builder.select(builder.fcmp_ordered(">=", y, constant(4.0)), constant(1.0), erf)
    return builder.select(builder.fcmp_ordered("<=", y, constant(-4.0)), constant(-1.0), erf)


def emit_gelu(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x/2 * (1 + erf(x / sqrt 2))."""
    half = builder.fmul(x, constant(0.5))
    return fma_ir(builder, half, _erf_of_root_half(builder, x), half)


def emit_gelu_derivative(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """(1 + erf(x / sqrt 2)) / 2 + x exp(-x^2 / 2) / sqrt(2 pi)."""
    density = emit_exp(builder, builder.fmul(builder.fmul(x, x), constant(-0.5)))
    slope = builder.fmul(builder.fmul(x, constant(0.3989422804014327)), density)
    return builder.fadd(fma_ir(builder, _erf_of_root_half(builder, x), constant(0.5), constant(0.5)), slope)


def _emit_transpose(builder, source, row_bytes, target, target_bytes, factors):
    """A block of LANES x LANES elements, transposed and scaled by `factors`.

    A stage of `step` swaps the lanes k + step of row i with the lanes k of row i + step, for i and k without that bit.
    """
    addresses = [builder.add(source, builder.mul(row_bytes, ir.Constant(I64, i))) for i in range(LANES)]
    rows = [_emit_load(builder, address) for address in addresses]
    step = 1
    while step < LANES:
        low = [k if k & step == 0 else LANES + k - step for k in range(LANES)]
        high = [k + step if k & step == 0 else LANES + k for k in range(LANES)]
        masks = [ir.Constant(ir.VectorType(I32, LANES), mask) for mask in (low, high)]
        for i in range(LANES):
            if i & step == 0:
                pair = rows[i], rows[i + step]
                rows[i], rows[i + step] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        step *= 2
    for i, row in enumerate(rows):
        address = builder.add(target, builder.mul(target_bytes, ir.Constant(I64, i)))
        _emit_store(builder, address, builder.fmul(row, factors))


def _emit_first_lanes(builder, value, count, others):
    """`value` in the first `count` lanes, `others` in the rest."""
    lanes = ir.Constant(INTS, list(range(LANES)))
    inside = builder.icmp_signed("<", lanes, splat_ir(builder, builder.trunc(count, I32)))
    return builder.select(inside, value, others)


def _emit_where_positive(builder, test, value):
    """`value` where `test` > 0, else 0."""
    zeros = ir.Constant(FLOATS, None)
    return builder.select(builder.fcmp_ordered(">", test, zeros), value, zeros)


def _emit_sqrt(builder, x):
    kind = ir.FunctionType(F32, [F32])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.sqrt.f32"), [x])


def _order(name):
    return lambda builder, address: builder.load_atomic(pointer(builder, address, I64), name, 8)


load = vector_intrinsic((types.intp,), vector, _emit_load)
store = vector_intrinsic((types.intp, vector), types.void, _emit_store)
load_int = vector_intrinsic((types.intp,), types.intp, _emit_load_int)
load_float = vector_intrinsic((types.intp,), types.float32, _emit_load_f32)
store_float = vector_intrinsic((types.intp, types.float32), types.void, _emit_store_f32)
transpose = vector_intrinsic((*(types.intp,) * 4, vector), types.void, _emit_transpose)
first_lanes = vector_intrinsic((vector, types.intp, vector), vector, _emit_first_lanes)
where_positive = vector_intrinsic((vector, vector), vector, _emit_where_positive)
sqrt = vector_intrinsic((types.float32,), types.float32, _emit_sqrt)
root = vector_intrinsic((vector,), vector, lambda builder, v: call_ir(builder, "sqrt", v))
divide = vector_intrinsic((vector, vector), vector, lambda builder, a, b: builder.fdiv(a, b))
splat = vector_intrinsic((types.float32,), vector, lambda builder, x: splat_ir(builder, x))
fma = vector_intrinsic((vector, vector, vector), vector, fma_ir)
maximum = vector_intrinsic((vector, vector), vector, _maximum)
exp = vector_intrinsic((vector,), vector, emit_exp)
gelu = vector_intrinsic((vector,), vector, emit_gelu)
gelu_derivative = vector_intrinsic((vector,), vector, emit_gelu_derivative)
sum_lanes = vector_intrinsic((vector,), types.float32, lambda builder, v: _reduce(builder, v, builder.fadd))
max_lanes = vector_intrinsic(
    (vector,), types.float32, lambda builder, v: _reduce(builder, v, lambda a, b: _maximum(builder, a, b))
)


def _operator(function, emit):
    """Makes `a <operator> b` of two vectors one instruction."""

    @type_callable(function)
    def typed(context):
        return lambda a, b: vector if a is vector and b is vector else None

    @lower_builtin(function, vector, vector)
    def lowered(context, builder, signature, arguments):
        return getattr(builder, emit)(*arguments)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")


# Atomics and calls by address, for the thread pool.

_TASK = ir.FunctionType(ir.VoidType(), [I64, I64, I64])


def _emit_call(builder, function, arguments, task, thread):
    builder.call(builder.inttoptr(function, ir.PointerType(_TASK)), [arguments, task, thread])


load_atomic = vector_intrinsic((types.intp,), types.intp, _order("seq_cst"))
store_atomic = vector_intrinsic(
    (types.intp, types.intp),
    types.void,
    lambda builder, address, value: builder.store_atomic(value, pointer(builder, address, I64), "seq_cst", 8) and None,
)
add_atomic = vector_intrinsic(
    (types.intp, types.intp),
    types.intp,
    lambda builder, address, value: builder.atomic_rmw("add", pointer(builder, address, I64), value, "seq_cst"),
)
call_task = vector_intrinsic((types.intp,) * 4, types.void, _emit_call)
