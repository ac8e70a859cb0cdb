"""Backward of losses on the device.  The cotangent g is a number; what is no prediction is a constant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import losses
from .device import cupy

Array = Any

__all__ = [
    "bce_with_logits_backward",
    "divergence_from_uniform_backward",
    "gumbel_softmax_forward",
    "logit_laplace_loss_backward",
    "mse_loss_backward",
    "weighted_sum_backward",
]


def mse_loss_backward(g: Array, saved: None, prediction: Array, target: Any) -> tuple[Array, None]:
    """dprediction = 2 g (prediction - target) / (number of elements)."""
    difference = prediction - cupy.asarray(target, prediction.dtype)
    return (difference * (2 * g / prediction.size)).astype(prediction.dtype, copy=False), None


def bce_with_logits_backward(g: Array, saved: None, logits: Array, target: Any) -> tuple[Array, None]:
    """dlogits = g (sigmoid(logits) - target) / (number of elements)."""
    x = logits.astype("float64")
    power = cupy.exp(-cupy.abs(x))  # cannot overflow
    sigmoid = cupy.where(x >= 0, 1.0, power) / (1 + power)
    difference = sigmoid - cupy.asarray(target, "float64")
    return (difference * (g / logits.size)).astype(logits.dtype), None


def weighted_sum_backward(
    g: Array, saved: None, terms: Sequence[Array], weights: Sequence[float]
) -> tuple[list[Array], None]:
    """Each loss gets g times its weight."""
    return [(g * weight).astype(term.dtype, copy=False) for term, weight in zip(terms, weights, strict=True)], None


def gumbel_softmax_forward(logits: Array, noise: Any, temperature: float) -> tuple[Array, Array]:
    """The result is what the backward needs."""
    y = losses.gumbel_softmax(logits, noise, temperature)
    return y, y


def divergence_from_uniform_backward(g: Array, saved: None, logits: Array) -> tuple[Array]:  # (B, V, h, w)
    """dlogits = g q (log q - sum q log q) / (number of places)."""
    shifted = logits - logits.max(1, keepdims=True)
    log_q = shifted - cupy.log(cupy.exp(shifted).sum(1, keepdims=True))
    q = cupy.exp(log_q)
    places = logits.size // logits.shape[1]
    return ((q * (log_q - (q * log_q).sum(1, keepdims=True)) * (g / places)).astype(logits.dtype, copy=False),)


def logit_laplace_loss_backward(
    g: Array, saved: None, statistics: Array, pixels: Any
) -> tuple[Array, None]:  # () -> (B, 2 C, height, width)
    """dmu = -g sign(logit(x) - mu) exp(-s) / n, ds = g (1 - |logit(x) - mu| exp(-s)) / n, n the number of elements."""
    C = pixels.shape[1]
    x = cupy.asarray(pixels, statistics.dtype)
    difference, weight = cupy.log(x / (1 - x)) - statistics[:, :C], cupy.exp(-statistics[:, C:])
    both = cupy.concatenate([-cupy.sign(difference) * weight, 1 - cupy.abs(difference) * weight], 1)
    return (both * (g / x.size)).astype(statistics.dtype, copy=False), None
