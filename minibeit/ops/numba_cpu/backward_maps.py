"""Forward and backward of the ops on maps in training, on plain float32 parameters and any batch norm.

What a forward keeps is a `Kept`; the NumPy definition serves what the kernels cannot, and knows its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np

from ...params import BATCH_NORM_EPS, BatchNorm, Conv, ConvBatchNorm, ConvTranspose
from .. import backward as reference
from ..backward.maps import BatchStatistics, Moments, batch_moments
from . import gemm
from .arguments import PLAIN
from .backward import linear_backward
from .gradient_arguments import COMBINE_DERIVATIVE, COMBINE_GELU
from .gradients import combined
from .map_gradients import (
    Vectors,
    convolution_input_gradient,
    convolution_weight_gradient,
    convolved,
    enlarged_gradients,
    normalised,
    normalised_backward,
    shrunk,
    sums_of_cotangents,
    sums_of_squares,
    sums_of_values,
    transposed_gradients,
)
from .maps import PackedConv, conv_3x3, conv_transpose_2x2, to_channels_first, to_channels_last
from .prepare import is_float32, pack_conv_3x3, pack_deconv, pack_linear
from .queue import synchronous
from .target import LANES, NR

__all__ = [
    "conv_bn_relu_backward",
    "conv_bn_relu_forward",
    "conv_bn_relu_resized_backward",
    "conv_bn_relu_resized_forward",
    "conv_transpose_backward",
    "conv_transpose_bn_gelu_backward",
    "conv_transpose_bn_gelu_forward",
    "resize_bilinear_backward",
]


@dataclass(frozen=True)
class Kept:
    """What a batch norm's backward needs: its input, channels last, and what it subtracted and divided by."""

    y: np.ndarray  # (B, h, w, out)
    moments: Moments


@synchronous
def conv_bn_relu_forward(
    x: np.ndarray, layer: ConvBatchNorm, statistics: BatchStatistics | None = None
) -> tuple[np.ndarray, Any]:
    """See `reference.conv_bn_relu_forward`."""
    if not _fits(layer, x):
        return reference.conv_bn_relu_forward(x, layer, statistics)
    source = to_channels_last(x)
    if layer.conv.weight.shape[2:] == (1, 1):
        y = gemm.product(source, pack_linear([layer.conv], False))
    else:
        y = convolved(source, layer.conv.weight)
    return _normalise(y, layer.bn, statistics, relu=True)


@synchronous
def conv_bn_relu_backward(
    g: np.ndarray, saved: Any, x: np.ndarray, layer: ConvBatchNorm
) -> tuple[np.ndarray, ConvBatchNorm]:
    """See `reference.conv_bn_relu_backward`."""
    if not isinstance(saved, Kept):
        return reference.conv_bn_relu_backward(g, saved, x, layer)
    dy, d_bn = _normalise_backward(to_channels_last(g), saved, layer.bn, relu=True)
    source = to_channels_last(x)
    if layer.conv.weight.shape[2:] == (1, 1):
        dx, d_conv = linear_backward(dy, None, source, layer.conv)
    else:
        dx = convolution_input_gradient(dy, layer.conv.weight)
        d_conv = Conv(convolution_weight_gradient(dy, source), None)
    return to_channels_first(dx), ConvBatchNorm(d_conv, d_bn)


@synchronous
def conv_bn_relu_resized_forward(
    maps: Sequence[np.ndarray], layer: ConvBatchNorm, size: tuple[int, int], statistics: BatchStatistics | None = None
) -> tuple[np.ndarray, Any]:
    """See `reference.conv_bn_relu_resized_forward`; small maps are multiplied first and enlarged after."""
    if not _fits_maps(maps, layer):
        return reference.conv_bn_relu_resized_forward(maps, layer, size, statistics)
    full = len(list(takewhile(lambda x: x.shape[2:] == tuple(size), maps)))
    parts = pack_conv_3x3(ConvBatchNorm(layer.conv, None), False, full)  # type: ignore[arg-type]
    assert isinstance(parts, PackedConv)
    y = to_channels_last(conv_3x3(maps, parts, (size[0], size[1]), relu=False))
    return _normalise(y, layer.bn, statistics, relu=True)


