"""Training on maps: sums over the pixels of each channel, batch norm both ways, bilinear enlargement backwards."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..map_arguments import CHANNEL_SUMS, NORMALISE, PIXELS, SHRINK, SUM_COTANGENTS, SUM_VALUES
from ..target import LANES
from .vector import fma, load, load_float, load_int, maximum, reader, splat, store, where_positive

_VECTOR = 4 * LANES
_ZERO = np.float32(0)
_read_sums, _read_normalise, _read_shrink = reader(CHANNEL_SUMS), reader(NORMALISE), reader(SHRINK)


@njit(error_model="numpy")
def _add_to(address, value):
    store(address, load(address) + value)


def channel_sums(args, task, thread):
    """The sums of PIXELS pixels, see CHANNEL_SUMS."""
    p = _read_sums(args, thread)
    size, mode, relu = 4 * p.width, p.mode, p.relu
    first = p.parts + task * 2 * size
    second = first + size
    for c in range(0, 2 * size, _VECTOR):
        store(first + c, splat(_ZERO))
    for pixel in range(task * PIXELS, min((task + 1) * PIXELS, p.count)):
        x, g = p.x + pixel * p.x_bytes, p.g + pixel * p.g_bytes
        for c in range(0, size, _VECTOR):
            if mode == SUM_VALUES:
                _add_to(first + c, load(x + c))
                continue
            centred = load(x + c) - load(p.mean + c)
            if mode == SUM_COTANGENTS:
                value = load(g + c)
                if relu != 0:
                    value = where_positive(fma(centred, load(p.scale + c), load(p.bias + c)), value)
                _add_to(first + c, value)
                _add_to(second + c, value * centred)
            else:
                _add_to(first + c, centred * centred)


def normalise(args, task, thread):
    """PIXELS pixels of the batch norm, or of its backward, see NORMALISE."""
    p = _read_normalise(args, thread)
    relu, backward = p.relu, p.g != 0
    for pixel in range(task * PIXELS, min((task + 1) * PIXELS, p.count)):
        x, g, y = p.x + pixel * p.x_bytes, p.g + pixel * p.g_bytes, p.y + pixel * p.y_bytes
        for c in range(0, 4 * p.width, _VECTOR):
            centred = load(x + c) - load(p.mean + c)
            value = fma(centred, load(p.scale + c), load(p.bias + c))
            if backward:
                given = load(g + c)
                if relu != 0:
                    given = where_positive(value, given)
                rest = fma(centred, load(p.slope + c), load(p.offset + c))
                store(y + c, fma(given, load(p.factor + c), rest))
            elif relu != 0:
                store(y + c, maximum(splat(_ZERO), value))
            else:
                store(y + c, value)


@njit(error_model="numpy")
def _weighted_sum(target, source, step, first, last, factors, size):
    """target = the sum of the vectors at source + i * step times their factors, i from `first` to `last`."""
    for c in range(0, size, _VECTOR):
        total = splat(_ZERO)
        for i in range(first, last + 1):
            total = fma(load(source + i * step + c), splat(load_float(factors + 4 * (i - first))), total)
        store(target + c, total)


def shrink(args, task, thread):
    """One row of the small map: the large rows it went to are summed, then in these the columns."""
    p = _read_shrink(args, thread)
    row, size, mixed = task % p.small_height, 4 * p.channels, p.scratch
    image = task // p.small_height
    g = p.g + image * p.g_image_bytes
    y = p.y + image * p.y_image_bytes + row * p.y_row_bytes
    top, bottom = load_int(p.row_spans + 16 * row), load_int(p.row_spans + 16 * row + 8)
    factors = p.row_factors + row * p.row_factor_bytes
    for x in range(p.width):
        _weighted_sum(mixed + x * size, g + x * p.g_pixel_bytes, p.g_row_bytes, top, bottom, factors, size)
    for x in range(p.small_width):
        left, right = load_int(p.column_spans + 16 * x), load_int(p.column_spans + 16 * x + 8)
        factors_here = p.column_factors + x * p.column_factor_bytes
        _weighted_sum(y + x * p.y_pixel_bytes, mixed, size, left, right, factors_here, size)
