"""Backward of the ops on maps (B, C, h, w), and the forms of batch norm that training needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...params import BATCH_NORM_EPS, BatchNorm, Conv, ConvBatchNorm, ConvTranspose, ReluConv
from .. import reference
from ..activations import gelu
from .activations import derivative
from .arrays import pieces_of, total

__all__ = [
    "adaptive_avg_pool_backward",
    "batch_norm_backward",
    "batch_norm_forward",
    "conv2d_backward",
    "conv2d_one_hot_backward",
    "conv_bn_relu_backward",
    "conv_bn_relu_forward",
    "conv_bn_relu_resized_backward",
    "conv_bn_relu_resized_forward",
    "conv_transpose_backward",
    "conv_transpose_bn_gelu_backward",
    "conv_transpose_bn_gelu_forward",
    "max_pool2x2_backward",
    "relu_conv2d_backward",
    "relu_conv2d_residual_backward",
    "resize_bicubic_backward",
    "resize_bilinear_backward",
    "upsample2x2_backward",
]

PLACES = (0, 2, 3)  # the axes of a map over which a channel is summed
Reduce = Callable[[np.ndarray], np.ndarray]  # adds an array up over all ranks; for one rank the identity
ChannelSums = Callable[[np.ndarray, "np.ndarray | None"], np.ndarray]  # as `channel_sums`


# Convolutions -------------------------------------------------------------------------------------------------------


def conv2d_backward(
    g: np.ndarray, saved: None, x: np.ndarray, conv: Conv | ReluConv
) -> tuple[np.ndarray, Conv]:  # (B, out, h, w) -> (B, C, h, w), the layer
    """For each kernel tap (i, j), X being x shifted to it: dW[:, :, i, j] = sum of g X^T, and W[:, :, i, j]^T g is
    added to dx where X came from; db = sum of g."""
    out, C, kh, kw = conv.weight.shape
    B, _, h, w = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2)))
    d_padded, d_weight = np.zeros_like(padded), np.empty_like(conv.weight)
    columns = g.transpose(1, 0, 2, 3).reshape(out, -1)  # (out, B h w)
    for i in range(kh):
        for j in range(kw):
            tap = (slice(None), slice(None), slice(i, i + h), slice(j, j + w))
            d_weight[:, :, i, j] = columns @ padded[tap].transpose(0, 2, 3, 1).reshape(-1, C)
            d_padded[tap] += (conv.weight[:, :, i, j].T @ g.reshape(B, out, h * w)).reshape(x.shape)
    dx = d_padded[:, :, kh // 2 : kh // 2 + h, kw // 2 : kw // 2 + w]
    return dx, Conv(d_weight, None if conv.bias is None else total(g, PLACES))


def relu_conv2d_backward(
    g: np.ndarray, saved: None, x: np.ndarray, conv: ReluConv
) -> tuple[np.ndarray, ReluConv]:  # (B, out, h, w) -> (B, C, h, w), the layer
    """The backward of the convolution at max(0, x), which lets dx through where x is positive."""
    dx, d = conv2d_backward(g, None, np.maximum(x, 0), conv)
    return dx * (x > 0), ReluConv(d.weight, d.bias)


def relu_conv2d_residual_backward(
    g: np.ndarray, saved: None, x: np.ndarray, conv: ReluConv, gain: float, residual: np.ndarray
) -> tuple[np.ndarray, ReluConv, None, np.ndarray]:
    """dresidual = g; all else is the backward of `relu_conv2d` at gain * g."""
    return (*relu_conv2d_backward(g * g.dtype.type(gain), None, x, conv), None, g)


def conv2d_one_hot_backward(
    g: np.ndarray, saved: None, ids: np.ndarray, conv: Conv
) -> tuple[None, Conv]:  # (B, out, h, w) -> the layer
    """Column v of dW = sum of g over the pixels whose id is v;  db = sum of g."""
    sums = np.zeros((conv.weight.shape[1], conv.weight.shape[0]))  # (V, out), float64
    np.add.at(sums, ids, g.transpose(0, 2, 3, 1))
    d_weight = np.ascontiguousarray(sums.T, g.dtype).reshape(conv.weight.shape)
    return None, Conv(d_weight, None if conv.bias is None else total(g, PLACES))


def conv_transpose_backward(
    g: np.ndarray, saved: None, x: np.ndarray, deconv: ConvTranspose
) -> tuple[np.ndarray, ConvTranspose]:  # (B, out, 2h, 2w) -> (B, C, h, w), the layer
    """With G the 2x2 squares of g as 4 out channels: dx = W G,  dW = sum of x G^T,  db = sum of g."""
    B, C, h, w = x.shape
    out = deconv.weight.shape[1]
    squares = g.reshape(B, out, h, 2, w, 2).transpose(0, 2, 4, 1, 3, 5).reshape(-1, out * 4)  # (B h w, out 4)
    pixels = x.transpose(0, 2, 3, 1).reshape(-1, C)
    weight = deconv.weight.reshape(C, -1)
    dx = (squares @ weight.T).reshape(B, h, w, C).transpose(0, 3, 1, 2)
    return dx, ConvTranspose((pixels.T @ squares).reshape(deconv.weight.shape), total(g, PLACES))


# Batch norm ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """What a batch norm subtracted and divided by: the running statistics, or a batch's own."""

    mean: np.ndarray  # (C,)
    var: np.ndarray  # (C,), the mean square deviation
    count: Any = None  # values per channel over all ranks; None: running statistics, which are constants
    reduce: Reduce | None = None


