"""Bilinear enlargement of one row of a map, with the taps of a convolution."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..target import LANES
from .vector import arguments, fma, load, load_float, load_int, maximum, splat, store

_VECTOR = 4 * LANES
_ZERO = np.float32(0)


@njit(error_model="numpy")
def _mix(target, a, b, factor_a, factor_b, size, begin):
    """target = a * factor_a + b * factor_b, or += where not `begin`; vectors of `size` bytes."""
    for c in range(0, size, _VECTOR):
        total = splat(_ZERO) if begin else load(target + c)
        total = fma(load(a + c), splat(factor_a), total)
        store(target + c, fma(load(b + c), splat(factor_b), total))


def spread(args, task, thread):
    """One row of the large map, one group of channels.

    First the rows above and below are mixed, and the vertical taps summed, for every small column and horizontal tap;
    then the columns left and right of every large pixel.  Taps beyond the border are left out.
    """
    (
        scratch, scratch_bytes, z, y, bias, row_sources, row_factors, column_sources, column_factors, z_pixel, z_row,
        z_image, small_width, y_pixel, y_row, y_image, height, width, side, size, add, relu,
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
