"""What the backward of linear layers needs beside products: matrices turned and packed, GELU, layer scale."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..gradient_arguments import (
    COMBINE,
    COMBINE_DERIVATIVE,
    COMBINE_GELU,
    GRADIENT_ROWS,
    PACK_COLUMNS,
    SCALE_GRADIENT,
    TURN,
)  # fmt: skip
from ..target import LANES, NR
from .vector import (
    fma,
    gelu,
    gelu_derivative,
    load,
    load_float,
    reader,
    splat,
    store,
    store_float,
    sum_lanes,
    transpose,
)  # fmt: skip

_ZERO, _ONE = np.float32(0), np.float32(1)
_read_pack, _read_turn, _read_combine, _read_scale = map(reader, (PACK_COLUMNS, TURN, COMBINE, SCALE_GRADIENT))
_RUN = 64  # numbers of a sum that are added up before they go to the total, which keeps its rounding errors small


def pack_columns(args, task, thread):
    """Columns task * NR ... of a matrix, row after row, as panel `task` (rows, NR); zeros beyond the last column."""
    p = _read_pack(args, thread)
    matrix, panels, row_bytes, rows, columns = p.matrix, p.panels, p.row_bytes, p.rows, p.columns
    first = task * NR
    count = min(NR, columns - first)
    whole = count // LANES * LANES
    for k in range(rows):
        panel, source = panels + (first * rows + k * NR) * 4, matrix + k * row_bytes + first * 4
        for j in range(0, whole, LANES):
            store(panel + 4 * j, load(source + 4 * j))
        for j in range(whole, count):
            store_float(panel + 4 * j, load_float(source + 4 * j))
        for j in range(count, NR):
            store_float(panel + 4 * j, _ZERO)


def turn(args, task, thread):
    """Columns task * LANES ... of a matrix become rows, and their sums."""
    p = _read_turn(args, thread)
    matrix, turned, sums, row_bytes = p.matrix, p.turned, p.sums, p.row_bytes
    turned_bytes, rows, columns = p.turned_bytes, p.rows, p.columns
    first = task * LANES
    count = min(LANES, columns - first)
    source, target = matrix + 4 * first, turned + first * turned_bytes
    whole = rows // LANES * LANES if count == LANES else 0
    for k in range(0, whole, LANES):
        transpose(source + k * row_bytes, row_bytes, target + 4 * k, turned_bytes, splat(_ONE))
    for k in range(whole, rows):
        for j in range(count):
            store_float(target + j * turned_bytes + 4 * k, load_float(source + k * row_bytes + 4 * j))
    if count == LANES:
        total = splat(_ZERO)
        for start in range(0, rows, _RUN):
            part = splat(_ZERO)
            for k in range(start, min(start + _RUN, rows)):
                part = part + load(source + k * row_bytes)
            total = total + part
        store(sums + 4 * first, total)
        return
    for j in range(count):
        column_total = _ZERO
        for start in range(0, rows, _RUN):
            column_part = _ZERO
            for k in range(start, min(start + _RUN, rows)):
                column_part += load_float(source + k * row_bytes + 4 * j)
            column_total += column_part
        store_float(sums + 4 * (first + j), column_total)


@njit(error_model="numpy")
def _combined(a, b, mode):
    """One vector of `combine`."""
    if mode == COMBINE_GELU:
        return gelu(a)
    if mode == COMBINE_DERIVATIVE:
        return a * gelu_derivative(b)
    return a * b


def combine(args, task, thread):
    """y = gelu(a), a gelu'(b) or a b, element by element; with 0 bytes between them the rows of b are one row."""
    p = _read_combine(args, thread)
    ends, width, mode = p.scratch, p.width, p.mode
    whole = width // LANES * LANES
    for row in range(task * GRADIENT_ROWS, min((task + 1) * GRADIENT_ROWS, p.count)):
        left, right, target = p.a + row * p.a_bytes, p.b + row * p.b_bytes, p.y + row * p.y_bytes
        for k in range(0, whole, LANES):
            store(target + 4 * k, _combined(load(left + 4 * k), load(right + 4 * k), mode))
        if whole == width:
            continue
        store(ends, splat(_ZERO))
        store(ends + 4 * LANES, splat(_ZERO))
        for k in range(whole, width):
            store_float(ends + 4 * (k - whole), load_float(left + 4 * k))
            store_float(ends + 4 * (LANES + k - whole), load_float(right + 4 * k))
        store(ends, _combined(load(ends), load(ends + 4 * LANES), mode))
        for k in range(whole, width):
            store_float(target + 4 * k, load_float(ends + 4 * (k - whole)))


def scale_gradient(args, task, thread):
    """For GRADIENT_ROWS rows: products[i] = sum of G[i] * W[i], then G[i] times scale[i]."""
    p = _read_scale(args, thread)
    width = p.width
    whole = width // LANES * LANES
    for row in range(task * GRADIENT_ROWS, min((task + 1) * GRADIENT_ROWS, p.count)):
        g, w = p.gradient + row * p.g_bytes, p.weight + row * p.w_bytes
        factor = load_float(p.scale + 4 * row)
        total = splat(_ZERO)
        for start in range(0, whole, LANES * 16):
            part = splat(_ZERO)
            for k in range(start, min(start + LANES * 16, whole), LANES):
                value = load(g + 4 * k)
                part = fma(value, load(w + 4 * k), part)
                store(g + 4 * k, value * splat(factor))
            total = total + part
        one = sum_lanes(total)
        for k in range(whole, width):
            number = load_float(g + 4 * k)
            one += number * load_float(w + 4 * k)
            store_float(g + 4 * k, number * factor)
        store_float(p.products + 4 * row, one)
