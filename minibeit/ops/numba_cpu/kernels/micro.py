"""The micro-kernel of the matrix product: one register tile, as LLVM IR."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ..target import LANES, MR, NR, TILE
from .vector import F32, FLOATS, I32, I64, fma_ir, pointer, splat_ir

VECTORS = TILE.vectors
_NEAR = 8  # steps: by then a row of B has come from the second-level cache to the first


def _const(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def _emit_prefetch(builder: ir.IRBuilder, address: ir.Value, level: int = 2, write: int = 0) -> None:
    """Asks for the cache line at `address` into the first- (3) or second-level (2) cache, for reading or writing."""
    byte = ir.PointerType(ir.IntType(8))
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    name = "llvm.prefetch.p0" if "ptr" in str(ir.PointerType()) else "llvm.prefetch.p0i8"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    numbers = (ir.Constant(I32, number) for number in (write, level, 1))
    builder.call(function, [builder.inttoptr(address, byte), *numbers])


@intrinsic
def prefetch_tile(typingctx, address, row_bytes):
    """Asks for the tile of MR rows and NR columns at `address`, which will be written or added to.

    A tile is multiplied for microseconds; without this its stores, each to another page, would be waited for after.
    Lines beyond the end of an array do no harm.
    """
    signature = types.void(types.intp, types.intp)

    def codegen(context, builder, signature, arguments):
        for i in range(MR):
            for byte in range(0, 4 * NR, 64):
                offset = builder.add(builder.mul(arguments[1], _const(i)), _const(byte))
                _emit_prefetch(builder, builder.add(arguments[0], offset), 3, 1)
        return context.get_dummy_value()

    return signature, codegen


def _load(builder: ir.IRBuilder, address: ir.Value, type_: ir.Type) -> ir.Value:
    value = builder.load(pointer(builder, address, type_))
    value.align = 4
    return value


def _emit_tile(builder, rows, a, lda, b, ldb, c, ldc, steps, addend, ld_addend, ahead, ahead_step):
    """C[0:rows, 0:NR] = addend + A[0:rows, 0:steps] @ B[0:steps, 0:NR]; leaves the builder after the stores.

    The accumulators are phi nodes, so LLVM keeps them in registers: nothing is spilled as long as the tile fits.
    """
    entry = builder.block
    loop, done, add_c, store_c = (
        builder.append_basic_block(f"{name}_{rows}") for name in ("steps", "done", "add_c", "store_c")
    )
    builder.branch(loop)
    builder.position_at_end(loop)
    names = ("step", "a_address", "b_address", "ahead_address")
    step, a_here, b_here, ahead_here = (builder.phi(I64, name) for name in names)
    sums = [[builder.phi(FLOATS) for _ in range(VECTORS)] for _ in range(rows)]
    for phi, value in ((step, _const(0)), (a_here, a), (b_here, b), (ahead_here, ahead)):
        phi.add_incoming(value, entry)
    for i in range(rows):
        for j in range(VECTORS):
            sums[i][j].add_incoming(ir.Constant(FLOATS, None), entry)
    _emit_prefetch(builder, ahead_here)
    for j in range(0, 4 * LANES * VECTORS, 64):
        _emit_prefetch(builder, builder.add(b_here, _const(_NEAR * 4 * LANES * VECTORS + j)), 3)
    columns = [_load(builder, builder.add(b_here, _const(4 * LANES * j)), FLOATS) for j in range(VECTORS)]
    results = [[None] * VECTORS for _ in range(rows)]
    for i in range(rows):
        scalar = _load(builder, builder.add(a_here, builder.mul(lda, _const(i))), F32)
        spread = splat_ir(builder, scalar)
        for j in range(VECTORS):
            results[i][j] = fma_ir(builder, spread, columns[j], sums[i][j])
    following = builder.add(step, _const(1))
    step.add_incoming(following, loop)
    a_here.add_incoming(builder.add(a_here, _const(4)), loop)
    b_here.add_incoming(builder.add(b_here, ldb), loop)
    ahead_here.add_incoming(builder.add(ahead_here, ahead_step), loop)
    for i in range(rows):
        for j in range(VECTORS):
            sums[i][j].add_incoming(results[i][j], loop)
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, done)

    builder.position_at_end(done)
    builder.cbranch(builder.icmp_signed("!=", addend, _const(0)), add_c, store_c)
    builder.position_at_end(add_c)
    totals = [[None] * VECTORS for _ in range(rows)]
    for i in range(rows):
        for j in range(VECTORS):
            more = _load(builder, _place(builder, addend, ld_addend, i, j), FLOATS)
            totals[i][j] = builder.fadd(results[i][j], more)
    builder.branch(store_c)
    builder.position_at_end(store_c)
    for i in range(rows):
        for j in range(VECTORS):
            value = builder.phi(FLOATS)
            value.add_incoming(results[i][j], done)
            value.add_incoming(totals[i][j], add_c)
            results[i][j] = value
    for i in range(rows):
        for j in range(VECTORS):
            builder.store(results[i][j], pointer(builder, _place(builder, c, ldc, i, j), FLOATS)).align = 4


def _place(builder: ir.IRBuilder, c: ir.Value, ldc: ir.Value, row: int, column: int) -> ir.Value:
    return builder.add(builder.add(c, builder.mul(ldc, _const(row))), _const(4 * LANES * column))


@intrinsic
def multiply_tile(typingctx, rows, a, lda, b, ldb, c, ldc, steps, addend, ld_addend, ahead, ahead_step):
    """C[0:rows, 0:NR] = addend + A @ B for 1 <= rows <= MR and steps >= 1.

    All arguments are integers: addresses and row strides in bytes.  `addend` 0 stands for zeros, C itself for +=, and
    with a row stride of 0 it is one row that is added to all.  `ahead` advances by `ahead_step` bytes per step and is
    only prefetched: the next panel, which would otherwise be waited for.
    """
    signature = types.void(*[types.intp] * 12)

    def codegen(context, builder, signature, arguments):
        rows, *rest = arguments
        blocks = [builder.append_basic_block(f"rows_{i}") for i in range(1, MR + 1)]
        end = builder.append_basic_block("tile_end")
        switch = builder.switch(rows, blocks[-1])
        for i, block in enumerate(blocks, 1):
            if i < MR:
                switch.add_case(_const(i), block)
            builder.position_at_end(block)
            _emit_tile(builder, i, *rest)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen
