"""AdamW in one pass over the weights."""

from __future__ import annotations

import math

import numpy as np

from .. import reference
from .machine_code import Kernel
from .memory import operand
from .prepare import is_float32
from .queue import run, synchronous

CHUNK = 1 << 14  # weights per task
_SMALL = 1 << 15

_adamw = Kernel("minibeit.ops.numba_cpu.kernels.optimizer", "adamw")


@synchronous
def adamw(
    weights: np.ndarray,
    gradient: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    factors: tuple[float, float, tuple[float, float], float],
    step: int,
) -> None:
    """See `reference.adamw`; one pass over all four vectors."""
    vectors = weights, gradient, mean, square
    if not is_float32(*vectors) or not all(vector.flags.c_contiguous for vector in vectors) or not weights.size:
        reference.adamw(*vectors, factors, step)
        return
    rate, decay, (b1, b2), eps = factors
    numbers = np.array(
        [1 - rate * decay, 1 - b1, b2, 1 - b2, 1 / math.sqrt(1 - b2**step), eps, rate / (1 - b1**step)], np.float32
    )
    operands = tuple(map(operand, (weights, gradient, mean, square, numbers)))
    run(_adamw, -(-weights.size // CHUNK), operands, (weights.size,), small=weights.size < _SMALL)
