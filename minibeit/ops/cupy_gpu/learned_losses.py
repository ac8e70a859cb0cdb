"""Forward and backward of losses, and backward of what takes parts of an array, on the device.

The cotangent g of a loss is a number; what is no prediction is a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..backward import arrays
from . import losses
from .arrays import marked, to_host
from .device import cupy
from .kernels import block_size, kernel

Array = Any

__all__ = [
    "bce_with_logits_backward",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "divergence_from_uniform_backward",
    "gumbel_softmax_forward",
    "logit_laplace_loss_backward",
    "mask_tokens_backward",
    "masked_patches_backward",
    "mean_patches_backward",
    "mse_loss_backward",
    "part_backward",
    "soft_cross_entropy_backward",
    "soft_cross_entropy_forward",
    "weighted_sum_backward",
]


def cross_entropy_forward(logits: Array, labels: Any, ignore_index: int, smoothing: float = 0.0) -> tuple[Array, None]:
    """See `reference.cross_entropy`; nothing is kept."""
    return losses.cross_entropy(logits, labels, ignore_index, smoothing), None


def cross_entropy_backward(
    g: Array, saved: None, logits: Array, labels: Any, ignore_index: int, smoothing: float = 0.0
) -> tuple[Any, ...]:
    """dlogits = g (softmax(logits) - target) / (number of counted labels), 0 in ignored rows."""
    labels = np.asarray(to_host(labels))
    counted = labels != ignore_index
    shares = (counted / max(int(counted.sum()), 1)).astype(logits.dtype)
    args = cupy.asarray(labels.astype(np.int64)), cupy.asarray(shares), _number(g, logits)
    return _by_row("cross_entropy_backward", logits, *args, last=(float(smoothing),)), None, None


def soft_cross_entropy_forward(logits: Array, target: Any) -> tuple[Array, None]:
    """See `reference.soft_cross_entropy`; nothing is kept."""
    return losses.soft_cross_entropy(logits, target), None


def soft_cross_entropy_backward(g: Array, saved: None, logits: Array, target: Any) -> tuple[Any, ...]:
    """dlogits = g (softmax(logits) sum(target) - target) / n."""
    target = cupy.ascontiguousarray(cupy.asarray(target, logits.dtype))
    return _by_row("soft_cross_entropy_backward", logits, target, _number(g, logits)), None


def _by_row(name: str, logits: Array, *args: Any, last: tuple[float, ...] = ()) -> Array:
    """What a kernel with a block for each row of the logits makes of them."""
    n, K = logits.shape
    logits, made = cupy.ascontiguousarray(logits), cupy.empty((n, K), logits.dtype)
    if made.size:
        kernel(name, logits.dtype.name)((n,), (block_size(K),), (logits, *args, made, K, *last))
    return made


def _number(g: Any, like: Array) -> Array:
    return cupy.asarray(g, like.dtype).reshape(1)


# Parts ----------------------------------------------------------------------------------------------------------------


def mean_patches_backward(g: Array, saved: None, x: Array) -> tuple[Any, ...]:
    """As `backward.mean_patches_backward`."""
    dx = cupy.zeros(x.shape, g.dtype)
    dx[:, 1:] = (g / g.dtype.type(x.shape[1] - 1))[:, None]
    return (dx,)


def part_backward(g: Array, saved: None, x: Array, index: Any) -> tuple[Any, ...]:
    """As `backward.part_backward`."""
    dx = cupy.zeros(x.shape, g.dtype)
    dx[index] = g
    return dx, None


def masked_patches_backward(g: Array, saved: None, x: Array, mask: Array) -> tuple[Any, ...]:
    """As `backward.masked_patches_backward`."""
    return part_backward(g, None, x, marked(mask))


def mask_tokens_backward(g: Array, saved: None, x: Array, mask: Array, mask_token: Array) -> tuple[Any, ...]:
    """As `backward.mask_tokens_backward`."""
    return arrays.mask_tokens_backward(g, None, x, cupy.asarray(mask), mask_token)


# Losses of other tasks ------------------------------------------------------------------------------------------------


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
