"""Losses for training and their backward.  Each loss is a mean; its cotangent g is a number, 1 for the loss itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..activations import sigmoid
from ..reference import losses

__all__ = [
    "bce_with_logits_backward",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "divergence_from_uniform_backward",
    "gumbel_softmax_backward",
    "gumbel_softmax_forward",
    "logit_laplace_loss_backward",
    "mse_loss_backward",
    "soft_cross_entropy_backward",
    "weighted_sum_backward",
    "soft_cross_entropy_forward",
]


def cross_entropy_forward(
    logits: np.ndarray,
    labels: np.ndarray,
    ignore_index: int,
    smoothing: float = 0.0,
    sums: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # (n, K), (n,) -> (), (n,)
    """Cross-entropy, and log sum exp of each row, computed by `sums` in place of `log_sum_exp` if given.

    With `smoothing` s the target of a row is 1 - s for its label plus s / K for every class.  The mean goes over the
    labels that are not `ignore_index`; NaN if there are none.  Raises ValueError for a label outside 0 to K - 1.
    """
    K = logits.shape[1]
    counted = labels != ignore_index
    inside = (labels >= 0) & (labels < K)
    if not (inside | ~counted).all():
        wrong = labels[counted & ~inside][0]
        raise ValueError(f"labels: expected class numbers 0 to {K - 1} (or {ignore_index} to ignore), found {wrong}")
    log_sums = log_sum_exp(logits) if sums is None else sums(logits)
    if not counted.any():
        return np.array(np.nan, logits.dtype), log_sums
    own = np.take_along_axis(logits, np.where(counted, labels, 0)[:, None], 1)[:, 0]
    rows = log_sums - (1 - smoothing) * own
    if smoothing:
        rows -= smoothing * logits.mean(1, dtype=np.float64)
    return _number(rows[counted].mean(), logits), log_sums


def cross_entropy_backward(
    g: np.ndarray, saved: np.ndarray, logits: np.ndarray, labels: np.ndarray, ignore_index: int, smoothing: float = 0.0
) -> tuple[np.ndarray, None, None]:  # () -> (n, K)
    """dlogits = g (softmax(logits) - target) / (number of counted labels), 0 in ignored rows."""
    rows = np.flatnonzero(labels != ignore_index)
    d = np.exp(logits[rows] - saved[rows, None]) - smoothing / logits.shape[1]
    d[np.arange(len(rows)), labels[rows]] -= 1 - smoothing
    out = np.zeros_like(logits)
    out[rows] = d * (g / max(len(rows), 1))
    return out, None, None


def soft_cross_entropy_forward(
    logits: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # (n, K), (n, K) -> (), (n,)
    """See `reference.soft_cross_entropy`; and log sum exp of each row."""
    log_sums = log_sum_exp(logits)
    return _number((target * (log_sums[:, None] - logits)).sum(1).mean(), logits), log_sums


def soft_cross_entropy_backward(
    g: np.ndarray, saved: np.ndarray, logits: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, None]:  # () -> (n, K)
    """dlogits = g (softmax(logits) sum(target) - target) / n; the targets are constants."""
    d = np.exp(logits - saved[:, None]) * target.sum(1, keepdims=True) - target
    return (d * (g / len(logits))).astype(logits.dtype, copy=False), None


def mse_loss_backward(
    g: np.ndarray, saved: None, prediction: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, None]:  # () -> (...)
    """dprediction = 2 g (prediction - target) / (number of elements)."""
    difference = prediction - target.astype(prediction.dtype, copy=False)
    return (difference * (2 * g / prediction.size)).astype(prediction.dtype, copy=False), None


def bce_with_logits_backward(
    g: np.ndarray, saved: None, logits: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, None]:  # () -> (...)
    """dlogits = g (sigmoid(logits) - target) / (number of elements)."""
    difference = sigmoid(logits.astype(np.float64, copy=False)) - target
    return (difference * (g / logits.size)).astype(logits.dtype, copy=False), None


def weighted_sum_backward(
    g: np.ndarray, saved: None, losses: Sequence[np.ndarray], weights: Sequence[float]
) -> tuple[list[np.ndarray], None]:  # () -> k x ()
    """Each loss gets g times its weight."""
    return [np.asarray(g * weight, loss.dtype) for loss, weight in zip(losses, weights, strict=True)], None


def log_sum_exp(logits: np.ndarray) -> np.ndarray:  # (n, K) -> (n,), float64
    """log of the sum of exp over each row, after subtracting the largest so that exp cannot overflow.

    In float64, as `reference.softmax` and for its reason.
    """
    top = logits.max(1, keepdims=True)
    return np.log(np.exp(logits - top, dtype=np.float64).sum(1)) + top[:, 0]


def _number(value: np.floating, like: np.ndarray) -> np.ndarray:
    return np.asarray(value, like.dtype)


# Training a tokenizer -------------------------------------------------------------------------------------------------


def gumbel_softmax_forward(
    logits: np.ndarray, noise: np.ndarray, temperature: float
) -> tuple[np.ndarray, np.ndarray]:  # (B, V, h, w) -> twice the same
    """See `reference.gumbel_softmax`; its result is what the backward needs."""
    y = losses.gumbel_softmax(logits, noise, temperature)
    return y, y


def gumbel_softmax_backward(
    g: np.ndarray, saved: np.ndarray, logits: np.ndarray, noise: np.ndarray, temperature: float
) -> tuple[np.ndarray, None, None]:  # (B, V, h, w) -> (B, V, h, w)
    """dlogits = y (g - sum over tokens of g y) / temperature; the noise is a constant."""
    inner = (g * saved).sum(1, keepdims=True)
    return saved * (g - inner) / logits.dtype.type(temperature), None, None


def divergence_from_uniform_backward(g: np.ndarray, saved: None, logits: np.ndarray) -> tuple[np.ndarray]:
    """dlogits = g q (log q - sum q log q) / (number of places)."""
    shifted = logits - logits.max(1, keepdims=True)
    log_q = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    q = np.exp(log_q)
    places = logits.size // logits.shape[1]
    return ((q * (log_q - (q * log_q).sum(1, keepdims=True)) * (g / places)).astype(logits.dtype, copy=False),)


def logit_laplace_loss_backward(
    g: np.ndarray, saved: None, statistics: np.ndarray, pixels: np.ndarray
) -> tuple[np.ndarray, None]:  # () -> (B, 2 C, height, width)
    """dmu = -g sign(logit(x) - mu) exp(-s) / n, ds = g (1 - |logit(x) - mu| exp(-s)) / n, n the number of elements."""
    C = pixels.shape[1]
    x = pixels.astype(statistics.dtype)
    difference, weight = np.log(x / (1 - x)) - statistics[:, :C], np.exp(-statistics[:, C:])
    both = np.concatenate([-np.sign(difference) * weight, 1 - np.abs(difference) * weight], axis=1)
    return (both * (g / x.size)).astype(statistics.dtype, copy=False), None