def channel_sums(x: np.ndarray, mean: np.ndarray | None) -> np.ndarray:  # (B, C, h, w), (C,) -> (C,)
    """The sum of each channel, or of the squares of its distance from a mean; in float64."""
    if mean is None:
        return x.sum(PLACES, dtype=np.float64)
    return np.square(x - mean[:, None, None]).sum(PLACES)  # float64, as `mean` is


def batch_moments(x: np.ndarray, reduce: Reduce, sums: ChannelSums = channel_sums) -> Moments:  # (B, C, h, w)
    """Mean and mean square deviation of every channel over the batches of all ranks, in float64."""
    *totals, count = reduce(np.append(sums(x, None), x.size / x.shape[1]))
    mean = np.asarray(totals) / count
    return Moments(mean, reduce(sums(x, mean)) / count, float(count), reduce)


class BatchStatistics:
    """Makes batch norms use the statistics of the batch, and remembers what running statistics become of them.

    `reduce` adds an array up over all ranks, in every rank alike (batch norm over all of them, "SyncBN"); without
    it each normalises its own batch.  New running statistic = (1 - momentum) old + momentum batch's, the batch's
    variance being the unbiased one, as in PyTorch.
    """

    def __init__(self, reduce: Reduce | None = None, momentum: float = 0.1) -> None:
        self.reduce = reduce if reduce is not None else lambda x: x
        self.momentum = momentum
        self._seen: list[tuple[BatchNorm, Moments]] = []

    def moments(
        self, x: np.ndarray, bn: BatchNorm, find: Callable[[Any, Reduce], Moments] = batch_moments
    ) -> Moments:  # (B, C, h, w)
        """The statistics of this batch.  Raises ValueError for a single value per channel, which has no spread."""
        found = find(x, self.reduce)
        # Of all ranks; a GPU may hold the count, so that it is read where it matters alone.
        if x.size < 2 * x.shape[1] and found.count < 2:
            raise ValueError(
                f"batch norm: expected more than one value per channel to take statistics of, found a map of shape "
                f"{x.shape}; use a larger batch or keep the running statistics"
            )
        self._seen.append((bn, found))
        return found

    def running(self, named: dict[str, Any], to_host: Callable[[Any], np.ndarray] = np.asarray) -> dict[str, Any]:
        """The new running statistics, by the names that the old ones have in `named` ({canonical name: array}).

        They are where the batch's are; `to_host` is for old ones that are not.
        """
        names = {id(array): name for name, array in named.items()}
        new = {}
        for bn, found in self._seen:
            unbiased = found.var * (found.count / (found.count - 1))
            for old, batch in ((bn.running_mean, found.mean), (bn.running_var, unbiased)):
                here = to_host(old) if isinstance(batch, np.ndarray) else old
                made = (1 - self.momentum) * here + self.momentum * batch
                new[names[id(old)]] = made.astype(old.dtype)
        return new


