"""The fast backend for CPUs: the ops of `reference` as machine code made by numba on this machine.

Arithmetic is float32.  Anything else (float64 arrays or weights, probabilities that are asked for, dropout) is served
by the NumPy definition of the same op, and so is everything when NUMBA_DISABLE_JIT is set.

target.py             the CPU: its vectors, the register tile of the matrix product
arguments.py          what a kernel and its caller agree on: arguments by name, constants
kernels/              what is compiled: imported only where a kernel is not on disk yet
cache.py, machine_code.py, pool.py   machine code, where it is kept on disk, the threads that run it
memory.py, operands.py, queue.py    memory and its addresses, arguments, kernels that wait for their turn
guard.py              for tests: buffers that end at protected pages
pack.py, prepare.py, stored.py   weights in the layout that the kernels read, made once at load or kept in a file
gradient_arguments.py, gradients.py, backward.py   what the backward of an op needs, and those backwards
map_arguments.py, map_gradients.py, conv_gradients.py, backward_maps.py, losses.py   the same for maps, and for losses
halves.py             all of those halves for a tape, which imports them when a training begins
gemm.py, attention.py, norm.py, winograd.py, spread.py, maps.py   these call the kernels;   ops.py   the ops
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

COMPILED = os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")

if COMPILED:
    from .losses import cross_entropy
    from .memory import release_pages
    from .ops import *
    from .optimizer import adamw
    from .prepare import prepare
    from .queue import queued, synchronous
    from .stored import dump, restore
else:
    from ..reference import *  # type: ignore[assignment]

    def prepare(params: Any, keep_source: bool = False) -> Any:
        """The parameters as they are: without a compiler NumPy serves every op."""
        return params

    def synchronous(op: Callable[..., Any]) -> Callable[..., Any]:
        """The op as it is: nothing is queued."""
        return op


def warmup() -> float:
    """Compiles every kernel that is not on disk yet, loads the others; the seconds that it took."""
    start = time.perf_counter()
    if COMPILED:
        from . import halves
        from .machine_code import ALL

        for kernel in ALL:
            kernel.load()
    return time.perf_counter() - start


def num_threads(count: int | None) -> Any:  # type: ignore[no-redef]
    """Context manager: ops called within, from this Python thread, use `count` threads (None: as before)."""
    from ..reference import num_threads as without_underflow
    from .pool import num_threads

    @contextmanager
    def session() -> Iterator[None]:
        with without_underflow(count), num_threads(count):  # NumPy serves some of the ops
            yield

    return session()
