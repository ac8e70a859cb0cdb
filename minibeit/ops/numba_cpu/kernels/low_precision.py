"""Products of low precision: rows rounded to levels or to bfloat16, and blocks of x W^T."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from ..arguments import PLAIN
from ..low_arguments import (
    BFLOAT16_PRODUCT,
    COLUMNS,
    HEADER_BYTES,
    INT8_PRODUCT,
    LEVEL_ROWS,
    QUANTISE,
    ROUND,
    bfloat16_route,
    int8_route,
)
from ..target import LANES, MR, NR, TILE
from .gemm import finish_last_tile, finish_tile
from .micro import VECTORS, Arithmetic, tile_product
from .vector import (
    F32,
    FLOATS,
    I32,
    INTS,
    constant,
    fma,
    fma_ir,
    load,
    load_float,
    max_lanes,
    maximum,
    pointer,
    reader,
    splat,
    splat_ir,
    store,
    store_float,
    sum_lanes,
    vector,
    vector_intrinsic,
)  # fmt: skip

_ROUTE, _ROUTE16 = int8_route(), bfloat16_route()
_LEVEL_BYTES, _HALF_BYTES = _ROUTE.row_bytes, _ROUTE16.row_bytes
_MIDDLE = 128 if _ROUTE.name == "sdot" else 0  # what is taken from every level, as sdot's are signed
_ZERO, _LEVELS, _SMALLEST = np.float32(0), np.float32(255), np.float32(1e-30)
_MAGIC, _MAGIC_BITS = 12582912.0, 0x4B400000  # adding 1.5 * 2^23 rounds to even and leaves the integer in the low bits
_I8, _I16 = ir.IntType(8), ir.IntType(16)
_read_quantise, _read_round = reader(QUANTISE), reader(ROUND)
_read_int8, _read_bfloat16 = reader(INT8_PRODUCT), reader(BFLOAT16_PRODUCT)


def _integers(value: int) -> ir.Constant:
    return ir.Constant(INTS, [value] * LANES)


def _load_ir(builder, address, type_):
    value = builder.load(pointer(builder, address, type_))
    value.align = 4
    return value


# One step of a sum --------------------------------------------------------------------------------------------------


def _splat_bytes(builder, address):
    """Four bytes of a row, LANES times."""
    return splat_ir(builder, _load_ir(builder, address, I32))


def _call(builder, name, sums, *others):
    kind = ir.FunctionType(sums.type, [sums.type, *(other.type for other in others)])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [sums, *others])


def _emit_vpdpbusd(builder, spread, columns, sums):
    return _call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * LANES}", sums, spread, columns)


def _emit_sdot(builder, spread, columns, sums):
    levels, weights = (builder.bitcast(v, ir.VectorType(_I8, 4 * LANES)) for v in (spread, columns))
    return _call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", sums, levels, weights)


def _emit_pairs(builder, spread, columns, sums):
    """sums + the sums of pairs of products of 16-bit integers; LLVM knows the form."""
    wide = ir.VectorType(I32, 2 * LANES)
    pairs = builder.bitcast(spread, ir.VectorType(_I16, 2 * LANES))
    products = builder.mul(builder.sext(pairs, wide), builder.sext(columns, wide))
    even, odd = (
        builder.shuffle_vector(
            products, products, ir.Constant(ir.VectorType(I32, LANES), list(range(first, 2 * LANES, 2)))
        )
        for first in (0, 1)
    )
    return builder.add(sums, builder.add(even, odd))


def _widened_bytes(builder, address):
    return builder.sext(_load_ir(builder, address, ir.VectorType(_I8, 2 * LANES)), ir.VectorType(_I16, 2 * LANES))


def _emit_vdpbf16ps(builder, spread, columns, sums):
    return _call(builder, f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}", sums, spread, columns)


def _widened_bfloat16(builder, address):
    wide = builder.zext(_load_ir(builder, address, ir.VectorType(_I16, LANES)), INTS)
    return builder.bitcast(builder.shl(wide, _integers(16)), FLOATS)


def _ints(builder, address):
    return _load_ir(builder, address, INTS)


def _add(builder, a, b):
    return builder.add(a, b)


def _fadd(builder, a, b):
    return builder.fadd(a, b)


_INT8 = {
    "vpdpbusd": Arithmetic(INTS, 4, _ints, _splat_bytes, _emit_vpdpbusd, _add),
    "sdot": Arithmetic(INTS, 4, _ints, _splat_bytes, _emit_sdot, _add),
    "pairs": Arithmetic(INTS, 2, _widened_bytes, _splat_bytes, _emit_pairs, _add),
}[_ROUTE.name]
_BFLOAT16 = {
    "vdpbf16ps": Arithmetic(FLOATS, 4, _ints, _splat_bytes, _emit_vdpbf16ps, _fadd),
    "widened": Arithmetic(
        FLOATS, 2, _widened_bfloat16, lambda builder, a: splat_ir(builder, _load_ir(builder, a, F32)), fma_ir, _fadd
    ),
}[_ROUTE16.name]

_ROW8, _ROW16 = (NR * kind.column_bytes for kind in (_INT8, _BFLOAT16))  # bytes of a panel for a step
_multiply_int8 = tile_product(VECTORS, _INT8)
multiply_bfloat16 = tile_product(VECTORS, _BFLOAT16)
multiply_narrow_bfloat16 = tile_product(1, _BFLOAT16)


# Rows ---------------------------------------------------------------------------------------------------------------


def _apart(builder, value):
    """The same float or vector, a product that LLVM must round by itself: it may not become part of a multiply-add."""
    register = {"avx512": "v", "neon": "w"}.get(TILE.name, "x")
    return builder.call(ir.InlineAsm(ir.FunctionType(value.type, [value.type]), "", f"={register},0"), [value])


def _emit_rounded(builder, value):
    """The integer nearest to a float32 of at most 2^22, the even one of two."""
    shifted = builder.fadd(_apart(builder, value), ir.Constant(F32, _MAGIC))
    whole = builder.sub(builder.bitcast(shifted, I32), ir.Constant(I32, _MAGIC_BITS))
    return builder.sext(whole, ir.IntType(64))


def _emit_store_int(builder, address, value):
    builder.store(builder.trunc(value, I32), pointer(builder, address, I32)).align = 4


def _emit_load_int32(builder, address):
    return builder.sext(_load_ir(builder, address, I32), ir.IntType(64))


def _emit_store_levels(builder, address, scaled, zero):
    """Levels clip(rint(scaled) + zero, 0, 255) in the route's form."""
    shifted = builder.bitcast(builder.fadd(_apart(builder, scaled), constant(_MAGIC)), INTS)
    offset = builder.sub(builder.trunc(zero, I32), ir.Constant(I32, _MAGIC_BITS))
    level = builder.add(shifted, splat_ir(builder, offset))
    for bound, sign in ((0, "<"), (255, ">")):
        level = builder.select(builder.icmp_signed(sign, level, _integers(bound)), _integers(bound), level)
    level = builder.sub(level, _integers(_MIDDLE))
    narrow = ir.VectorType(ir.IntType(8 * _LEVEL_BYTES), LANES)
    builder.store(builder.trunc(level, narrow), pointer(builder, address, narrow)).align = 1


