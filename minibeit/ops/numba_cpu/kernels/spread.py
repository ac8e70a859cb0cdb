"""Bilinear enlargement of one row of a map, with the taps of a convolution."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..arguments import ENLARGE
from ..target import LANES
from .vector import fma, load, load_float, load_int, maximum, reader, splat, store

_VECTOR = 4 * LANES
_ZERO = np.float32(0)
_read = reader(ENLARGE)


@njit(error_model="numpy")
def _mix(target, a, b, factor_a, factor_b, size, begin):
    """target = a * factor_a + b * factor_b, or += where not `begin`; vectors of `size` bytes."""
    for c in range(0, size, _VECTOR):
        total = splat(_ZERO) if begin else load(target + c)
        total = fma(load(a + c), splat(factor_a), total)
        store(target + c, fma(load(b + c), splat(factor_b), total))


def enlarge(args, task, thread):
    """One row of the large map, one group of channels.

    First the rows above and below are mixed, and the vertical taps summed, for every small column and horizontal tap;
    then the columns left and right of every large pixel.  Taps beyond the border are left out.
    """
    p = _read(args, thread)
    mixed, taps, height, width, small_width = p.scratch, p.taps, p.height, p.width, p.small_width
    row, reach, tap_bytes = task % height, taps // 2, p.channels * 4
    z = p.z + task // height * p.z_image_bytes
    y = p.y + task // height * p.y_image_bytes + row * p.y_row_bytes
    top, bottom = max(0, reach - row), min(taps, height - row + reach)
    for column in range(small_width):
        for dx in range(taps):
            target = mixed + (dx * small_width + column) * tap_bytes
            for dy in range(top, bottom):
                line, here = row + dy - reach, z + column * p.z_pixel_bytes + (dy * taps + dx) * tap_bytes
                sources, factors = p.row_sources + 16 * line, p.row_factors + 8 * line
                above, below = here + load_int(sources) * p.z_row_bytes, here + load_int(sources + 8) * p.z_row_bytes
                _mix(target, above, below, load_float(factors), load_float(factors + 4), tap_bytes, dy == top)
    for x in range(width):
        target = y + x * p.y_pixel_bytes
        if p.bias != 0:
            for c in range(0, tap_bytes, _VECTOR):
                store(target + c, load(p.bias + c))
        left, right = max(0, reach - x), min(taps, width - x + reach)
        for dx in range(left, right):
            column, here = x + dx - reach, mixed + dx * small_width * tap_bytes
            sources, factors = p.column_sources + 16 * column, p.column_factors + 8 * column
            a, b = here + load_int(sources) * tap_bytes, here + load_int(sources + 8) * tap_bytes
            begin = dx == left and p.add == 0 and p.bias == 0
            _mix(target, a, b, load_float(factors), load_float(factors + 4), tap_bytes, begin)
        if p.relu != 0:
            for c in range(0, tap_bytes, _VECTOR):
                store(target + c, maximum(splat(_ZERO), load(target + c)))