def batch_norm_forward(
    x: np.ndarray, bn: BatchNorm, statistics: BatchStatistics | None = None
) -> tuple[np.ndarray, Moments]:  # (B, C, h, w) -> (B, C, h, w)
    """(x - mean) / sqrt(var + 1e-5) * weight + bias per channel, with running statistics or those of the batch."""
    if statistics is None:
        return reference.batch_norm(x, bn), Moments(bn.running_mean, bn.running_var)
    moments = statistics.moments(x, bn)
    hat, _ = _normalised(x, moments)
    return hat * bn.weight[:, None, None] + bn.bias[:, None, None], moments


def batch_norm_backward(
    g: np.ndarray, saved: Moments, x: np.ndarray, bn: BatchNorm
) -> tuple[np.ndarray, BatchNorm]:  # (B, C, h, w)
    """With r = 1 / sqrt(var + 1e-5) and h = (x - mean) r, sums and means taken per channel:

    dweight = sum of g h,  dbias = sum of g,  dx = g weight r  with running statistics, which are constants;
    dx = weight r (g - mean(g) - h mean(g h))  with the batch's own, the means going over all ranks.
    """
    hat, r = _normalised(x, saved)
    d_weight, d_bias = total(g * hat, PLACES), total(g, PLACES)
    d_bn = BatchNorm(d_weight, d_bias, running_mean=None, running_var=None)
    factor = (bn.weight * r).astype(x.dtype)[:, None, None]
    if saved.count is None or saved.reduce is None:
        return g * factor, d_bn
    means = saved.reduce(np.concatenate([d_bias, d_weight]).astype(np.float64)) / saved.count
    mean_g, mean_gh = (part.astype(x.dtype)[:, None, None] for part in np.split(means, 2))
    return (g - mean_g - hat * mean_gh) * factor, d_bn


def _normalised(x: np.ndarray, moments: Moments) -> tuple[np.ndarray, np.ndarray]:  # -> (B, C, h, w), (C,)
    r = 1 / np.sqrt(moments.var.astype(np.float64) + BATCH_NORM_EPS)
    hat = (x - moments.mean.astype(x.dtype)[:, None, None]) * r.astype(x.dtype)[:, None, None]
    return hat, r


# Fused forms: what is saved is the convolution's output and the statistics --------------------------------------------


def conv_bn_relu_forward(
    x: np.ndarray, layer: ConvBatchNorm, statistics: BatchStatistics | None = None
) -> tuple[np.ndarray, Any]:  # (B, C, h, w) -> (B, out, h, w)
    """max(0, batch norm(conv(x)))."""
    y = reference.conv2d(x, layer.conv)
    z, moments = batch_norm_forward(y, layer.bn, statistics)
    return np.maximum(z, 0), (y, moments, z > 0)


def conv_bn_relu_backward(
    g: np.ndarray, saved: Any, x: np.ndarray, layer: ConvBatchNorm
) -> tuple[np.ndarray, ConvBatchNorm]:
    """The chain of its three parts; relu lets g through where its output is positive."""
    y, moments, positive = saved
    dy, d_bn = batch_norm_backward(g * positive, moments, y, layer.bn)
    dx, d_conv = conv2d_backward(dy, None, x, layer.conv)
    return dx, ConvBatchNorm(d_conv, d_bn)


def conv_bn_relu_resized_forward(
    maps: Sequence[np.ndarray], layer: ConvBatchNorm, size: tuple[int, int], statistics: BatchStatistics | None = None
) -> tuple[np.ndarray, Any]:  # k x (B, Ci, hi, wi) -> (B, out, h, w)
    """`conv_bn_relu` of the concatenation of `maps`, each resized bilinearly to `size`."""
    x = reference.concatenate([reference.resize_bilinear(part, size) for part in maps], axis=1)
    y, saved = conv_bn_relu_forward(x, layer, statistics)
    return y, (x, saved)


def conv_bn_relu_resized_backward(
    g: np.ndarray, saved: Any, maps: Sequence[np.ndarray], layer: ConvBatchNorm, size: tuple[int, int]
) -> tuple[list[np.ndarray], ConvBatchNorm, None]:
    """The chain of its parts: every map gets its channels of the convolution's dx, resized back."""
    x, saved = saved
    dx, d_layer = conv_bn_relu_backward(g, saved, x, layer)
    pieces = pieces_of(dx, [part.shape[1] for part in maps], 1)
    return [resize_bilinear_backward(d, None, part, size)[0] for d, part in zip(pieces, maps)], d_layer, None


