"""Ops on feature maps (B, C, h, w)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...params import BATCH_NORM_EPS, BatchNorm, Conv, ConvBatchNorm, ConvTranspose, ReluConv
from ..activations import gelu
from ..low_precision import LOW, FullPart, LowConv, LowDeconv, ShortPart, low_linear
from ..short_winograd import short_conv
from .arrays import concatenate


def conv2d(x: np.ndarray, conv: Conv | ReluConv) -> np.ndarray:  # (B, C, h, w) -> (B, out, h, w)
    """Convolution with odd kernel size k, stride 1, zero padding k // 2: a sum of shifted 1x1 products, one per tap."""
    out, C, kh, kw = conv.weight.shape
    B, _, h, w = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2))) if kh * kw > 1 else x
    y = np.zeros((B, out, h * w), x.dtype)
    for i in range(kh):
        for j in range(kw):
            y += conv.weight[:, :, i, j] @ padded[:, :, i : i + h, j : j + w].reshape(B, C, h * w)
    if conv.bias is not None:
        y += conv.bias[:, None]
    return y.reshape(B, out, h, w)


def relu_conv2d(x: np.ndarray, conv: ReluConv) -> np.ndarray:  # (B, C, h, w) -> (B, out, h, w)
    """conv2d(max(0, x))."""
    return conv2d(np.maximum(x, 0), conv)


def relu_conv2d_residual(
    x: np.ndarray, conv: ReluConv, gain: float, residual: np.ndarray
) -> np.ndarray:  # (B, C, h, w) -> (B, out, h, w)
    """residual + gain * conv2d(max(0, x)), the last step of a tokenizer's block.  `residual` has the result's shape."""
    y = relu_conv2d(x, conv)
    y *= x.dtype.type(gain)
    y += residual
    return y


def conv2d_one_hot(ids: np.ndarray, conv: Conv) -> np.ndarray:  # (B, h, w) -> (B, out, h, w)
    """The 1x1 convolution of a map of V channels that is 1 at channel ids[b, i, j] and 0 elsewhere.

    That is column ids[b, i, j] of the weight (out, V, 1, 1), plus the bias.  `ids` are integers from 0 to V - 1.
    """
    y = conv.weight[:, :, 0, 0].T[ids]  # (B, h, w, out)
    if conv.bias is not None:
        y += conv.bias
    return y.transpose(0, 3, 1, 2)


def batch_norm(x: np.ndarray, bn: BatchNorm) -> np.ndarray:  # (B, C, h, w) -> (B, C, h, w)
    """(x - running_mean) / sqrt(running_var + 1e-5) * weight + bias per channel, as in inference."""
    scale = bn.weight / np.sqrt(bn.running_var + x.dtype.type(BATCH_NORM_EPS))
    y = x - bn.running_mean[:, None, None]
    y *= scale[:, None, None]
    y += bn.bias[:, None, None]
    return y


def conv_bn_relu(x: np.ndarray, layer: ConvBatchNorm) -> np.ndarray:  # (B, C, h, w) -> (B, out, h, w)
    """max(0, batch norm(conv(x)))."""
    if isinstance(layer, LOW):
        return np.maximum(_on_pixels(x, layer), 0)
    if isinstance(layer, LowConv):
        return _low_conv_resized([x], layer, (x.shape[2], x.shape[3]))
    y = batch_norm(conv2d(x, layer.conv), layer.bn)
    return np.maximum(y, 0, out=y)


def conv_bn_relu_resized(
    maps: Sequence[np.ndarray], layer: ConvBatchNorm, size: tuple[int, int]
) -> np.ndarray:  # k x (B, Ci, hi, wi) -> (B, out, h, w)
    """`conv_bn_relu` of the concatenation of `maps`, each resized bilinearly to `size`.

    One op, so that a fast backend can convolve the small maps before it enlarges them: the taps' 1x1 products and
    resizing commute.
    """
    if isinstance(layer, LowConv):
        return _low_conv_resized(maps, layer, size)
    return conv_bn_relu(concatenate([resize_bilinear(x, size) for x in maps], axis=1), layer)


def _on_pixels(x: np.ndarray, layer: Any) -> np.ndarray:  # (B, C, h, w) -> (B, out, h, w)
    return low_linear(x.transpose(0, 2, 3, 1), layer).transpose(0, 3, 1, 2)


def _low_conv_resized(maps: Sequence[np.ndarray], layer: LowConv, size: tuple[int, int]) -> np.ndarray:
    """Parts of low precision at the size of their own map, nine taps each, which are enlarged, shifted and summed."""
    (h, w), out = size, len(layer.bias)
    y = np.zeros((maps[0].shape[0], out, h, w), maps[0].dtype)
    for x, part in zip(maps, layer.parts, strict=True):
        if isinstance(part, FullPart):
            weight, same_size = part.weight * part.scale[:, None, None, None], resize_bilinear(x, size)
            short = isinstance(part, ShortPart)
            y += short_conv(same_size, weight) if short else conv2d(same_size, Conv(weight, None))
            continue
        taps = _on_pixels(x, part)
        for tap in range(9):
            product = resize_bilinear(taps[:, tap * out : (tap + 1) * out], size)
            i, j = tap // 3, tap % 3
            y += np.pad(product, ((0, 0), (0, 0), (1, 1), (1, 1)))[:, :, i : i + h, j : j + w]
    return np.maximum(y + layer.bias[:, None, None], 0)


