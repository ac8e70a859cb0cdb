"""Ops on feature maps.  A map is (B, C, h, w) to the caller and channels-last, (B, h, w, C), in memory.

A convolution is a sum over taps t of shifted 1x1 products, and enlarging acts on each channel alone, so
conv(enlarge(x)) = sum_t shift_t(enlarge(W_t x)): small maps are multiplied before they are enlarged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from . import winograd
from .device import cupy
from .gemm import product
from .kernels import (
    GELU,
    PLAIN,
    RELU,
    along_rows,
    compute_dtype,
    model_dtype,
    or_null,
    over_channels,
    to_compute,
    to_storage,
)
from .prepare import DeviceBatchNorm, DeviceConv, DeviceDeconv, DeviceLinear

Array = Any
WORK_BYTES = 1 << 30  # limit for the products of a convolution in memory at a time


def conv2d(x: Array, conv: DeviceLinear) -> Array:  # (B, C, h, w) -> (B, out, h, w)
    """See `reference.conv2d`, for square kernels."""
    side, (out, length) = conv.kernel[0], conv.weight.shape
    taps = conv.weight.reshape(out, length // side**2, side**2).transpose(2, 0, 1)
    return _convolve(x, cupy.ascontiguousarray(taps), conv.bias, PLAIN, conv.dtype)


def relu_conv2d(x: Array, conv: DeviceConv) -> Array:  # (B, C, h, w) -> (B, out, h, w)
    """See `reference.relu_conv2d`."""
    source = cupy.maximum(last(x, conv.dtype), 0)
    if conv.winograd is None:
        return _convolve(first(source), conv.taps, conv.bias, PLAIN, conv.dtype)
    y = cupy.empty((*source.shape[:3], conv.taps.shape[1]), source.dtype)
    winograd.convolve(source, conv.winograd, conv.bias, y, False, PLAIN)
    return first(y)


def relu_conv2d_residual(
    x: Array, conv: DeviceConv, gain: float, residual: Array
) -> Array:  # (B, C, h, w) -> (B, out, h, w)
    """See `reference.relu_conv2d_residual`."""
    return relu_conv2d(x, conv) * gain + residual


def conv2d_one_hot(ids: Array, conv: DeviceLinear) -> Array:  # (B, h, w) -> (B, out, h, w)
    """See `reference.conv2d_one_hot`."""
    y = to_compute(conv.weight[:, ids], conv.dtype).transpose(1, 0, 2, 3)
    return y if conv.bias is None else y + conv.bias[:, None, None]


def conv_bn_relu(x: Array, layer: DeviceConv) -> Array:  # (B, C, h, w) -> (B, out, h, w)
    """See `reference.conv_bn_relu`; the batch norm was folded into the weights."""
    if layer.side == 1:
        return _convolve(x, layer.taps, layer.bias, RELU, layer.dtype)
    return conv_bn_relu_resized([x], layer, (x.shape[2], x.shape[3]))


def _convolve(x: Array, taps: Array, bias: Array | None, kind: int, dtype: str) -> Array:
    source = last(x, dtype)
    B, h, w, C = source.shape
    y = cupy.empty((B, h, w, taps.shape[1]), source.dtype)
    if len(taps) > 1:
        _by_taps(source, taps, bias, y, False, kind, dtype)
    else:
        product(to_storage(source, dtype).reshape(-1, C), taps[0], y.reshape(-1, y.shape[3]))
        along_rows("bias_activation", dtype, B * h * w, y.shape[3], y, or_null(bias), y.shape[3], kind, suffix=", A")
    return first(y)


def conv_bn_relu_resized(
    maps: Sequence[Array], layer: DeviceConv, size: tuple[int, int]
) -> Array:  # k x (B, Ci, hi, wi) -> (B, out, h, w)
    """See `reference.conv_bn_relu_resized`.  Raises ValueError if the maps' channels do not match the layer."""
    channels = [x.shape[1] for x in maps]
    if sum(channels) != layer.taps.shape[2]:
        raise ValueError(f"conv_bn_relu_resized: expected {layer.taps.shape[2]} channels, found maps of {channels}")
    out, (h, w) = layer.taps.shape[1], size
    y = cupy.empty((maps[0].shape[0], h, w, out), compute_dtype(layer.dtype))
    done = 0
    for i, x in enumerate(maps):
        share = slice(done, done + x.shape[1])
        done = share.stop
        bias, kind, add = layer.bias if i == 0 else None, RELU if i == len(maps) - 1 else PLAIN, i > 0
        source, taps = last(x, layer.dtype), layer.taps[:, :, share]
        if source.shape[1:3] != (h, w):
            _enlarged(source, taps, bias, y, add, kind, layer.dtype)
        elif layer.winograd is not None and share.stop <= layer.winograd.shape[2]:
            winograd.convolve(source, layer.winograd[:, :, share], bias, y, add, kind)
        else:
            _by_taps(source, taps, bias, y, add, kind, layer.dtype)
    return first(y)


