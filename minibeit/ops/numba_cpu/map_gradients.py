"""Training on maps that lie channels last: batch norm both ways, the gradients of convolutions, of enlargement.

The gradient of a 3x3 kernel goes backwards through Winograd's convolution (see `winograd`): with V the transformed
input and M = A dY A^T the transformed cotangent of a tile, dU = sum of M V^T over all tiles for each of the 36 points,
and dg = G^T dU G.  That of its input is the convolution of the cotangent with the kernel turned by 180 degrees.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..reference.maps import bilinear_taps
from . import gemm
from .arguments import POINTS, RESIDUAL
from .gradients import column_panels, input_gradient, turned, weight_gradient
from .machine_code import Kernel
from .map_arguments import (
    CHANNEL_SUMS,
    NORMALISE,
    PIXELS,
    SHRINK,
    SUM_COTANGENTS,
    SUM_SQUARES,
    SUM_VALUES,
    TRANSFORM_COTANGENT,
    TRANSFORM_WEIGHT_GRADIENT,
)
from .memory import NOTHING, aligned, constant_operand, operand, padded, result
from .operands import rows
from .pack import PackedLinear, pack_matrix, padded_bias
from .queue import run
from .target import LANES
from .winograd import After, convolve, pack_winograd, transformed_panels

_TILES = 512  # in work at a time; 36 * 512 * 768 floats are 57 MB
_VECTOR = 4 * LANES
Vectors = tuple[np.ndarray, np.ndarray, np.ndarray]  # of `width` channels each: mean, scale and bias

_channel_sums = Kernel("minibeit.ops.numba_cpu.kernels.map_gradients", "channel_sums", arguments=CHANNEL_SUMS)
_normalise = Kernel("minibeit.ops.numba_cpu.kernels.map_gradients", "normalise", arguments=NORMALISE)
_shrink = Kernel("minibeit.ops.numba_cpu.kernels.map_gradients", "shrink", arguments=SHRINK)
_transform_cotangent = Kernel(
    "minibeit.ops.numba_cpu.kernels.winograd", "transform_cotangent", arguments=TRANSFORM_COTANGENT
)
_transform_weight_gradient = Kernel(
    "minibeit.ops.numba_cpu.kernels.winograd", "transform_weight_gradient", arguments=TRANSFORM_WEIGHT_GRADIENT
)


# Batch norm ---------------------------------------------------------------------------------------------------------


def sums_of_values(x: np.ndarray) -> np.ndarray:  # (B, h, w, C) -> (C,) float64
    """The sum of each channel."""
    return _sums(x, None, SUM_VALUES)[0]


def sums_of_squares(x: np.ndarray, mean: np.ndarray) -> np.ndarray:  # (B, h, w, C), (C,) -> (C,) float64
    """The sum of (x - mean)^2 of each channel."""
    return _sums(x, None, SUM_SQUARES, mean)[0]


def sums_of_cotangents(x: np.ndarray, g: np.ndarray, forward: Vectors, relu: bool) -> np.ndarray:  # -> (2, C) float64
    """The sums of g and of g (x - mean); with `relu` g counts where (x - mean) scale + bias > 0."""
    return _sums(x, g, SUM_COTANGENTS, *forward, relu)


def _sums(
    x: np.ndarray,
    g: np.ndarray | None,
    mode: int,
    mean: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    relu: bool = False,
) -> np.ndarray:
    x_rows, count, x_bytes = rows(x)
    g_rows, _, g_bytes = (NOTHING, 0, 0) if g is None else rows(g)
    C, tasks = x.shape[-1], -(-count // PIXELS)
    parts = aligned((tasks, 2, C))
    factors = [NOTHING if a is None else constant_operand(_row(a)) for a in (mean, scale, bias)]
    operands = CHANNEL_SUMS.operands(
        x=x_rows, g=g_rows, mean=factors[0], scale=factors[1], bias=factors[2], parts=operand(parts)
    )
    numbers = CHANNEL_SUMS.numbers(x_bytes=x_bytes, g_bytes=g_bytes, count=count, width=C, mode=mode, relu=int(relu))
    run(_channel_sums, tasks, operands, numbers)
    return parts.sum(0, dtype=np.float64)


def normalised(x: np.ndarray, forward: Vectors, relu: bool) -> np.ndarray:  # (B, h, w, C)
    """(x - mean) scale + bias of each channel, its negative elements 0 with `relu`."""
    return _normalised(x, None, forward, relu)


def normalised_backward(
    x: np.ndarray, g: np.ndarray, forward: Vectors, backward: Vectors, relu: bool
) -> np.ndarray:  # (B, h, w, C)
    """g factor + (x - mean) slope + offset, `backward` being factor, slope and offset; `relu` as in the sums."""
    return _normalised(x, g, (*forward, *backward), relu)


def _normalised(x: np.ndarray, g: np.ndarray | None, vectors: tuple[np.ndarray, ...], relu: bool) -> np.ndarray:
    x_rows, count, x_bytes = rows(x)
    g_rows, _, g_bytes = (NOTHING, 0, 0) if g is None else rows(g)
    y, output, y_bytes = result(x.shape)
    names = ("mean", "scale", "bias", "factor", "slope", "offset")
    given = {name: constant_operand(_row(vector)) for name, vector in zip(names, vectors)}
    operands = NORMALISE.operands(x=x_rows, g=g_rows, y=output, **dict.fromkeys(names, NOTHING) | given)
    numbers = NORMALISE.numbers(
        x_bytes=x_bytes, g_bytes=g_bytes, y_bytes=y_bytes, count=count, width=x.shape[-1], relu=int(relu)
    )
    run(_normalise, -(-count // PIXELS), operands, numbers)
    return y


def _row(vector: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vector, np.float32)


# 3x3 convolution ----------------------------------------------------------------------------------------------------


def convolved(x: np.ndarray, weight: np.ndarray) -> np.ndarray:  # (B, h, w, C), (out, C, 3, 3) -> (B, h, w, out)
    """The convolution by Winograd's algorithm; C and out are multiples of NR."""
    y = padded((*x.shape[:3], len(weight)))
    convolve(x, pack_winograd(weight, np.ones(len(weight), np.float32)), np.zeros(len(weight), np.float32), After(), y)
    return y


