"""AdamW in one pass over the weights."""

from __future__ import annotations

import math

import numpy as np

from .. import reference
from .gradient_arguments import ADAMW, CHUNK
from .machine_code import Kernel
from .memory import operand
from .prepare import is_float32
from .queue import run, synchronous

_SMALL = 1 << 15

_adamw = Kernel("minibeit.ops.numba_cpu.kernels.optimizer", "adamw", arguments=ADAMW)


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
    made = np.array(
        [1 - rate * decay, 1 - b1, b2, 1 - b2, 1 / math.sqrt(1 - b2**step), eps, rate / (1 - b1**step)], np.float32
    )
    operands = ADAMW.operands(
        weights=operand(weights), gradient=operand(gradient), mean=operand(mean), square=operand(square),
        factors=operand(made),
    )  # fmt: skip
    numbers = ADAMW.numbers(count=weights.size)
    run(_adamw, -(-weights.size // CHUNK), operands, numbers, small=weights.size < _SMALL)
