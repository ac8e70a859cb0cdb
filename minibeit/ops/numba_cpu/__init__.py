"""The fast backend for CPUs: the ops of `reference` as machine code made by numba on this machine.

Arithmetic is float32.  Anything else (float64 arrays or weights, probabilities that are asked for, dropout) is served
by the NumPy definition of the same op, and so is everything when NUMBA_DISABLE_JIT is set.

target.py             the CPU: its vectors, the register tile of the matrix product
kernels/              what is compiled: imported only where a kernel is not on disk yet
machine_code.py, pool.py, cpus.py   machine code that is kept on disk, and the threads that run it
memory.py, operands.py, queue.py    memory and its addresses, arguments, kernels that wait for their turn
guard.py              for tests: buffers that end at protected pages
pack.py, prepare.py, stored.py   weights in the layout that the kernels read, made once at load or kept in a file
gemm.py, attention.py, norm.py, winograd.py, spread.py, maps.py   arguments for the kernels;   ops.py   the ops
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

__all__ = [
    "adaptive_avg_pool",
    "attention",
    "conv2d",
    "conv_bn_relu",
    "conv_bn_relu_resized",
    "conv_transpose",
    "conv_transpose_bn_gelu",
    "deferred",
    "dump",
    "layer_norm",
    "linear",
    "linear_activation",
    "linear_residual",
    "max_pool2x2",
    "num_threads",
    "prepare",
    "project_qkv",
    "resize_bilinear",
    "restore",
]

COMPILED = os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")

if not COMPILED:
    from ..reference import (
        adaptive_avg_pool,
        attention,
        conv2d,
        conv_bn_relu,
        conv_bn_relu_resized,
        conv_transpose,
        conv_transpose_bn_gelu,
        deferred,
        dump,
        layer_norm,
        linear,
        linear_activation,
        linear_residual,
        max_pool2x2,
        project_qkv,
        resize_bilinear,
        restore,
    )  # fmt: skip

    def prepare(params: Any, keep_source: bool = False) -> Any:
        """The parameters as they are: without a compiler NumPy serves every op."""
        return params

    def synchronous(op: Callable[..., Any]) -> Callable[..., Any]:
        """The op as it is: nothing is queued."""
        return op

else:
    from .ops import (
        adaptive_avg_pool,
        attention,
        conv2d,
        conv_bn_relu,
        conv_bn_relu_resized,
        conv_transpose,
        conv_transpose_bn_gelu,
        layer_norm,
        linear,
        linear_activation,
        linear_residual,
        max_pool2x2,
        project_qkv,
        resize_bilinear,
    )  # fmt: skip
    from .prepare import prepare
    from .queue import deferred
    from .queue import synchronous as synchronous
    from .stored import dump, restore


def warmup() -> float:
    """Compiles every kernel that is not on disk yet, loads the others; the seconds that it took."""
    start = time.perf_counter()
    if COMPILED:
        from .machine_code import ALL

        for kernel in ALL:
            kernel.load()
    return time.perf_counter() - start


def num_threads(count: int | None) -> Any:
    """Context manager: ops called within, from this Python thread, use `count` threads (None: as before)."""
    from .pool import num_threads

    return num_threads(count)
