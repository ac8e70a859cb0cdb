"""Bilinear enlargement, and the sum of nine enlarged and shifted maps that is a 3x3 convolution of an enlarged map.

A convolution is a sum over taps t of shifted 1x1 products, and enlarging acts on each channel alone, so
conv3x3(up(x)) = sum_t shift_t(up(W_t x)): the products are made at the small size.  What is shifted in from beyond the
border is zero, exactly as in the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..reference.maps import bilinear_taps
from .arguments import ENLARGE, PLAIN, PRODUCT
from .gemm import row_layout, run_products
from .low_precision import PackedLow, level_product, level_rows, pack_low, rows_of
from .machine_code import Kernel
from .memory import NOTHING, aligned, constant_operand, operand, result
from .operands import rows
from .pack import pack_matrix, padded_bias
from .packed import Packed
from .pool import get_num_threads
from .queue import run
from .target import NR, STEPS

_GROUP = 128  # output channels in work at a time


@dataclass(frozen=True)
class PackedTaps(Packed):
    """A 3x3 convolution as nine 1x1 products: panels for each group of output channels, in it tap after tap."""

    groups: tuple[np.ndarray, ...]  # each (9 * channels of the group / NR, in, NR)
    sizes: tuple[int, ...]  # output channels of each group
    source: Any = None

    @property
    def channels(self) -> int:
        return self.groups[0].shape[1]


def pack_taps(weight: np.ndarray, scale: np.ndarray) -> PackedTaps:
    """Panels of a convolution (out, in, 3, 3), out a multiple of NR, whose outputs are multiplied by `scale` (out,)."""
    out, channels = weight.shape[:2]
    groups, sizes = [], []
    for first in range(0, out, _GROUP):
        size = min(_GROUP, out - first)
        part = aligned((9 * size // NR, channels, NR))
        for tap in range(9):
            matrix = weight[first : first + size, :, tap // 3, tap % 3]
            place = part[tap * size // NR : (tap + 1) * size // NR]
            pack_matrix(matrix, place, np.ascontiguousarray(scale[first : first + size]))
        groups.append(part)
        sizes.append(size)
    return PackedTaps(tuple(groups), tuple(sizes))


@dataclass(frozen=True)
class PackedLowTaps(Packed):
    """The same of low precision."""

    groups: tuple[PackedLow, ...]  # each of 9 * channels of the group outputs
    sizes: tuple[int, ...]
    source: Any = None

    @property
    def channels(self) -> int:
        return self.groups[0].width


def pack_low_taps(layer: Any, out: int) -> PackedLowTaps:
    """Packs the nine products of a 3x3 convolution, a layer (9 * out, in) of low precision, tap after tap."""
    groups, sizes = [], []
    for first in range(0, out, _GROUP):
        size = min(_GROUP, out - first)
        rows_here = [slice(tap * out + first, tap * out + first + size) for tap in range(9)]
        groups.append(pack_low([rows_of(layer, rows) for rows in rows_here]))
        sizes.append(size)
    return PackedLowTaps(tuple(groups), tuple(sizes))


@lru_cache(maxsize=64)
def _sources(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """The two sources (new, 2) of every target place, and their weights (new, 2), as in `reference.resize_bilinear`."""
    indices, weights = zip(*bilinear_taps(old, new))
    return np.stack(indices, 1).astype(np.int64), np.stack(weights, 1).astype(np.float32)


_enlarge = Kernel("minibeit.ops.numba_cpu.kernels.spread", "enlarge", arguments=ENLARGE)


def enlarge_into(
    y: np.ndarray,
    z: np.ndarray,
    channel: int = 0,
    taps: int = 1,
    bias: np.ndarray | None = None,
    add: bool = False,
    relu: bool = False,
) -> None:
    """Enlarges z (B, h', w', taps * taps * C) into C channels of y (B, h, w, ...), beginning with `channel`.

    y is filled, from `bias` if there is one, or added to.
    """
    B, h, w, _ = y.shape
    start, channels = 4 * channel, z.shape[3] // taps**2
    row_sources, row_factors = (constant_operand(a) for a in _sources(z.shape[1], h))
    column_sources, column_factors = (constant_operand(a) for a in _sources(z.shape[2], w))
    operands = ENLARGE.operands(
        z=operand(z), y=operand(y).at(start), bias=NOTHING if bias is None else constant_operand(bias).at(start),
        row_sources=row_sources, row_factors=row_factors, column_sources=column_sources,
        column_factors=column_factors,
    )  # fmt: skip
    numbers = ENLARGE.numbers(
        z_pixel_bytes=z.strides[2], z_row_bytes=z.strides[1], z_image_bytes=z.strides[0], small_width=z.shape[2],
        y_pixel_bytes=y.strides[2], y_row_bytes=y.strides[1], y_image_bytes=y.strides[0], height=h, width=w,
        taps=taps, channels=channels, add=int(add), relu=int(relu),
    )  # fmt: skip
    run(_enlarge, B * h, operands, numbers, taps * z.shape[2] * channels * 4)


def convolve_enlarged(
    x: np.ndarray, layer: PackedTaps | PackedLowTaps, bias: np.ndarray | None, relu: bool, y: np.ndarray
) -> None:
    """y = f(conv(up(x)) + bias), or f(y + conv(up(x))) without `bias`; x (B, h', w', C) is enlarged to y's size."""
    if isinstance(layer, PackedLowTaps):
        channel = 0
        levels = level_rows(x, layer.groups[0])
        for part, size in zip(layer.groups, layer.sizes):
            z = level_product(levels, part, (*x.shape[:3], part.out))
            enlarge_into(y, z, channel, taps=3, bias=bias, add=bias is None, relu=relu)
            channel += size
        return
    x_rows, count, x_bytes = rows(x)
    channel = 0
    zeros, panel_bytes = constant_operand(padded_bias(None, 9 * _GROUP)), 4 * NR * layer.channels
    for panels, size in zip(layer.groups, layer.sizes):
        z, products, z_bytes = result((*x.shape[:3], 9 * size))
        packed = constant_operand(panels)
        run_products(
            1,
            PRODUCT.operands(x=x_rows, panels=packed, bias=zeros, y=products, scale=NOTHING, residual=NOTHING),
            x_bytes=x_bytes, count=count, steps=layer.channels, out=9 * size, y_bytes=z_bytes, mode=PLAIN,
            residual_bytes=0, panel_bytes=panel_bytes, steps_per_sum=STEPS, accumulate=0,
            **row_layout(count, len(panels), z_bytes, get_num_threads()),
        )  # fmt: skip
        enlarge_into(y, z, channel, taps=3, bias=bias, add=bias is None, relu=relu)
        channel += size