def _by_taps(x: Array, taps: Array, bias: Array | None, y: Array, add: bool, kind: int, dtype: str) -> None:
    """y = f(conv(x) + bias), or f(y + conv(x)) if `add`.

    x is padded with zeros; each tap is one accumulating product with the padded map shifted to the tap's position.  The
    last columns of every row of the result are garbage, which `finish_padded` leaves out.
    """
    B, h, w, C = x.shape
    side, out = round(len(taps) ** 0.5), taps.shape[1]
    border = side // 2
    across, down = w + 2 * border, h + 2 * border
    for images in _images(B, across * down * (C + out) * x.itemsize):
        rows = len(x[images]) * across * down
        padded, z = cupy.empty((rows, C), taps.dtype), cupy.empty((rows, out), y.dtype)
        along_rows("pad", dtype, rows, C, x[images], padded, h, w, C, border)
        count = rows - 2 * border * (across + 1)
        for t, weight in enumerate(taps):
            start = t // side * across + t % side
            product(padded[start : start + count], weight, z[:count], accumulate=t > 0)
        along_rows(
            "finish_padded", dtype, len(x[images]) * h * w, out,
            z, or_null(bias), y[images], h, w, out, border, int(add), kind,
        )  # fmt: skip


def _enlarged(x: Array, taps: Array, bias: Array | None, y: Array, add: bool, kind: int, dtype: str) -> None:
    """y = f(conv(enlarge(x)) + bias), or f(y + conv(enlarge(x))) if `add`; x is enlarged to y's size."""
    B, old_h, old_w, C = x.shape
    side, (h, w, out) = round(len(taps) ** 0.5), y.shape[1:]
    weight = taps.reshape(-1, C)  # a view: rows have one stride across all taps
    for images in _images(B, old_h * old_w * len(weight) * y.itemsize):
        count = len(x[images])
        z = cupy.empty((count * old_h * old_w, len(weight)), y.dtype)
        product(to_storage(x[images], dtype).reshape(-1, C), weight, z)
        along_rows(
            "spread", dtype, count * h * w, out,
            z, or_null(bias), y[images], old_h, old_w, h, w, out, old_h / h, old_w / w, side, int(add), kind,
        )  # fmt: skip


def conv_transpose(x: Array, deconv: DeviceDeconv) -> Array:  # (B, C, h, w) -> (B, out, 2h, 2w)
    """See `reference.conv_transpose`."""
    return _conv_transpose(x, deconv, 0, 0, PLAIN)


def conv_transpose_bn_gelu(
    x: Array, deconv: DeviceDeconv, bn: DeviceBatchNorm
) -> Array:  # (B, C, h, w) -> (B, out, 2h, 2w)
    """See `reference.conv_transpose_bn_gelu`."""
    return _conv_transpose(x, deconv, bn.scale, bn.shift, GELU)


