"""The micro-kernel of the matrix product: one register tile, as LLVM IR."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..target import LANES, MR, TILE
from .vector import F32, FLOATS, I32, I64, fma_ir, loop_ir, pointer, splat_ir, vector_intrinsic

VECTORS = TILE.vectors
_NEAR = 8  # steps: by then a row of B has come from the second-level cache to the first


def _const(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def _emit_prefetch(builder: ir.IRBuilder, address: ir.Value, level: int = 2, write: int = 0) -> None:
    """Asks for the cache line at `address` into the first- (3) or second-level (2) cache, for reading or writing."""
    byte = ir.PointerType(ir.IntType(8))
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    name = "llvm.prefetch.p0i8"  # of typed pointers; an LLVM without them takes it for its own llvm.prefetch.p0
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    numbers = (ir.Constant(I32, number) for number in (write, level, 1))
    builder.call(function, [builder.inttoptr(address, byte), *numbers])


prefetch = vector_intrinsic((types.intp,), types.void, _emit_prefetch)


def _load(builder: ir.IRBuilder, address: ir.Value, type_: ir.Type) -> ir.Value:
    value = builder.load(pointer(builder, address, type_))
    value.align = 4
    return value


class Arithmetic(NamedTuple):
    """What one step of a sum does: it takes 4 bytes of a row of A and `column_bytes` of each column of B."""

    sums: ir.Type  # a vector of LANES accumulators
    column_bytes: int
    columns: Callable[[ir.IRBuilder, ir.Value], Any]  # (builder, address) -> LANES columns of B
    spread: Callable[[ir.IRBuilder, ir.Value], Any]  # (builder, address) -> 4 bytes of A, LANES times
    multiply_add: Callable[[ir.IRBuilder, Any, Any, Any], Any]  # (builder, spread, columns, sums) -> sums
    add: Callable[[ir.IRBuilder, Any, Any], Any]  # (builder, sums, sums) -> sums


FLOAT32 = Arithmetic(
    sums=FLOATS,
    column_bytes=4,
    columns=lambda builder, address: _load(builder, address, FLOATS),
    spread=lambda builder, address: splat_ir(builder, _load(builder, address, F32)),
    multiply_add=fma_ir,
    add=lambda builder, a, b: builder.fadd(a, b),
)


def _emit_sums(builder, rows, vectors, kind, a, lda, b, steps, ahead, ahead_step, touch, touch_bytes):
    """Accumulators of A @ B for `rows` rows and `vectors` vectors of columns, row after row.

    They are phi nodes, so LLVM keeps them in registers: nothing is spilled as long as the tile fits.  Each three rows
    of A have a pointer of their own that LLVM must not derive from another one: it would compute one address a row and
    step, and those additions take the units that multiply.  The loop goes in one part for each row, so that the rows of
    `touch` are asked for one after another: all at once they would keep B from coming.
    """
    lda = _opaque(builder, lda)
    starts = [_opaque(builder, builder.add(a, builder.mul(lda, _const(i)))) for i in range(0, rows, 3)]
    vector_bytes = kind.column_bytes * LANES
    row_bytes = vector_bytes * vectors

    def several(count):
        def body(carried):
            ahead_here, b_here, *others = carried
            a_here, sums = others[: len(starts)], others[len(starts) :]
            _emit_prefetch(builder, ahead_here)
            for k in range(count):
                for j in range(0, row_bytes, 64):
                    _emit_prefetch(builder, builder.add(b_here, _const((_NEAR + k) * row_bytes + j)), 3)
                at = [builder.add(b_here, _const(k * row_bytes + vector_bytes * j)) for j in range(vectors)]
                columns = [kind.columns(builder, address) for address in at]
                for i in range(rows):
                    address = builder.add(a_here[i // 3], builder.mul(lda, _const(i % 3)))
                    spread = kind.spread(builder, builder.add(address, _const(4 * k)))
                    for j, column in enumerate(columns):
                        sums[i * vectors + j] = kind.multiply_add(builder, spread, column, sums[i * vectors + j])
            advances = [builder.mul(ahead_step, _const(count)), _const(count * row_bytes)]
            advances += [_const(4 * count)] * len(starts)
            pointers = [ahead_here, b_here, *a_here]
            return [builder.add(pointer, advance) for pointer, advance in zip(pointers, advances)] + sums

        return body

    values = [ahead, b, *starts] + [ir.Constant(kind.sums, None)] * (rows * vectors)
    rounds, rest = builder.sdiv(steps, _const(TILE.unroll)), builder.srem(steps, _const(TILE.unroll))
    part = builder.sdiv(rounds, _const(rows))
    more = builder.sub(rounds, builder.mul(part, _const(rows)))

    def one_part(carried):
        touch_here, first, *others = carried
        for byte in range(0, row_bytes, 64):
            _emit_prefetch(builder, builder.add(touch_here, _const(byte)), 3, 1)
        others = loop_ir(builder, f"steps_{rows}", builder.add(part, first), others, several(TILE.unroll))
        return [builder.add(touch_here, touch_bytes), _const(0), *others]

    _, _, *values = loop_ir(builder, f"parts_{rows}", _const(rows), [touch, more, *values], one_part)
    return loop_ir(builder, f"last_steps_{rows}", rest, values, several(1))[2 + len(starts) :]


def _emit_tile(
    builder, rows, vectors, kind, a, lda, b, c, ldc, steps, addend, ld_addend, ahead, ahead_step, touch, touch_bytes
):  # fmt: skip
    """C = addend + A @ B for `rows` rows and `vectors` vectors of columns; leaves the builder after the stores."""
    sums = _emit_sums(builder, rows, vectors, kind, a, lda, b, steps, ahead, ahead_step, touch, touch_bytes)
    places = [(i, j) for i in range(rows) for j in range(vectors)]
    done, add_c, store_c = (builder.block, *(builder.append_basic_block(f"{n}_{rows}") for n in ("add_c", "store_c")))
    builder.cbranch(builder.icmp_signed("!=", addend, _const(0)), add_c, store_c)
    builder.position_at_end(add_c)
    more = [_load(builder, _place(builder, addend, ld_addend, *place), kind.sums) for place in places]
    totals = [kind.add(builder, value, other) for value, other in zip(sums, more)]
    builder.branch(store_c)
    builder.position_at_end(store_c)
    results = [builder.phi(kind.sums) for _ in places]
    for result, value, total in zip(results, sums, totals):
        result.add_incoming(value, done)
        result.add_incoming(total, add_c)
    for result, place in zip(results, places):
        builder.store(result, pointer(builder, _place(builder, c, ldc, *place), kind.sums)).align = 4


def _opaque(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The same integer, of which LLVM knows nothing any more."""
    return builder.call(ir.InlineAsm(ir.FunctionType(I64, [I64]), "", "=r,0"), [value])