@synchronous
def conv_bn_relu_resized_backward(
    g: np.ndarray, saved: Any, maps: Sequence[np.ndarray], layer: ConvBatchNorm, size: tuple[int, int]
) -> tuple[list[np.ndarray], ConvBatchNorm, None]:
    """See `reference.conv_bn_relu_resized_backward`; small maps are multiplied at their own size."""
    if not isinstance(saved, Kept):
        return reference.conv_bn_relu_resized_backward(g, saved, maps, layer, size)
    dy, d_bn = _normalise_backward(to_channels_last(g), saved, layer.bn, relu=True)
    weight, first, cotangents = layer.conv.weight, 0, []
    dw = np.empty_like(weight)
    for x in maps:
        share, source = slice(first, first + x.shape[1]), to_channels_last(x)
        if x.shape[2:] == tuple(size):
            dx = convolution_input_gradient(dy, weight[:, share])
            dw[:, share] = convolution_weight_gradient(dy, source)
        else:
            dx, dw[:, share] = enlarged_gradients(dy, source, weight[:, share])
        cotangents.append(to_channels_first(dx))
        first = share.stop
    return cotangents, ConvBatchNorm(Conv(dw, None), d_bn), None


@synchronous
def conv_transpose_backward(
    g: np.ndarray, saved: None, x: np.ndarray, deconv: ConvTranspose
) -> tuple[np.ndarray, ConvTranspose]:
    """See `reference.conv_transpose_backward`."""
    if not is_float32(g, x, deconv.weight, deconv.bias) or not x.size:
        return reference.conv_transpose_backward(g, None, x, deconv)
    dx, dw, sums = transposed_gradients(to_channels_last(g), to_channels_last(x), deconv.weight)
    return to_channels_first(dx), ConvTranspose(dw, sums)


@synchronous
def conv_transpose_bn_gelu_forward(
    x: np.ndarray, deconv: ConvTranspose, bn: BatchNorm, statistics: BatchStatistics | None = None
) -> tuple[np.ndarray, Any]:
    """See `reference.conv_transpose_bn_gelu_forward`."""
    fits = is_float32(x, deconv.weight, deconv.bias, *_arrays(bn)) and deconv.weight.shape[1] % LANES == 0
    if not fits or not x.size:
        return reference.conv_transpose_bn_gelu_forward(x, deconv, bn, statistics)
    y = to_channels_last(conv_transpose_2x2(x, pack_deconv(deconv, None, False), PLAIN))
    z, kept = _normalise(y, bn, statistics, relu=False)
    last = to_channels_last(z)
    return to_channels_first(combined(last, last, COMBINE_GELU)), (kept, last)


@synchronous
def conv_transpose_bn_gelu_backward(
    g: np.ndarray, saved: Any, x: np.ndarray, deconv: ConvTranspose, bn: BatchNorm
) -> tuple[np.ndarray, ConvTranspose, BatchNorm]:
    """See `reference.conv_transpose_bn_gelu_backward`."""
    if not isinstance(saved[0], Kept):
        return reference.conv_transpose_bn_gelu_backward(g, saved, x, deconv, bn)
    kept, z = saved
    dy, d_bn = _normalise_backward(combined(to_channels_last(g), z, COMBINE_DERIVATIVE), kept, bn, relu=False)
    return (*conv_transpose_backward(to_channels_first(dy), None, x, deconv), d_bn)


@synchronous
def resize_bilinear_backward(
    g: np.ndarray, saved: None, x: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, None]:
    """See `reference.resize_bilinear_backward`; channels that fill no whole vector are filled up."""
    if not is_float32(g, x) or not x.size:
        return reference.resize_bilinear_backward(g, None, x, size)
    C, last = x.shape[1], to_channels_last(g)
    if C % LANES:
        last = np.pad(last, ((0, 0), (0, 0), (0, 0), (0, -C % LANES)))
    return to_channels_first(shrunk(last, x.shape[2:]))[:, :C], None