def _conv_transpose(x: Array, deconv: DeviceDeconv, scale: Any, shift: Any, kind: int) -> Array:
    source = to_storage(last(x, deconv.dtype), deconv.dtype)
    B, h, w, C = source.shape
    out = len(deconv.bias)
    corners = cupy.empty((B * h * w, 4 * out), compute_dtype(deconv.dtype))
    product(source.reshape(-1, C), deconv.weight, corners)
    y = cupy.empty((B, 2 * h, 2 * w, out), corners.dtype)
    args = (corners, deconv.bias, scale, shift, y, h, w, out, kind)
    along_rows("interleave", deconv.dtype, B * 4 * h * w, out, *args)
    return first(y)


def max_pool2x2(x: Array) -> Array:  # (B, C, h, w) -> (B, C, h // 2, w // 2)
    """See `reference.max_pool2x2`."""
    source, dtype = _plain(x)
    B, h, w, C = source.shape
    y = cupy.empty((B, h // 2, w // 2, C), source.dtype)
    along_rows("max_pool", dtype, B * (h // 2) * (w // 2), C, source, y, h, w, C)
    return first(y)


def upsample2x2(x: Array) -> Array:  # (B, C, h, w) -> (B, C, 2h, 2w)
    """See `reference.upsample2x2`."""
    source, _ = _plain(x)
    B, h, w, C = source.shape
    y = cupy.empty((B, 2 * h, 2 * w, C), source.dtype)
    for row in (0, 1):
        for column in (0, 1):
            y[:, row::2, column::2] = source
    return first(y)


def adaptive_avg_pool(x: Array, size: int) -> Array:  # (B, C, h, w) -> (B, C, size, size)
    """See `reference.adaptive_avg_pool`."""
    source, dtype = _plain(x)
    B, h, w, C = source.shape
    y = cupy.empty((B, size, size, C), source.dtype)
    over_channels("average_pool", dtype, B * size * size, C, source, y, h, w, C, size)
    return first(y)


def resize_bilinear(x: Array, size: tuple[int, int]) -> Array:  # (B, C, h, w) -> (B, C, *size)
    """See `reference.resize_bilinear`."""
    return _resize(x, size, 2)


def resize_bicubic(x: Array, size: tuple[int, int]) -> Array:  # (B, C, h, w) -> (B, C, *size)
    """See `reference.resize_bicubic`."""
    return _resize(x, size, 4)


def _resize(x: Array, size: tuple[int, int], taps: int) -> Array:
    source, dtype = _plain(x)
    B, old_h, old_w, C = source.shape
    h, w = size
    y = cupy.empty((B, h, w, C), source.dtype)
    args = (source, y, old_h, old_w, h, w, C, old_h / h, old_w / w)
    along_rows("resize", dtype, B * h * w, C, *args, suffix=f", {taps}")
    return first(y)


def last(x: Array, dtype: str) -> Array:  # (B, C, h, w) -> (B, h, w, C)
    """The map channels-last and contiguous; copied only if it is not."""
    return to_compute(x.transpose(0, 2, 3, 1), dtype)


def first(y: Array) -> Array:  # (B, h, w, C) -> (B, C, h, w)
    """The map as callers see it; the memory stays as it is."""
    return y.transpose(0, 3, 1, 2)


def _plain(x: Array) -> tuple[Array, str]:
    """A map channels-last, and the dtype whose kernels to use, for ops without weights."""
    dtype = model_dtype(x)
    source = last(x, dtype)
    return source, source.dtype.name


def _images(B: int, bytes_each: int) -> Iterator[slice]:
    """Slices of the batch, with as many images at a time as WORK_BYTES allows."""
    count = max(1, WORK_BYTES // max(bytes_each, 1))
    return (slice(start, min(start + count, B)) for start in range(0, B, count))
