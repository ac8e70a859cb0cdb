"""Cross-entropy of many rows, as of every pixel of a label map, and its backward."""

from __future__ import annotations

import numpy as np

from .. import backward as reference
from .gradient_arguments import LOG_SUMS, LOSS_ROWS, SOFTMAX_GRADIENT
from .machine_code import Kernel
from .memory import aligned, constant_operand, operand
from .operands import rows
from .prepare import is_float32
from .queue import run, synchronous
from .target import LANES

__all__ = ["cross_entropy", "cross_entropy_backward", "cross_entropy_forward"]

_log_sums = Kernel("minibeit.ops.numba_cpu.kernels.losses", "log_sums", arguments=LOG_SUMS)
_softmax_gradient = Kernel("minibeit.ops.numba_cpu.kernels.losses", "softmax_gradient", arguments=SOFTMAX_GRADIENT)


def cross_entropy(
    logits: np.ndarray, labels: np.ndarray, ignore_index: int, smoothing: float = 0.0
) -> np.ndarray:  # (n, K), (n,) -> ()
    """See `reference.cross_entropy`."""
    return cross_entropy_forward(logits, labels, ignore_index, smoothing)[0]


@synchronous
def cross_entropy_forward(
    logits: np.ndarray, labels: np.ndarray, ignore_index: int, smoothing: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """See `reference.cross_entropy_forward`; the exponentials are float32, their sum is finished in float64."""
    sums = _sums if is_float32(logits) and logits.size else None
    return reference.cross_entropy_forward(logits, labels, ignore_index, smoothing, sums)


@synchronous
def cross_entropy_backward(
    g: np.ndarray, saved: np.ndarray, logits: np.ndarray, labels: np.ndarray, ignore_index: int, smoothing: float = 0.0
) -> tuple[np.ndarray, None, None]:
    """See `reference.cross_entropy_backward`."""
    if not is_float32(logits) or not logits.size or smoothing:
        return reference.cross_entropy_backward(g, saved, logits, labels, ignore_index, smoothing)
    counted = labels != ignore_index
    factor = np.float32(g / max(int(counted.sum()), 1))
    source, count, row_bytes = rows(logits)
    y, factors = aligned(logits.shape), np.where(counted, factor, np.float32(0))
    near = saved.astype(np.float32)
    operands = SOFTMAX_GRADIENT.operands(
        logits=source, log_sums=constant_operand(near), rests=constant_operand((saved - near).astype(np.float32)),
        factors=constant_operand(factors), y=operand(y),
    )  # fmt: skip
    numbers = SOFTMAX_GRADIENT.numbers(row_bytes=row_bytes, count=count, width=logits.shape[1])
    run(_softmax_gradient, -(-count // LOSS_ROWS), operands, numbers, 4 * (logits.shape[1] + LANES))
    places = np.flatnonzero(counted)
    y[places, labels[places]] -= factor
    return y, None, None


def _sums(logits: np.ndarray) -> np.ndarray:  # (n, K) -> (n,)
    source, count, row_bytes = rows(logits)
    largest, sums = aligned((count,)), aligned((count,))
    operands = LOG_SUMS.operands(logits=source, largest=operand(largest), sums=operand(sums))
    numbers = LOG_SUMS.numbers(row_bytes=row_bytes, count=count, width=logits.shape[1])
    run(_log_sums, -(-count // LOSS_ROWS), operands, numbers, 4 * (logits.shape[1] + LANES))
    return np.log(sums, dtype=np.float64) + largest
