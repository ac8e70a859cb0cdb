"""Ops on feature maps.  A map is (B, C, h, w) to the caller and channels-last, (B, h, w, C), in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import gemm
from .arguments import PLAIN, PRODUCT, RELU
from .low_precision import PackedLow, PackedLowDeconv, level_rows, low_product, run_low
from .memory import NOTHING, constant_operand, padded, result
from .operands import rows
from .pack import PackedLinear
from .packed import Packed
from .spread import PackedLowTaps, PackedTaps, convolve_enlarged, enlarge_into
from .target import LANES, NR, STEPS
from .winograd import After, PackedShortWinograd, PackedWinograd, convolve


@dataclass(frozen=True)
class PackedConv(Packed):
    """A 3x3 convolution with folded batch norm, in parts that each read their own share of the input channels."""

    parts: tuple[PackedWinograd | PackedShortWinograd | PackedTaps | PackedLowTaps, ...]
    bias: np.ndarray  # (out,)
    source: Any = None

    @property
    def out(self) -> int:
        return len(self.bias)


@dataclass(frozen=True)
class PackedDeconv(Packed):
    """A 2x2 transposed convolution of stride 2, a batch norm behind it folded in: (4, ceil(out / NR), in, NR)."""

    panels: np.ndarray
    bias: np.ndarray  # (panels * NR,)
    out: int
    source: Any = None


def to_channels_last(x: np.ndarray) -> np.ndarray:  # (B, C, h, w) -> (B, h, w, C)
    """The map channels-last, float32, the elements of a pixel contiguous; copied only if they are not."""
    y = x.transpose(0, 2, 3, 1)
    if y.dtype != np.float32 or (y.strides[3] != 4 and y.shape[3] > 1) or min(y.strides) < 0:
        y = np.ascontiguousarray(y, np.float32)
    return y


def to_channels_first(y: np.ndarray) -> np.ndarray:  # (B, h, w, C) -> (B, C, h, w)
    """The map as callers see it; the memory stays as it is."""
    return y.transpose(0, 3, 1, 2)


def conv_1x1(x: np.ndarray, layer: PackedLinear | PackedLow, relu: bool) -> np.ndarray:
    """A linear layer on every pixel, and max(0, ) of it with `relu`."""
    if isinstance(layer, PackedLow):
        return to_channels_first(low_product(to_channels_last(x), layer, RELU if relu else PLAIN))
    return to_channels_first(gemm.product(to_channels_last(x), layer, RELU if relu else PLAIN))


def conv_3x3(maps: Sequence[np.ndarray], layer: PackedConv, size: tuple[int, int], relu: bool = True) -> np.ndarray:
    """conv + bias, and max(0, ) of it with `relu`, of maps enlarged to `size`, each with its own part of the layer."""
    y = padded((maps[0].shape[0], *size, layer.out))
    for i, (x, part) in enumerate(zip(maps, layer.parts, strict=True)):
        bias, cut = layer.bias if i == 0 else None, relu and i == len(maps) - 1
        if isinstance(part, (PackedWinograd, PackedShortWinograd)):
            same_size = x if x.shape[2:] == size else resize(x, size)
            convolve(to_channels_last(same_size), part, bias, After(cut), y)
        else:
            convolve_enlarged(to_channels_last(x), part, bias, cut, y)
    return to_channels_first(y)


def conv_transpose_2x2(x: np.ndarray, layer: PackedDeconv | PackedLowDeconv, mode: int) -> np.ndarray:
    """Four products, one for each corner of the 2x2 squares; the rows of one product go to every second pixel."""
    B, C, h, w = x.shape
    if isinstance(layer, PackedLowDeconv):
        corners = layer.corners
        y, output, pixel = result((B, 2 * h, 2 * w, corners.out))
        row = y.strides[1]
        run_low(
            4, level_rows(to_channels_last(x), corners), corners, output,
            y_bytes=2 * pixel, mode=mode, side=1, blocks=B * h, unit=w, y_unit_bytes=2 * row, y_pair_bytes=row,
            y_odd_bytes=pixel, group=gemm.panel_group(len(corners.panels) // 4, 4 * B * h),
        )  # fmt: skip
        return to_channels_first(y)
    x_rows, count, x_bytes = rows(to_channels_last(x))
    y, output, pixel = result((B, 2 * h, 2 * w, layer.out))
    row, panels, bias = y.strides[1], constant_operand(layer.panels), constant_operand(layer.bias)
    group = gemm.panel_group(layer.panels.shape[1], 4 * B * h)
    gemm.run_products(
        4,
        PRODUCT.operands(x=x_rows, panels=panels, bias=bias, y=output, scale=NOTHING, residual=NOTHING),
        x_bytes=x_bytes, count=count, steps=C, out=layer.out, y_bytes=2 * pixel, mode=mode, residual_bytes=0,
        side=1, blocks=B * h, group=group, unit=w, y_unit_bytes=2 * row, x_product_bytes=0, y_pair_bytes=row,
        y_odd_bytes=pixel, panel_bytes=C * NR * 4, steps_per_sum=STEPS, accumulate=0,
    )  # fmt: skip
    return to_channels_first(y)


def can_resize(x: np.ndarray) -> bool:
    """Whether `resize` serves this map."""
    return x.dtype == np.float32 and x.size > 0


def resize(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear; channels that fill no whole vector are filled up."""
    source, C = to_channels_last(x), x.shape[1]
    if C % LANES:
        source = np.pad(source, ((0, 0), (0, 0), (0, 0), (0, -C % LANES)))
    y = padded((x.shape[0], *size, source.shape[3]))
    enlarge_into(y, source)
    return to_channels_first(y)[:, :C]


def max_pool(x: np.ndarray) -> np.ndarray:
    """The largest of every 2x2 square, channels last."""
    B, C, h, w = x.shape
    y = to_channels_last(x)[:, : h // 2 * 2, : w // 2 * 2]
    upper = np.maximum(y[:, ::2, ::2], y[:, ::2, 1::2])
    return to_channels_first(np.maximum(upper, np.maximum(y[:, 1::2, ::2], y[:, 1::2, 1::2])))


def upsample(x: np.ndarray) -> np.ndarray:
    """Every pixel as a 2x2 square, channels last."""
    B, C, h, w = x.shape
    y = padded((B, 2 * h, 2 * w, C))
    for row in (0, 1):
        for column in (0, 1):
            y[:, row::2, column::2] = to_channels_last(x)
    return to_channels_first(y)


def average_pool(x: np.ndarray, size: int) -> np.ndarray:
    """Means over size x size cells, channels last, summed in float64."""
    B, C, h, w = x.shape
    source, y = to_channels_last(x), np.empty((B, size, size, C), np.float32)
    for i in range(size):
        for j in range(size):
            lines = slice(i * h // size, -(-(i + 1) * h // size))
            columns = slice(j * w // size, -(-(j + 1) * w // size))
            y[:, i, j] = source[:, lines, columns].mean((1, 2), dtype=np.float64)
    return to_channels_first(y)
