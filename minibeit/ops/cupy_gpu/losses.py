"""Losses: sums over elements in float64, everything else in the dtype of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .arrays import to_host
from .device import cupy

Array = Any


def cross_entropy(
    logits: Array, labels: Array, ignore_index: int, smoothing: float = 0.0
) -> Array:  # (n, K), (n,) -> ()
    """See `reference.cross_entropy`."""
    K = logits.shape[1]
    labels = np.asarray(to_host(labels))
    counted = np.flatnonzero(labels != ignore_index)
    labels = labels[counted]
    if labels.size and not (labels.min() >= 0 and labels.max() < K):
        wrong = labels[(labels < 0) | (labels >= K)][0]
        raise ValueError(f"labels: expected class numbers 0 to {K - 1} (or {ignore_index} to ignore), found {wrong}")
    if not labels.size:
        return cupy.asarray(np.array(np.nan, logits.dtype))
    rows = logits[cupy.asarray(counted)]
    shifted = rows - rows.max(1, keepdims=True)
    log_sums = cupy.log(cupy.exp(shifted).sum(1))
    chosen = shifted[cupy.arange(len(labels)), cupy.asarray(labels.astype(np.int64))]
    if smoothing:
        chosen = (1 - smoothing) * chosen + smoothing * shifted.mean(1)
    return _mean(log_sums - chosen)


def soft_cross_entropy(logits: Array, target: Array) -> Array:  # (n, K), (n, K) -> ()
    """See `reference.soft_cross_entropy`."""
    shifted = logits - logits.max(1, keepdims=True)
    log_sums = cupy.log(cupy.exp(shifted).sum(1, keepdims=True))
    return _mean((cupy.asarray(target, logits.dtype) * (log_sums - shifted)).sum(1))


def mse_loss(prediction: Array, target: Array) -> Array:  # (...), (...) -> ()
    """See `reference.mse_loss`."""
    return _mean(cupy.square(prediction - cupy.asarray(target, prediction.dtype)))


def bce_with_logits(logits: Array, target: Array) -> Array:  # (...), (...) -> ()
    """See `reference.bce_with_logits`."""
    target = cupy.asarray(target, logits.dtype)
    return _mean(cupy.maximum(logits, 0) - logits * target + cupy.log1p(cupy.exp(-cupy.abs(logits))))


def weighted_sum(losses: Sequence[Array], weights: Sequence[float]) -> Array:  # k x () -> ()
    """See `reference.weighted_sum`."""
    total = losses[0] * losses[0].dtype.type(weights[0])
    for loss, weight in zip(losses[1:], weights[1:], strict=True):
        total = total + loss * loss.dtype.type(weight)
    return total


def _mean(x: Array) -> Array:
    return x.mean(dtype=np.float64).astype(x.dtype)


# Training a tokenizer -------------------------------------------------------------------------------------------------


def gumbel_softmax(logits: Array, noise: Array, temperature: float) -> Array:  # (B, V, h, w) -> (B, V, h, w)
    """See `reference.gumbel_softmax`."""
    x = (logits + cupy.asarray(noise, logits.dtype)) / logits.dtype.type(temperature)
    powers = cupy.exp(x - x.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def divergence_from_uniform(logits: Array) -> Array:  # (B, V, h, w) -> ()
    """See `reference.divergence_from_uniform`."""
    shifted = logits - logits.max(1, keepdims=True)
    powers = cupy.exp(shifted)
    log_sums = cupy.log(powers.mean(1, keepdims=True))
    return _mean((powers / powers.sum(1, keepdims=True) * (shifted - log_sums)).sum(1))


def logit_laplace_loss(statistics: Array, pixels: Array) -> Array:  # (B, 2 C, H, W), (B, C, H, W) -> ()
    """See `reference.logit_laplace_loss`."""
    C = pixels.shape[1]
    x = cupy.asarray(pixels, statistics.dtype)
    distance = cupy.abs(cupy.log(x / (1 - x)) - statistics[:, :C])
    return _mean(distance * cupy.exp(-statistics[:, C:]) + statistics[:, C:] + cupy.log(2 * x * (1 - x)))
