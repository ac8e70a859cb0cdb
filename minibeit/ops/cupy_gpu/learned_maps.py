"""Forward and backward of ops on maps, with weights that are learned: plain arrays in the dtype of model code.

Products are those of that dtype (float32 in half precision too), sums over pixels are made in float64; everything goes
in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ...params import BATCH_NORM_EPS, BatchNorm, Conv, ConvBatchNorm, ConvTranspose, ReluConv
from .. import reference
from ..backward.arrays import pieces_of, total
from ..backward.maps import PLACES, BatchStatistics, Moments, tap_matrix
from . import maps
from .device import cupy
from .kernels import GELU, model_dtype
from .prepare import DeviceLinear
from .rows import bias_activation

Array = Any

__all__ = [
    "adaptive_avg_pool_backward",
    "conv2d_backward",
    "conv2d_forward",
    "conv_bn_relu_backward",
    "conv_bn_relu_forward",
    "conv_bn_relu_resized_backward",
    "conv_bn_relu_resized_forward",
    "conv_transpose_backward",
    "conv_transpose_bn_gelu_backward",
    "conv_transpose_bn_gelu_forward",
    "conv_transpose_forward",
    "max_pool2x2_backward",
    "relu_conv2d_backward",
    "relu_conv2d_forward",
    "relu_conv2d_residual_backward",
    "relu_conv2d_residual_forward",
    "resize_bicubic_backward",
    "resize_bilinear_backward",
    "tokens_to_map_backward",
]


def _column(x: Array, dtype: Any) -> Array:  # (C,) -> (C, 1, 1)
    return cupy.asarray(x).astype(dtype, copy=False)[:, None, None]


def tokens_to_map_backward(
    g: Array, saved: None, x: Array, grid: tuple[int, int]
) -> tuple[Array, None]:  # (B, D, gh, gw) -> (B, N, D)
    """The map as tokens again; 0 for the CLS token."""
    dx = cupy.zeros(x.shape, g.dtype)
    dx[:, 1:] = g.reshape(*g.shape[:2], -1).transpose(0, 2, 1)
    return dx, None


# Convolutions -------------------------------------------------------------------------------------------------------


def _padded(x: Array, kh: int, kw: int) -> Array:
    return cupy.pad(x, ((0, 0), (0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2)))


def conv2d_forward(x: Array, conv: Any) -> tuple[Array, None]:  # (B, C, h, w) -> (B, out, h, w)
    """The sum over kernel taps of a product with x shifted to the tap; plus the bias."""
    (B, C, h, w), (out, _, kh, kw) = x.shape, conv.weight.shape
    padded, y = _padded(x, kh, kw), cupy.zeros((B, out, h * w), x.dtype)
    for i in range(kh):
        for j in range(kw):
            y += cupy.matmul(conv.weight[:, :, i, j], padded[:, :, i : i + h, j : j + w].reshape(B, C, h * w))
    y = y.reshape(B, out, h, w)
    return (y if conv.bias is None else y + conv.bias[:, None, None]), None


def conv2d_backward(g: Array, saved: None, x: Array, conv: Any) -> tuple[Array, Conv]:
    """As `backward.conv2d_backward`: two products for each kernel tap."""
    (B, C, h, w), (out, _, kh, kw) = x.shape, conv.weight.shape
    padded, d_weight = _padded(x, kh, kw), cupy.empty_like(conv.weight)
    d_padded = cupy.zeros_like(padded)
    flat = g.reshape(B, out, h * w)
    columns = flat.transpose(1, 0, 2).reshape(out, -1)  # (out, B h w)
    for i in range(kh):
        for j in range(kw):
            tap = (slice(None), slice(None), slice(i, i + h), slice(j, j + w))
            d_weight[:, :, i, j] = cupy.matmul(columns, padded[tap].transpose(0, 2, 3, 1).reshape(-1, C))
            d_padded[tap] += cupy.matmul(conv.weight[:, :, i, j].T, flat).reshape(x.shape)
    dx = d_padded[:, :, kh // 2 : kh // 2 + h, kw // 2 : kw // 2 + w]
    return dx, Conv(d_weight, None if conv.bias is None else total(g, PLACES))


def relu_conv2d_forward(x: Array, conv: ReluConv) -> tuple[Array, None]:
    """The convolution of max(0, x)."""
    return conv2d_forward(cupy.maximum(x, 0), conv)


def relu_conv2d_backward(g: Array, saved: None, x: Array, conv: ReluConv) -> tuple[Array, ReluConv]:
    """The backward of the convolution at max(0, x), which lets dx through where x is positive."""
    dx, d = conv2d_backward(g, None, cupy.maximum(x, 0), conv)
    return dx * (x > 0), ReluConv(d.weight, d.bias)


def relu_conv2d_residual_forward(x: Array, conv: ReluConv, gain: float, residual: Array) -> tuple[Array, None]:
    """residual + gain * conv(max(0, x))."""
    return relu_conv2d_forward(x, conv)[0] * x.dtype.type(gain) + residual, None


def relu_conv2d_residual_backward(
    g: Array, saved: None, x: Array, conv: ReluConv, gain: float, residual: Array
) -> tuple[Array, ReluConv, None, Array]:
    """dresidual = g; all else is the backward of `relu_conv2d` at gain * g."""
    return (*relu_conv2d_backward(g * g.dtype.type(gain), None, x, conv), None, g)


def conv_transpose_forward(x: Array, deconv: ConvTranspose) -> tuple[Array, None]:  # -> (B, out, 2h, 2w)
    """One product; its 4 out channels are the 2x2 squares of the result."""
    (B, C, h, w), out = x.shape, deconv.weight.shape[1]
    squares = cupy.matmul(deconv.weight.reshape(C, -1).T, x.reshape(B, C, h * w)).reshape(B, out, 2, 2, h, w)
    y = squares.transpose(0, 1, 4, 2, 5, 3).reshape(B, out, 2 * h, 2 * w)
    return y + deconv.bias[:, None, None], None


def conv_transpose_backward(g: Array, saved: None, x: Array, deconv: ConvTranspose) -> tuple[Array, ConvTranspose]:
    """With G the 2x2 squares of g as 4 out channels: dx = W G,  dW = sum of x G^T,  db = sum of g."""
    (B, C, h, w), out = x.shape, deconv.weight.shape[1]
    squares = g.reshape(B, out, h, 2, w, 2).transpose(0, 2, 4, 1, 3, 5).reshape(-1, out * 4)  # (B h w, out 4)
    pixels = x.transpose(1, 0, 2, 3).reshape(C, -1)
    dx = cupy.matmul(squares, deconv.weight.reshape(C, -1).T).reshape(B, h, w, C).transpose(0, 3, 1, 2)
    return dx, ConvTranspose(cupy.matmul(pixels, squares).reshape(deconv.weight.shape), total(g, PLACES))


# Batch norm ---------------------------------------------------------------------------------------------------------


def _batch_moments(x: Array, reduce: Callable[[Array], Array]) -> Moments:  # (B, C, h, w)
    """As `backward.maps.batch_moments`, without waiting: all numbers, the count too, stay on the device."""
    count = cupy.full(1, x.size / x.shape[1])
    totals = reduce(cupy.concatenate([x.sum(PLACES, dtype=np.float64), count]))
    mean, count = totals[:-1] / totals[-1], totals[-1]
    squares = cupy.square(x - _column(mean, np.float64)).sum(PLACES, dtype=np.float64)
    return Moments(mean, reduce(squares) / count, count, reduce)


def _normalised(x: Array, moments: Moments) -> tuple[Array, Array]:  # -> (B, C, h, w), (C, 1, 1) float64
    r = 1 / cupy.sqrt(_column(moments.var, np.float64) + BATCH_NORM_EPS)
    return (x - _column(moments.mean, x.dtype)) * r.astype(x.dtype), r


def batch_norm_forward(x: Array, bn: BatchNorm, statistics: BatchStatistics | None) -> tuple[Array, Moments]:
    """As `backward.batch_norm_forward`."""
    if statistics is None:
        moments = Moments(bn.running_mean, bn.running_var)
    else:
        moments = statistics.moments(x, bn, _batch_moments)
    return _normalised(x, moments)[0] * bn.weight[:, None, None] + bn.bias[:, None, None], moments


def batch_norm_backward(g: Array, saved: Moments, x: Array, bn: BatchNorm) -> tuple[Array, BatchNorm]:
    """As `backward.batch_norm_backward`."""
    hat, r = _normalised(x, saved)
    d_weight, d_bias = total(g * hat, PLACES), total(g, PLACES)
    d_bn = BatchNorm(d_weight, d_bias, running_mean=None, running_var=None)
    factor = (bn.weight[:, None, None] * r).astype(x.dtype)
    if saved.count is None or saved.reduce is None:
        return g * factor, d_bn
    means = saved.reduce(cupy.concatenate([d_bias, d_weight]).astype(np.float64)) / saved.count
    mean_g, mean_gh = (_column(part, x.dtype) for part in means.reshape(2, -1))
    return (g - mean_g - hat * mean_gh) * factor, d_bn


def conv_bn_relu_forward(
    x: Array, layer: ConvBatchNorm, statistics: BatchStatistics | None = None
) -> tuple[Array, Any]:  # (B, C, h, w) -> (B, out, h, w)
    """max(0, batch norm(conv(x)))."""
    y, _ = conv2d_forward(x, layer.conv)
    z, moments = batch_norm_forward(y, layer.bn, statistics)
    return cupy.maximum(z, 0), (y, moments, z > 0)


def conv_bn_relu_backward(g: Array, saved: Any, x: Array, layer: ConvBatchNorm) -> tuple[Array, ConvBatchNorm]:
    """The chain of its three parts; relu lets g through where its output is positive."""
    y, moments, positive = saved
    dy, d_bn = batch_norm_backward(g * positive, moments, y, layer.bn)
    dx, d_conv = conv2d_backward(dy, None, x, layer.conv)
    return dx, ConvBatchNorm(d_conv, d_bn)


def conv_bn_relu_resized_forward(
    parts: Sequence[Array], layer: ConvBatchNorm, size: tuple[int, int], statistics: BatchStatistics | None = None
) -> tuple[Array, Any]:  # k x (B, Ci, hi, wi) -> (B, out, h, w)
    """`conv_bn_relu` of the concatenation of maps, each resized bilinearly to `size`."""
    x = cupy.concatenate([maps.resize_bilinear(part, size) for part in parts], 1)
    y, saved = conv_bn_relu_forward(x, layer, statistics)
    return y, (x, saved)


def conv_bn_relu_resized_backward(
    g: Array, saved: Any, parts: Sequence[Array], layer: ConvBatchNorm, size: tuple[int, int]
) -> tuple[list[Array], ConvBatchNorm, None]:
    """Every map gets its channels of the convolution's dx, resized back."""
    x, saved = saved
    dx, d_layer = conv_bn_relu_backward(g, saved, x, layer)
    pieces = pieces_of(dx, [part.shape[1] for part in parts], 1)
    return [resize_bilinear_backward(d, None, part, size)[0] for d, part in zip(pieces, parts)], d_layer, None


