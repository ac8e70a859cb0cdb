"""The kernel of the roof; numba compiles it when the module is first used."""

from __future__ import annotations

import numpy as np
from numba import types

from ..ops.numba_cpu.arguments import FMA_CHAINS
from ..ops.numba_cpu.kernels.vector import constant, fma_ir, loop_ir, reader, splat, store, vector, vector_intrinsic
from ..ops.numba_cpu.target import TILE

_read = reader(FMA_CHAINS)


def _emit_chains(builder, steps, factor):
    """As many sums as the tile of a product has, each of which adds its neighbour times `factor`, all added up.

    The factors change with every step, so that no product can be computed once for all; the neighbour's value is that
    of the step before, so that no multiply-add waits for another one of its step; and the result takes the place of
    the addend, which every CPU can do without a copy.
    """

    def step(sums):
        sums = list(sums)
        for i in reversed(range(len(sums))):
            sums[i] = fma_ir(builder, sums[i - 1], factor, sums[i])
        return sums

    starts = [builder.fadd(factor, constant(i)) for i in range(TILE.rows * TILE.vectors)]
    total, *others = loop_ir(builder, "chains", steps, starts, step)
    for other in others:
        total = builder.fadd(total, other)
    return total


_chains = vector_intrinsic((types.intp, vector), vector, _emit_chains)


def fma_chains(args, task, thread):
    """Sums that are independent of each other; the result is stored so that none is optimised away."""
    p = _read(args, thread)
    factor = splat(np.float32(p.steps) * np.float32(1e-12))  # so small that the sums hardly grow, and no constant
    store(p.scratch, _chains(p.steps, factor))