def convolution_input_gradient(g: np.ndarray, weight: np.ndarray) -> np.ndarray:  # (B, h, w, out) -> (B, h, w, C)
    """The convolution of g with the kernels turned, inputs and outputs exchanged."""
    return convolved(g, weight.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1])


def convolution_weight_gradient(g: np.ndarray, x: np.ndarray) -> np.ndarray:  # -> (out, C, 3, 3)
    """The gradient of the kernels from the cotangent g (B, h, w, out) and the input x (B, h, w, C)."""
    B, h, w, C = x.shape
    out, total = g.shape[3], B * -(-h // 4) * -(-w // 4)
    u = aligned((POINTS, out, C))
    for first in range(0, total, _TILES):
        tiles = min(_TILES, total - first)
        panels, m = transformed_panels(x, first, tiles), _transformed_cotangent(g, first, tiles)
        for point in range(POINTS):
            weight_gradient(turned(m[point]), panels[point], C, into=u[point], accumulate=first > 0)
    dw = aligned((out, C, 3, 3))
    operands = TRANSFORM_WEIGHT_GRADIENT.operands(u=operand(u), weight=operand(dw))
    numbers = TRANSFORM_WEIGHT_GRADIENT.numbers(point_bytes=u.strides[0], out_bytes=dw.strides[0], channels=C)
    run(_transform_weight_gradient, out, operands, numbers, 27 * _VECTOR)
    return dw


def _transformed_cotangent(g: np.ndarray, first: int, tiles: int) -> np.ndarray:  # -> (POINTS, tiles, out)
    h, w, out = g.shape[1:]
    m, target, tile_bytes = result((POINTS, tiles, out))
    numbers = TRANSFORM_COTANGENT.numbers(
        pixel_bytes=g.strides[2], row_bytes=g.strides[1], image_bytes=g.strides[0], height=h, width=w, channels=out,
        tile_bytes=tile_bytes, point_bytes=m.strides[0], first_tile=first,
    )  # fmt: skip
    run(_transform_cotangent, tiles, TRANSFORM_COTANGENT.operands(g=operand(g), m=target), numbers, 40 * _VECTOR)
    return m


def enlarged_gradients(
    g: np.ndarray, x: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # (B, h, w, out), (B, h', w', C), (out, C, 3, 3) -> (B, h', w', C), the weight
    """(dx, dweight) of the convolution of x enlarged, made at the small size, see `spread`.

    For each tap the cotangent is shifted and shrunk; what it has to do with x is then a linear layer.
    """
    (_, h, w, _), C = g.shape, weight.shape[1]
    around = np.pad(g, ((0, 0), (1, 1), (1, 1), (0, 0)))
    panels, dx, dw = column_panels(x), None, np.empty(weight.shape, np.float32)
    for i in range(3):
        for j in range(3):
            z = shrunk(around[:, 2 - i : 2 - i + h, 2 - j : 2 - j + w], (x.shape[1], x.shape[2]))
            dx = input_gradient(z, np.ascontiguousarray(weight[:, :, i, j]), dx)
            dw[:, :, i, j] = weight_gradient(turned(z), panels, C)
    assert dx is not None
    return dx, dw


# 2x2 transposed convolution -----------------------------------------------------------------------------------------


def transposed_gradients(
    g: np.ndarray, x: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # (B, 2h, 2w, out), (B, h, w, C), (C, out, 2, 2)
    """(dx, dweight, sums of g); each corner of the 2x2 squares is a linear layer of its own."""
    C, out = weight.shape[:2]
    dx, dw, sums = None, np.empty_like(weight), np.zeros(out)
    x_turned = turned(x)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        corner = np.ascontiguousarray(g[:, i::2, j::2])
        layer = PackedLinear(pack_matrix(weight[:, :, i, j]), padded_bias(None, C), C)
        dx = gemm.product(corner, layer) if dx is None else gemm.product(corner, layer, RESIDUAL, None, dx)
        dw[:, :, i, j] = weight_gradient(x_turned, column_panels(corner), out)
        sums += sums_of_values(corner) if out % LANES == 0 else corner.sum((0, 1, 2), dtype=np.float64)
    assert dx is not None
    return dx, dw, sums.astype(np.float32)


# Enlargement --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _spans(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """(first and last target (old, 2) of every source, the factors of all between (old, most))."""
    matrix = np.zeros((new, old))
    for index, factor in bilinear_taps(old, new):
        matrix[np.arange(new), index] += factor  # within a tap every target is named once
    used = matrix != 0
    first, last = used.argmax(0), new - 1 - used[::-1].argmax(0)
    last = np.where(used.any(0), last, first - 1)  # a source that no target reads, where the map became smaller
    factors = np.zeros((old, max(1, int((last - first).max()) + 1)), np.float32)
    for i in range(old):
        factors[i, : last[i] - first[i] + 1] = matrix[first[i] : last[i] + 1, i]
    return np.stack([first, last], 1).astype(np.int64), factors


def shrunk(g: np.ndarray, size: tuple[int, int]) -> np.ndarray:  # (B, h, w, C) -> (B, *size, C)
    """The backward of bilinear resizing from `size`; C a multiple of LANES."""
    B, h, w, C = g.shape
    y = padded((B, *size, C))
    row_spans, row_factors = _spans(size[0], h)
    column_spans, column_factors = _spans(size[1], w)
    operands = SHRINK.operands(
        g=operand(g), y=operand(y), row_spans=constant_operand(row_spans), row_factors=constant_operand(row_factors),
        column_spans=constant_operand(column_spans), column_factors=constant_operand(column_factors),
    )  # fmt: skip
    numbers = SHRINK.numbers(
        g_pixel_bytes=g.strides[2], g_row_bytes=g.strides[1], g_image_bytes=g.strides[0], y_pixel_bytes=y.strides[2],
        y_row_bytes=y.strides[1], y_image_bytes=y.strides[0], width=w, small_height=size[0], small_width=size[1],
        channels=C, row_factor_bytes=row_factors.strides[0], column_factor_bytes=column_factors.strides[0],
    )  # fmt: skip
    run(_shrink, B * size[0], operands, numbers, 4 * w * C)
    return y