def _gelu(x: Array) -> Array:
    y = cupy.ascontiguousarray(x).copy()
    bias_activation(y, DeviceLinear(None, None, model_dtype(y)), GELU, "A")
    return y


def conv_transpose_bn_gelu_forward(
    x: Array, deconv: ConvTranspose, bn: BatchNorm, statistics: BatchStatistics | None = None
) -> tuple[Array, Any]:  # (B, C, h, w) -> (B, out, 2h, 2w)
    """gelu(batch norm(conv_transpose(x)))."""
    y, _ = conv_transpose_forward(x, deconv)
    z, moments = batch_norm_forward(y, bn, statistics)
    return _gelu(z), (y, moments, z)


def conv_transpose_bn_gelu_backward(
    g: Array, saved: Any, x: Array, deconv: ConvTranspose, bn: BatchNorm
) -> tuple[Array, ConvTranspose, BatchNorm]:
    """The chain of its three parts."""
    y, moments, z = saved
    wide = z.astype(np.float64)
    distribution = cupy.where(wide == 0, 0.5, _gelu(wide) / cupy.where(wide == 0, 1.0, wide))
    slope = distribution + wide * cupy.exp(-0.5 * wide * wide) / np.sqrt(2 * np.pi)
    dy, d_bn = batch_norm_backward(g * slope.astype(z.dtype), moments, y, bn)
    return (*conv_transpose_backward(dy, None, x, deconv), d_bn)