def conv_transpose_bn_gelu_forward(
    x: np.ndarray, deconv: ConvTranspose, bn: BatchNorm, statistics: BatchStatistics | None = None
) -> tuple[np.ndarray, Any]:  # (B, C, h, w) -> (B, out, 2h, 2w)
    """gelu(batch norm(conv_transpose(x)))."""
    y = reference.conv_transpose(x, deconv)
    z, moments = batch_norm_forward(y, bn, statistics)
    return gelu(z), (y, moments, z)


def conv_transpose_bn_gelu_backward(
    g: np.ndarray, saved: Any, x: np.ndarray, deconv: ConvTranspose, bn: BatchNorm
) -> tuple[np.ndarray, ConvTranspose, BatchNorm]:
    """The chain of its three parts."""
    y, moments, z = saved
    dy, d_bn = batch_norm_backward(g * derivative("gelu", z), moments, y, bn)
    return (*conv_transpose_backward(dy, None, x, deconv), d_bn)


# Pools and resizing -------------------------------------------------------------------------------------------------


def max_pool2x2_backward(g: np.ndarray, saved: None, x: np.ndarray) -> tuple[np.ndarray]:
    """g where the largest of the square stands, the first of equal ones, row by row; 0 elsewhere."""
    B, C, h, w = x.shape
    h, w = h // 2, w // 2
    squares = x[:, :, : 2 * h, : 2 * w].reshape(B, C, h, 2, w, 2).transpose(0, 1, 2, 4, 3, 5).reshape(B, C, h, w, 4)
    d = np.zeros_like(squares)
    np.put_along_axis(d, squares.argmax(-1)[..., None], g[..., None], -1)
    dx = np.zeros_like(x)
    dx[:, :, : 2 * h, : 2 * w] = d.reshape(B, C, h, w, 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(B, C, 2 * h, 2 * w)
    return (dx,)


def upsample2x2_backward(g: np.ndarray, saved: None, x: np.ndarray) -> tuple[np.ndarray]:
    """The sum of every 2x2 square of g."""
    B, C, h, w = x.shape
    return (g.reshape(B, C, h, 2, w, 2).sum((3, 5)),)


def adaptive_avg_pool_backward(g: np.ndarray, saved: None, x: np.ndarray, size: int) -> tuple[np.ndarray, None]:
    """Every pixel gets g / (pixels of the cell) from each cell it lies in; cells overlap."""
    h, w = x.shape[2:]
    dx = np.zeros_like(x)
    for i in range(size):
        for j in range(size):
            rows = slice(i * h // size, -(-(i + 1) * h // size))
            columns = slice(j * w // size, -(-(j + 1) * w // size))
            cell = (rows.stop - rows.start) * (columns.stop - columns.start)
            dx[:, :, rows, columns] += (g[:, :, i, j] / cell)[:, :, None, None]
    return dx, None


def resize_bilinear_backward(
    g: np.ndarray, saved: None, x: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, None]:  # (B, C, *size) -> (B, C, h, w)
    """dx = R^T g C, R and C being the matrices that interpolate rows and columns."""
    return _resize_backward(g, x, reference.bilinear_taps), None


def resize_bicubic_backward(
    g: np.ndarray, saved: None, x: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, None]:  # (B, C, *size) -> (B, C, h, w)
    """dx = R^T g C, R and C being the matrices that interpolate rows and columns."""
    return _resize_backward(g, x, reference.bicubic_taps), None


def _resize_backward(g: np.ndarray, x: np.ndarray, taps: Any) -> np.ndarray:
    for axis in (3, 2):
        old, new = x.shape[axis], g.shape[axis]
        if old == new:
            continue
        matrix = tap_matrix(taps, old, new).astype(g.dtype)
        g = g @ matrix if axis == 3 else matrix.T @ g
    return g


def tap_matrix(taps: Any, old: int, new: int) -> np.ndarray:  # -> (new, old), float64
    """The matrix of `taps(old, new)`, which gives for each tap the index and the weight of every target."""
    matrix = np.zeros((new, old))
    for index, weight in taps(old, new):
        matrix[np.arange(new), index] += weight  # within a tap every target is named once
    return matrix
