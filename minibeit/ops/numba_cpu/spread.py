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
from numba import njit

from .gemm import PLAIN, run_products, task_layout
from .kernels import task_kernel
from .memory import aligned, padded, rows
from .micro import NR
from .pack import pack_matrix, padded_bias
from .pool import run
from .vector import LANES, arguments, fma, load, load_float, load_int, maximum, splat, store

_VECTOR = 4 * LANES
_GROUP = 128  # output channels in work at a time
_ZERO = np.float32(0)


@dataclass(frozen=True)
class PackedTaps:
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


@lru_cache(maxsize=64)
def _sources(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """The two sources (new, 2) of every target place, and their weights (new, 2), as in `reference.resize_bilinear`."""
    position = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    left = position.astype(np.int64)
    t = position - left
    return np.stack([left, np.minimum(left + 1, old - 1)], 1), np.stack([1 - t, t], 1).astype(np.float32)


@njit(error_model="numpy")
def _mix(target, a, b, factor_a, factor_b, size, begin):
    """target = a * factor_a + b * factor_b, or += where not `begin`; vectors of `size` bytes."""
    for c in range(0, size, _VECTOR):
        total = splat(_ZERO) if begin else load(target + c)
        total = fma(load(a + c), splat(factor_a), total)
        store(target + c, fma(load(b + c), splat(factor_b), total))


def _spread_kernel(args, task, thread):
    """One row of the large map, one group of channels.

    First the rows above and below are mixed, and the vertical taps summed, for every small column and horizontal tap;
    then the columns left and right of every large pixel.  Taps beyond the border are left out.
    """
    (
        scratch, scratch_bytes, z, z_pixel, z_row, z_image, small_width, y, y_pixel, y_row, y_image, height, width,
        side, size, bias, add, relu, row_sources, row_factors, column_sources, column_factors,
    ) = arguments(args, 22)  # fmt: skip
    mixed = scratch + thread * scratch_bytes
    row, reach, tap_bytes = task % height, side // 2, size * 4
    z += task // height * z_image
    y += task // height * y_image + row * y_row
    top, bottom = max(0, reach - row), min(side, height - row + reach)
    for column in range(small_width):
        for dx in range(side):
            target = mixed + (dx * small_width + column) * tap_bytes
            for dy in range(top, bottom):
                line, here = row + dy - reach, z + column * z_pixel + (dy * side + dx) * tap_bytes
                above, below = load_int(row_sources + 16 * line), load_int(row_sources + 16 * line + 8)
                factor_a, factor_b = load_float(row_factors + 8 * line), load_float(row_factors + 8 * line + 4)
                _mix(target, here + above * z_row, here + below * z_row, factor_a, factor_b, tap_bytes, dy == top)
    for x in range(width):
        target = y + x * y_pixel
        if bias != 0:
            for c in range(0, tap_bytes, _VECTOR):
                store(target + c, load(bias + c))
        left, right = max(0, reach - x), min(side, width - x + reach)
        for dx in range(left, right):
            column, here = x + dx - reach, mixed + dx * small_width * tap_bytes
            a, b = load_int(column_sources + 16 * column), load_int(column_sources + 16 * column + 8)
            factor_a, factor_b = load_float(column_factors + 8 * column), load_float(column_factors + 8 * column + 4)
            begin = dx == left and add == 0 and bias == 0
            _mix(target, here + a * tap_bytes, here + b * tap_bytes, factor_a, factor_b, tap_bytes, begin)
        if relu != 0:
            for c in range(0, tap_bytes, _VECTOR):
                store(target + c, maximum(splat(_ZERO), load(target + c)))


_spread = task_kernel(_spread_kernel)


def spread(
    z: np.ndarray, y: np.ndarray, channel: int, size: int, side: int, bias: np.ndarray | None, add: bool, relu: bool
) -> None:
    """Enlarges z (B, h', w', side * side * size) into channels `channel` ... + size of y (B, h, w, C), which it fills
    (from `bias`) or adds to."""
    B, h, w, _ = y.shape
    start = 4 * channel
    row_sources, row_factors = _sources(z.shape[1], h)
    column_sources, column_factors = _sources(z.shape[2], w)
    run(_spread, B * h, (
        z.ctypes.data, z.strides[2], z.strides[1], z.strides[0], z.shape[2],
        y.ctypes.data + start, y.strides[2], y.strides[1], y.strides[0], h, w,
        side, size, 0 if bias is None else bias.ctypes.data + start, int(add), int(relu),
        row_sources.ctypes.data, row_factors.ctypes.data, column_sources.ctypes.data, column_factors.ctypes.data,
    ), side * z.shape[2] * size * 4)  # fmt: skip


def convolve_enlarged(x: np.ndarray, layer: PackedTaps, bias: np.ndarray | None, relu: bool, y: np.ndarray) -> None:
    """y = f(conv(up(x)) + bias), or f(y + conv(up(x))) without `bias`; x (B, h', w', C) is enlarged to y's size."""
    x_rows, count, x_bytes = rows(x)
    channel = 0
    zeros = padded_bias(None, 9 * _GROUP)
    for panels, size in zip(layer.groups, layer.sizes):
        z = padded((*x.shape[:3], 9 * size))
        z_bytes = z.strides[2]
        by_panel, group, block = task_layout(count, len(panels))
        run_products(
            1, (x_rows.ctypes.data, x_bytes, count, layer.channels, panels.ctypes.data, zeros.ctypes.data, 9 * size),
            (z.ctypes.data, z_bytes, PLAIN, 0, 0, 0),
            (by_panel, group, block, block * z_bytes, 0, 0, 0),
        )  # fmt: skip
        spread(z, y, channel, size, 3, bias, bias is None, relu)
        channel += size