# Pools and resizing -------------------------------------------------------------------------------------------------


def max_pool2x2_backward(g: Array, saved: None, x: Array) -> tuple[Array]:
    """g where the largest of the square stands, the first of equal ones, row by row; 0 elsewhere."""
    B, C, h, w = x.shape
    h, w = h // 2, w // 2
    inside = x[:, :, : 2 * h, : 2 * w]
    squares = inside.reshape(B, C, h, 2, w, 2).transpose(0, 1, 2, 4, 3, 5).reshape(B, C, h, w, 4)
    d = (cupy.arange(4) == squares.argmax(-1)[..., None]) * g[..., None]
    dx = cupy.zeros_like(x)
    dx[:, :, : 2 * h, : 2 * w] = d.reshape(B, C, h, w, 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(B, C, 2 * h, 2 * w)
    return (dx,)


def adaptive_avg_pool_backward(g: Array, saved: None, x: Array, size: int) -> tuple[Array, None]:
    """dx = R^T g C, R and C being the matrices that take means over cells of rows and columns."""
    return _turned_back(g, x, _cells), None


def resize_bilinear_backward(g: Array, saved: None, x: Array, size: tuple[int, int]) -> tuple[Array, None]:
    """dx = R^T g C, R and C being the matrices that interpolate rows and columns."""
    return _turned_back(g, x, reference.bilinear_taps), None


def resize_bicubic_backward(g: Array, saved: None, x: Array, size: tuple[int, int]) -> tuple[Array, None]:
    """As `resize_bilinear_backward`."""
    return _turned_back(g, x, reference.bicubic_taps), None


def _cells(old: int, new: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The taps of `adaptive_avg_pool` along one axis; a cell with fewer than the most has some of weight 0."""
    first = np.arange(new) * old // new
    count = -(-(np.arange(new) + 1) * old // new) - first
    return [(np.minimum(first + k, old - 1), np.where(k < count, 1 / count, 0.0)) for k in range(count.max())]


def _turned_back(g: Array, x: Array, taps: Callable[..., Any]) -> Array:  # (B, C, new, new) -> (B, C, old, old)
    device = cupy.cuda.runtime.getDevice()
    for axis in (3, 2):
        if x.shape[axis] != g.shape[axis]:
            matrix = _matrix(taps, x.shape[axis], g.shape[axis], g.dtype.name, device)
            g = cupy.matmul(g, matrix) if axis == 3 else cupy.matmul(matrix.T, g)
    return g


@lru_cache(maxsize=64)
def _matrix(taps: Callable[..., Any], old: int, new: int, dtype: str, device: int) -> Array:  # -> (new, old)
    return cupy.asarray(tap_matrix(taps, old, new).astype(dtype))