def _place(builder: ir.IRBuilder, c: ir.Value, ldc: ir.Value, row: int, column: int) -> ir.Value:
    return builder.add(builder.add(c, builder.mul(ldc, _const(row))), _const(4 * LANES * column))


def tile_product(vectors, kind=FLOAT32):
    """multiply(rows, a, lda, b, c, ldc, steps, addend, ld_addend, ahead, ahead_step, touch, touch_bytes), for panels of
    `vectors` vectors, in the arithmetic `kind`.

    C[0:rows] = addend + A @ B for 1 <= rows <= MR, B being a panel (steps, vectors * LANES).  All arguments are
    integers: addresses and row strides in bytes.  `addend` 0 stands for zeros, C itself for +=, and with a row stride
    of 0 it is one row that is added to all.  `ahead` advances by `ahead_step` bytes a step and is only prefetched: the
    next panel, which would otherwise be waited for.  So are, for writing, the tile's columns of the rows at `touch`,
    `touch_bytes` apart: what the tile will be stored or added to, each row in another page.  Lines beyond the end of an
    array do no harm.
    """

    @intrinsic
    def emit(typingctx, rows, a, lda, b, c, ldc, steps, addend, ld_addend, ahead, ahead_step, touch, touch_bytes):
        signature = types.void(*[types.intp] * 13)

        def codegen(context, builder, signature, arguments):
            rows, *rest = arguments
            blocks = [builder.append_basic_block(f"rows_{i}") for i in range(1, MR + 1)]
            end = builder.append_basic_block("tile_end")
            switch = builder.switch(rows, blocks[-1])
            for i, block in enumerate(blocks, 1):
                if i < MR:
                    switch.add_case(_const(i), block)
                builder.position_at_end(block)
                _emit_tile(builder, i, vectors, kind, *rest)
                builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return signature, codegen

    @njit(types.void(*[types.intp] * 13), error_model="numpy")  # one for all callers: each copy would take seconds
    def multiply(rows, a, lda, b, c, ldc, steps, addend, ld_addend, ahead, ahead_step, touch, touch_bytes):
        emit(rows, a, lda, b, c, ldc, steps, addend, ld_addend, ahead, ahead_step, touch, touch_bytes)

    return multiply


multiply_tile = tile_product(VECTORS)
multiply_narrow_tile = tile_product(1)
