"""The roof: the peak rate of float32 multiply-adds of all threads together, with operands in registers."""

from __future__ import annotations

import importlib.util
import time
from functools import lru_cache
from typing import Any

_STEPS = 1 << 15  # with eight rounds about a millisecond: a longer run would rarely be undisturbed
_ROUNDS_PER_THREAD = 8


def available() -> bool:
    """Whether the roof can be measured: it needs numba and its compiler."""
    if importlib.util.find_spec("numba") is None:
        return False
    from ..ops import numba_cpu

    return numba_cpu.COMPILED


def measure(threads: int) -> float:
    """Operations per second on `threads` threads, measured for about a millisecond; a multiply-add counts as two.

    There are as many independent sums as a tile has: more than latency x units of any CPU (4 x 2 on x86, 4 x 4 on Arm),
    and they fit its registers.
    """
    from ..ops.numba_cpu.arguments import FMA_CHAINS
    from ..ops.numba_cpu.pool import num_threads
    from ..ops.numba_cpu.queue import run
    from ..ops.numba_cpu.target import LANES, TILE

    tasks, chains = threads * _ROUNDS_PER_THREAD, TILE.rows * TILE.vectors
    with num_threads(threads):
        run(_kernel(), threads, FMA_CHAINS.operands(), FMA_CHAINS.numbers(steps=64), 64)  # wakes the threads
        start = time.perf_counter()
        run(_kernel(), tasks, FMA_CHAINS.operands(), FMA_CHAINS.numbers(steps=_STEPS), 64)
        seconds = time.perf_counter() - start
    return 2 * LANES * chains * _STEPS * tasks / seconds


@lru_cache(maxsize=1)
def _kernel() -> Any:
    from ..ops.numba_cpu.arguments import FMA_CHAINS
    from ..ops.numba_cpu.machine_code import Kernel

    return Kernel("minibeit.bench.roof_kernel", "fma_chains", arguments=FMA_CHAINS)