def _bfloat16_bits(builder, value):
    """The nearest bfloat16 of every lane, even ones of two, in the upper 16 bits; NaN stays NaN."""
    bits = builder.bitcast(value, INTS)
    odd = builder.and_(builder.lshr(bits, _integers(16)), _integers(1))
    bits = builder.add(builder.add(bits, odd), _integers(0x7FFF))
    return builder.select(builder.fcmp_unordered("uno", value, value), _integers(0x7FC00000), bits)


def _bfloat16_halves(builder, value):
    """The same as 16-bit integers; by the CPU's own conversion, which takes denormal numbers for 0, if there is one."""
    narrow = ir.VectorType(_I16, LANES)
    if _ROUTE16.name == "vdpbf16ps":
        kind = ir.FunctionType(narrow, [FLOATS])
        name = f"llvm.x86.avx512bf16.cvtneps2bf16.{32 * LANES}"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [value])
    return builder.trunc(builder.lshr(_bfloat16_bits(builder, value), _integers(16)), narrow)


def _emit_store_bfloat16(builder, address, value):
    """LANES elements of 16 bits."""
    halves = _bfloat16_halves(builder, value)
    builder.store(halves, pointer(builder, address, halves.type)).align = 2


def _emit_store_row(builder, address, value):
    """LANES elements in the route's form."""
    if _HALF_BYTES == 2:
        _emit_store_bfloat16(builder, address, value)
        return
    bits = builder.and_(_bfloat16_bits(builder, value), _integers(-65536))
    builder.store(bits, pointer(builder, address, INTS)).align = 4


def _emit_store_pairs(builder, address, first, second):
    """LANES pairs of 16 bits: an element of the one, an element of the other."""
    low, high = (builder.zext(_bfloat16_halves(builder, value), INTS) for value in (first, second))
    pairs = builder.or_(low, builder.shl(high, _integers(16)))
    builder.store(pairs, pointer(builder, address, INTS)).align = 4


