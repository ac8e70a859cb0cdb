"""The kernel of the roof; numba compiles it when the module is first used."""

from __future__ import annotations

import numpy as np

from ..ops.numba_cpu.arguments import FMA_CHAINS
from ..ops.numba_cpu.kernels.vector import fma, reader, splat, store

_read = reader(FMA_CHAINS)


def fma_chains(args, task, thread):
    """Twelve independent sums x = x * factor + shift; the result is stored so that none is optimised away."""
    p = _read(args, thread)
    factor, shift = splat(np.float32(0.999)), splat(np.float32(0.001))  # x stays near 1
    a = b = c = d = e = f = g = h = i = j = k = m = shift
    a, b, c, d = fma(a, a, shift), fma(b, factor, a), fma(c, a, b), fma(d, b, c)  # all different
    e, f, g, h = fma(e, c, d), fma(f, d, e), fma(g, e, f), fma(h, f, g)
    i, j, k, m = fma(i, g, h), fma(j, h, i), fma(k, i, j), fma(m, j, k)
    for _ in range(p.steps):
        a = fma(a, factor, shift)
        b = fma(b, factor, shift)
        c = fma(c, factor, shift)
        d = fma(d, factor, shift)
        e = fma(e, factor, shift)
        f = fma(f, factor, shift)
        g = fma(g, factor, shift)
        h = fma(h, factor, shift)
        i = fma(i, factor, shift)
        j = fma(j, factor, shift)
        k = fma(k, factor, shift)
        m = fma(m, factor, shift)
    store(p.scratch, ((a + b) + (c + d)) + ((e + f) + (g + h)) + ((i + j) + (k + m)))