# Batch norm ---------------------------------------------------------------------------------------------------------


def _normalise(
    y: np.ndarray, bn: BatchNorm, statistics: BatchStatistics | None, relu: bool
) -> tuple[np.ndarray, Kept]:  # (B, h, w, C) -> (B, C, h, w)
    if statistics is None:
        moments = Moments(bn.running_mean, bn.running_var)
    else:
        moments = statistics.moments(to_channels_first(y), bn, partial(batch_moments, sums=_channel_sums))
    z = normalised(y, _forward_vectors(moments, bn), relu)
    return to_channels_first(z), Kept(y, moments)


def _channel_sums(x: np.ndarray, mean: np.ndarray | None) -> np.ndarray:  # (B, C, h, w), (C,) -> (C,)
    y = to_channels_last(x)
    if mean is None:
        return sums_of_values(y)
    # From the mean in float32, which is all the kernel takes; what that leaves out is a constant of the channel.
    near = mean.astype(np.float32)
    count = y.size / y.shape[3]
    return sums_of_squares(y, near) - count * np.square(mean - near)


def _forward_vectors(moments: Moments, bn: BatchNorm) -> Vectors:
    r = 1 / np.sqrt(moments.var.astype(np.float64) + BATCH_NORM_EPS)
    mean = moments.mean.astype(np.float32)
    bias = bn.bias + (mean - moments.mean) * r * bn.weight
    return mean, (r * bn.weight).astype(np.float32), bias.astype(np.float32)


def _normalise_backward(
    g: np.ndarray, kept: Kept, bn: BatchNorm, relu: bool
) -> tuple[np.ndarray, BatchNorm]:  # (B, h, w, C)
    """See `reference.batch_norm_backward`, whose last form is g factor + (x - mean) slope + offset."""
    moments, vectors = kept.moments, _forward_vectors(kept.moments, bn)
    mean, r = vectors[0].astype(np.float64), 1 / np.sqrt(moments.var.astype(np.float64) + BATCH_NORM_EPS)
    sums, products = sums_of_cotangents(kept.y, g, vectors, relu)
    hats = (products + (mean - moments.mean) * sums) * r
    d_bn = BatchNorm(hats.astype(np.float32), sums.astype(np.float32), running_mean=None, running_var=None)
    factor = bn.weight * r
    slope, offset = np.zeros_like(factor), np.zeros_like(factor)
    if moments.count is not None and moments.reduce is not None:
        mean_g, mean_gh = np.split(moments.reduce(np.concatenate([sums, hats])) / moments.count, 2)
        slope = -factor * mean_gh * r
        offset = -factor * mean_g + slope * (mean - moments.mean)
    return normalised_backward(kept.y, g, vectors, (factor, slope, offset), relu), d_bn


# What the kernels serve ---------------------------------------------------------------------------------------------


def _fits(layer: ConvBatchNorm, x: np.ndarray) -> bool:
    """1x1 and 3x3 convolutions without a bias, of so many channels that vectors or panels are whole."""
    weight = layer.conv.weight
    if not is_float32(x, weight, *_arrays(layer.bn)) or layer.conv.bias is not None or not x.size:
        return False
    out, channels, *window = weight.shape
    if window == [1, 1]:
        return out % LANES == 0
    return window == [3, 3] and out % NR == 0 and channels % NR == 0


def _fits_maps(maps: Sequence[np.ndarray], layer: ConvBatchNorm) -> bool:
    """Maps that each have as many channels as the layer has outputs, those of full size first, see `pack_conv_3x3`."""
    weight = layer.conv.weight
    return weight.shape[2:] == (3, 3) and all(_fits(layer, x) and x.shape[1] == len(weight) for x in maps)


def _arrays(bn: BatchNorm) -> tuple[Any, ...]:
    return bn.weight, bn.bias, bn.running_mean, bn.running_var