_rounded = vector_intrinsic((types.float32,), types.intp, _emit_rounded)
_store_int = vector_intrinsic((types.intp, types.intp), types.void, _emit_store_int)
_load_int32 = vector_intrinsic((types.intp,), types.intp, _emit_load_int32)
_store_levels = vector_intrinsic((types.intp, vector, types.intp), types.void, _emit_store_levels)
_store_row = vector_intrinsic((types.intp, vector), types.void, _emit_store_row)
store_bfloat16 = vector_intrinsic((types.intp, vector), types.void, _emit_store_bfloat16)
store_bfloat16_pairs = vector_intrinsic((types.intp, vector, vector), types.void, _emit_store_pairs)


@njit(error_model="numpy")
def _copy_tail(source, count, scratch):
    """The last `count` elements of a row as a vector of their own, zeros behind them."""
    store(scratch, splat(_ZERO))
    for k in range(count):
        store_float(scratch + 4 * k, load_float(source + 4 * k))


def quantise(args, task, thread):
    """Level rows of some rows: their range first, then the levels (see `low_precision.quantise_rows`)."""
    p = _read_quantise(args, thread)
    width, tail = p.width, p.scratch
    whole = width // LANES * LANES
    for row in range(task * LEVEL_ROWS, min((task + 1) * LEVEL_ROWS, p.count)):
        source, target = p.x + row * p.x_bytes, p.y + row * p.y_bytes
        _copy_tail(source + 4 * whole, width - whole, tail)
        x = load(tail)
        high, low = maximum(x, splat(_ZERO)), maximum(splat(_ZERO) - x, splat(_ZERO))
        spoilt = x * splat(_ZERO)  # NaN if any element is NaN or infinite
        for k in range(0, whole, LANES):
            x = load(source + 4 * k)
            high, low = maximum(x, high), maximum(splat(_ZERO) - x, low)
            spoilt = fma(x, splat(_ZERO), spoilt)
        deepest = max_lanes(low)  # -low
        span = max_lanes(high) + deepest
        inverse = _LEVELS / span if span > _SMALLEST else _ZERO
        factor = span / _LEVELS if span > _SMALLEST else _ZERO
        zero = _rounded(deepest * inverse)
        store_float(target, factor + sum_lanes(spoilt))
        _store_int(target + 4, zero)
        levels = target + HEADER_BYTES
        for k in range(0, whole, LANES):
            _store_levels(levels + k * _LEVEL_BYTES, load(source + 4 * k) * splat(inverse), zero)
        _store_levels(levels + whole * _LEVEL_BYTES, load(tail) * splat(inverse), zero)


def round_rows(args, task, thread):
    """The same for bfloat16."""
    p = _read_round(args, thread)
    width, tail = p.width, p.scratch
    whole = width // LANES * LANES
    for row in range(task * LEVEL_ROWS, min((task + 1) * LEVEL_ROWS, p.count)):
        source, target = p.x + row * p.x_bytes, p.y + row * p.y_bytes + HEADER_BYTES
        for k in range(0, whole, LANES):
            _store_row(target + k * _HALF_BYTES, load(source + 4 * k))
        _copy_tail(source + 4 * whole, width - whole, tail)
        _store_row(target + whole * _HALF_BYTES, load(tail))


# Products -----------------------------------------------------------------------------------------------------------


def _emit_scaled(builder, sums, constants, factor, zero):
    """(sums - zero * column sums) * (factor * column factors) + bias of LANES columns."""
    at = [builder.add(constants, ir.Constant(ir.IntType(64), 4 * NR * row)) for row in range(COLUMNS)]
    shift = builder.mul(splat_ir(builder, builder.trunc(zero, I32)), _load_ir(builder, at[2], INTS))
    whole = builder.sitofp(builder.sub(_load_ir(builder, sums, INTS), shift), FLOATS)
    factors = builder.fmul(splat_ir(builder, factor), _load_ir(builder, at[0], FLOATS))
    return fma_ir(builder, whole, factors, _load_ir(builder, at[1], FLOATS))


_scaled = vector_intrinsic((types.intp, types.intp, types.float32, types.intp), vector, _emit_scaled)


@njit(error_model="numpy")
def _scale_tile(tile, count, x, x_bytes, constants, target, target_bytes):
    """Sums of integers in the tile as float32 in the target, which may be the tile."""
    for i in range(count):
        header = x + i * x_bytes
        factor, zero = load_float(header), _load_int32(header + 4) - _MIDDLE
        for j in range(0, NR * 4, 4 * LANES):
            store(target + i * target_bytes + j, _scaled(tile + i * NR * 4 + j, constants + j, factor, zero))


