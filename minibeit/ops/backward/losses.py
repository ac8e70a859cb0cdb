"""Losses for training and their backward.  Each loss is a mean; its cotangent g is a number, 1 for the loss itself."""

from __future__ import annotations

import numpy as np

from ..activations import sigmoid
from .arrays import total

__all__ = [
    "bce_with_logits_backward",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "mse_loss_backward",
    "soft_cross_entropy_backward",
    "soft_cross_entropy_forward",
]


def cross_entropy_forward(
    logits: np.ndarray, labels: np.ndarray, ignore_index: int, smoothing: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:  # (n, K), (n,) -> (), (n,)
    """Cross-entropy, and log sum exp of each row.

    With `smoothing` s the target of a row is 1 - s for its label plus s / K for every class.  The mean goes over the
    labels that are not `ignore_index`; NaN if there are none.  Raises ValueError for a label outside 0 to K - 1.
    """
    K = logits.shape[1]
    counted = labels != ignore_index
    inside = (labels >= 0) & (labels < K)
    if not (inside | ~counted).all():
        wrong = labels[counted & ~inside][0]
        raise ValueError(f"labels: expected class numbers 0 to {K - 1} (or {ignore_index} to ignore), found {wrong}")
    log_sums = _log_sums(logits)
    if not counted.any():
        return np.array(np.nan, logits.dtype), log_sums
    own = np.take_along_axis(logits, np.where(counted, labels, 0)[:, None], 1)[:, 0]
    rows = log_sums - (1 - smoothing) * own
    if smoothing:
        rows -= smoothing * logits.mean(1)
    return total(rows[counted], 0) / logits.dtype.type(counted.sum()), log_sums


def cross_entropy_backward(
    g: np.ndarray, saved: np.ndarray, logits: np.ndarray, labels: np.ndarray, ignore_index: int, smoothing: float = 0.0
) -> tuple[np.ndarray, None, None]:  # () -> (n, K)
    """dlogits = g (softmax(logits) - target) / (number of counted labels), 0 in ignored rows."""
    counted = labels != ignore_index
    d = np.exp(logits - saved[:, None])
    d -= logits.dtype.type(smoothing / logits.shape[1])
    rows = np.flatnonzero(counted)
    d[rows, labels[rows]] -= logits.dtype.type(1 - smoothing)
    d *= g / logits.dtype.type(max(len(rows), 1))
    d[~counted] = 0
    return d, None, None


def soft_cross_entropy_forward(
    logits: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # (n, K), (n, K) -> (), (n,)
    """Mean over rows of -sum target log softmax(logits), and log sum exp of each row.

    The targets of a row need not be 0 and 1 (mixup, cutmix).
    """
    log_sums = _log_sums(logits)
    target = target.astype(logits.dtype, copy=False)
    return total((target * (log_sums[:, None] - logits)).sum(1), 0) / logits.dtype.type(len(logits)), log_sums


def soft_cross_entropy_backward(
    g: np.ndarray, saved: np.ndarray, logits: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, None]:  # () -> (n, K)
    """dlogits = g (softmax(logits) sum(target) - target) / n; the targets are constants."""
    target = target.astype(logits.dtype, copy=False)
    d = np.exp(logits - saved[:, None]) * target.sum(1, keepdims=True) - target
    return d * (g / logits.dtype.type(len(logits))), None


def mse_loss_backward(
    g: np.ndarray, saved: None, prediction: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, None]:  # () -> (...)
    """dprediction = 2 g (prediction - target) / (number of elements)."""
    difference = prediction - target.astype(prediction.dtype, copy=False)
    return difference * (2 * g / prediction.dtype.type(prediction.size)), None


def bce_with_logits_backward(
    g: np.ndarray, saved: None, logits: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, None]:  # () -> (...)
    """dlogits = g (sigmoid(logits) - target) / (number of elements)."""
    difference = sigmoid(logits) - target.astype(logits.dtype, copy=False)
    return difference * (g / logits.dtype.type(logits.size)), None


def _log_sums(logits: np.ndarray) -> np.ndarray:  # (n, K) -> (n,)
    top = logits.max(1, keepdims=True)
    return np.log(np.exp(logits - top).sum(1)) + top[:, 0]