def conv_transpose(x: np.ndarray, deconv: ConvTranspose) -> np.ndarray:  # (B, C, h, w) -> (B, out, 2h, 2w)
    """Transposed convolution, kernel 2, stride 2: every pixel becomes a separate 2x2 square."""
    B, C, h, w = x.shape
    if isinstance(deconv, LowDeconv):
        corners = np.stack([_on_pixels(x, layer) for layer in deconv.corners])  # (4, B, out, h, w)
        y = corners.reshape(2, 2, B, -1, h, w).transpose(2, 3, 4, 0, 5, 1)  # (B, out, h, 2, w, 2)
        return y.reshape(B, -1, 2 * h, 2 * w)
    out = deconv.weight.shape[1]
    y = deconv.weight.reshape(C, -1).T @ x.reshape(B, C, h * w)  # (B, out * 4, h w)
    y = y.reshape(B, out, 2, 2, h, w).transpose(0, 1, 4, 2, 5, 3)  # (B, out, h, 2, w, 2)
    return y.reshape(B, out, 2 * h, 2 * w) + deconv.bias[:, None, None]


def conv_transpose_bn_gelu(
    x: np.ndarray, deconv: ConvTranspose, bn: BatchNorm
) -> np.ndarray:  # (B, C, h, w) -> (B, out, 2h, 2w)
    """gelu(batch norm(conv_transpose(x)))."""
    y = conv_transpose(x, deconv)
    return gelu(y if isinstance(deconv, LowDeconv) else batch_norm(y, bn))


def max_pool2x2(x: np.ndarray) -> np.ndarray:  # (B, C, h, w) -> (B, C, h // 2, w // 2)
    """The largest element of every 2x2 square; an odd last row or column is dropped."""
    B, C, h, w = x.shape
    return x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(B, C, h // 2, 2, w // 2, 2).max((3, 5))


def upsample2x2(x: np.ndarray) -> np.ndarray:  # (B, C, h, w) -> (B, C, 2h, 2w)
    """Every pixel four times, as a 2x2 square."""
    return x.repeat(2, axis=2).repeat(2, axis=3)


def adaptive_avg_pool(x: np.ndarray, size: int) -> np.ndarray:  # (B, C, h, w) -> (B, C, size, size)
    """Means over size x size cells.  Along an axis of length n cell i spans floor(i n / size) to
    ceil((i + 1) n / size), so cells may overlap.
    """
    B, C, h, w = x.shape
    y = np.empty((B, C, size, size), x.dtype)
    for i in range(size):
        for j in range(size):
            rows = slice(i * h // size, -(-(i + 1) * h // size))
            columns = slice(j * w // size, -(-(j + 1) * w // size))
            y[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return y


def resize_bilinear(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:  # (B, C, h, w) -> (B, C, *size)
    """Bilinear interpolation, pixel centres at half integers (align_corners=False), no antialiasing.

    Target i reads the source at max(0, (i + 1/2) old / new - 1/2).
    """
    return interpolated(x, size, bilinear_taps)


def resize_bicubic(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:  # (B, C, h, w) -> (B, C, *size)
    """Bicubic convolution with A = -0.75, align_corners=False, no antialiasing, edges repeated.

    Source: Keys 1981; A as in PyTorch's interpolate.
    """
    return interpolated(x, size, bicubic_taps)


def interpolated(
    x: np.ndarray, size: tuple[int, int], taps: Callable[[int, int], list[tuple[np.ndarray, np.ndarray]]]
) -> np.ndarray:  # (B, C, h, w) -> (B, C, *size)
    """Interpolates along rows, then along columns: each target is the weighted sum of sources given by `taps`."""
    for axis, new in ((2, size[0]), (3, size[1])):
        old = x.shape[axis]
        if old == new:
            continue
        shape = [1, 1, 1, 1]
        shape[axis] = new
        parts = (np.take(x, index, axis) * weight.astype(x.dtype).reshape(shape) for index, weight in taps(old, new))
        y = next(parts)
        for part in parts:
            y += part
        x = y
    return x


def bilinear_taps(old: int, new: int) -> list[tuple[np.ndarray, np.ndarray]]:  # 2 x ((new,), (new,))
    """For each tap of `resize_bilinear` along one axis: (index of the source, its weight) for every target."""
    position = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    first = position.astype(int)
    t = position - first
    return [(first, 1 - t), (np.minimum(first + 1, old - 1), t)]


def bicubic_taps(old: int, new: int) -> list[tuple[np.ndarray, np.ndarray]]:  # 4 x ((new,), (new,))
    """For each tap of `resize_bicubic` along one axis: (index of the source, its weight) for every target."""
    A = -0.75
    position = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(position).astype(int)
    taps = []
    for step in (-1, 0, 1, 2):
        s = np.abs(position - first - step)  # distance to the source
        near = ((A + 2) * s - (A + 3)) * s * s + 1
        far = ((A * s - 5 * A) * s + 8 * A) * s - 4 * A
        taps.append((np.clip(first + step, 0, old - 1), np.where(s <= 1, near, far)))
    return taps