@njit(error_model="numpy")
def _part(task, count, out, unit, blocks, side, group):
    """(product, first unit, first row, rows, first panel, last panel, place beside, tiles) of a task, see `product`."""
    panels, units = (out + NR - 1) // NR, (count + unit - 1) // unit
    groups = (panels + group - 1) // group
    first = task // side % groups * group
    beside = task % side
    block = task // (side * groups) % (blocks // side) * side + beside
    first_unit = block * units // blocks
    first_row = first_unit * unit
    rows = min((block + 1) * units // blocks * unit, count) - first_row
    return task // (groups * blocks), first_unit, first_row, rows, first, min(first + group, panels), beside, panels


def int8_product(args, task, thread):
    """One block of level rows times one group of panels, of one of several products; see `gemm.product`."""
    p = _read_int8(args, thread)
    nth, first_unit, first_row, rows_here, first, last, beside, panels = _part(
        task, p.count, p.out, p.unit, p.blocks, p.side, p.group
    )
    tile, steps, mode, y_bytes, x_bytes, residual_bytes = (
        p.scratch,
        p.steps,
        p.mode,
        p.y_bytes,
        p.x_bytes,
        p.residual_bytes,
    )
    tiles = (rows_here + MR - 1) // MR
    ahead_step = (_ROW8 + p.side * tiles - 1) // (p.side * tiles)
    x = p.x + nth * p.x_product_bytes + first_row * x_bytes
    y = p.y + first_unit * p.y_unit_bytes + nth // 2 * p.y_pair_bytes + nth % 2 * p.y_odd_bytes
    residual = p.residual + first_row * residual_bytes
    for panel in range(first, last):
        b = p.panels + (nth * panels + panel) * p.panel_bytes
        constants = p.columns + (nth * panels + panel) * (COLUMNS * NR * 4)
        following = b + p.panel_bytes if panel + 1 < panels else b
        column, columns = panel * NR * 4, p.out - panel * NR
        scale = p.scale + column if p.scale != 0 else 0
        for i in range(0, rows_here, MR):
            rows, here = min(MR, rows_here - i), y + i * y_bytes + column
            source, addend = x + i * x_bytes, residual + i * residual_bytes + column
            ahead = following + (beside * tiles + i // MR) * steps * ahead_step
            _multiply_int8(
                rows, source + HEADER_BYTES, x_bytes, b, tile, NR * 4, steps, 0, 0, ahead, ahead_step, here, y_bytes
            )
            if mode == PLAIN and columns >= NR:
                _scale_tile(tile, rows, source, x_bytes, constants, here, y_bytes)
                continue
            _scale_tile(tile, rows, source, x_bytes, constants, tile, NR * 4)
            if columns < NR:
                finish_last_tile(tile, rows, mode, scale, addend, residual_bytes, here, y_bytes, columns)
            else:
                finish_tile(tile, rows, mode, scale, addend, residual_bytes, here, y_bytes)


def bfloat16_product(args, task, thread):
    """The same for rows of bfloat16."""
    p = _read_bfloat16(args, thread)
    nth, first_unit, first_row, rows_here, first, last, beside, panels = _part(
        task, p.count, p.out, p.unit, p.blocks, p.side, p.group
    )
    tile, steps, mode, y_bytes, x_bytes, residual_bytes = (
        p.scratch,
        p.steps,
        p.mode,
        p.y_bytes,
        p.x_bytes,
        p.residual_bytes,
    )
    tiles = (rows_here + MR - 1) // MR
    ahead_step = (_ROW16 + p.side * tiles - 1) // (p.side * tiles)
    x = p.x + nth * p.x_product_bytes + first_row * x_bytes + HEADER_BYTES
    y = p.y + first_unit * p.y_unit_bytes + nth // 2 * p.y_pair_bytes + nth % 2 * p.y_odd_bytes
    residual = p.residual + first_row * residual_bytes
    for panel in range(first, last):
        b = p.panels + (nth * panels + panel) * p.panel_bytes
        bias = p.columns + (nth * panels + panel) * (COLUMNS * NR * 4) + NR * 4
        following = b + p.panel_bytes if panel + 1 < panels else b
        column, columns = panel * NR * 4, p.out - panel * NR
        scale = p.scale + column if p.scale != 0 else 0
        direct = mode == PLAIN and columns >= NR
        for i in range(0, rows_here, MR):
            rows, here = min(MR, rows_here - i), y + i * y_bytes + column
            addend = residual + i * residual_bytes + column
            ahead = following + (beside * tiles + i // MR) * steps * ahead_step
            target, target_bytes = (here, y_bytes) if direct else (tile, NR * 4)
            multiply_bfloat16(
                rows,
                x + i * x_bytes,
                x_bytes,
                b,
                target,
                target_bytes,
                steps,
                bias,
                0,
                ahead,
                ahead_step,
                here,
                y_bytes,
            )
            if columns < NR:
                finish_last_tile(tile, rows, mode, scale, addend, residual_bytes, here, y_bytes, columns)
            elif not direct:
                finish_tile(tile, rows, mode, scale, addend, residual_bytes, here, y_bytes)
