"""Backward of attention for one head of one image; probabilities are made again, some query rows at a time."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..gradient_arguments import ATTENTION_BACKWARD, QUERY_ROWS
from ..target import LANES, MR, NR, STEPS
from .attention import _exponentials, _pack_keys, _pack_values, _scale_row, bias_row, largest_score, read_bias
from .micro import multiply_narrow_tile, multiply_tile
from .vector import (
    first_lanes,
    fma,
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
_read = reader(ATTENTION_BACKWARD)


@njit(error_model="numpy")
def _multiply(rows, a, a_bytes, steps, panels, columns, c, c_bytes, onto):
    """C (rows, columns) = A @ B, added to C if `onto`; B in panels of NR columns, the last ones of LANES."""
    whole = columns // NR * NR
    for first in range(0, columns, NR):
        if first < whole:
            for step in range(0, steps, STEPS):
                b, here = panels + (first * steps + step * NR) * 4, c + 4 * first
                addend = here if onto != 0 or step > 0 else 0
                length = min(STEPS, steps - step)
                multiply_tile(rows, a + 4 * step, a_bytes, b, here, c_bytes, length, addend, c_bytes, b, 0, b, 0)
    for first in range(whole, columns, LANES):
        for step in range(0, steps, STEPS):
            b, here = panels + (first * steps + step * LANES) * 4, c + 4 * first
            addend = here if onto != 0 or step > 0 else 0
            length = min(STEPS, steps - step)
            multiply_narrow_tile(rows, a + 4 * step, a_bytes, b, here, c_bytes, length, addend, c_bytes, b, 0, b, 0)


@njit(error_model="numpy")
def _normalise(scores, count, padded_count):
    """Scores of one row become probabilities, zeros beyond the last token."""
    total = _exponentials(scores, count, padded_count, largest_score(scores, count, padded_count))
    _scale_row(scores, padded_count, _ONE / total, scores)


@njit(error_model="numpy")
def _softmax_gradient(probs, gradient, padded_count):
    """gradient = P (gradient - sum of P gradient), for one row."""
    total = splat(_ZERO)
    for k in range(0, padded_count, LANES):
        total = fma(load(probs + 4 * k), load(gradient + 4 * k), total)
    mean = splat(sum_lanes(total))
    for k in range(0, padded_count, LANES):
        store(gradient + 4 * k, load(probs + 4 * k) * (load(gradient + 4 * k) - mean))


@njit(error_model="numpy")
def _add_to(address, value):
    store_float(address, load_float(address) + value)


@njit(error_model="numpy")
def _add_bias_row(gradient, query, rows, columns, bins, offsets):
    """Adds one query row to the gradient of a head's table: its offsets, last first, LANES spare numbers, the rest."""
    others = bins + 4 * (offsets + LANES)
    if query == 0:
        _add_to(others + 8, load_float(gradient))
        total = _ZERO
        for k in range(1, rows * columns + 1):
            total += load_float(gradient + 4 * k)
        _add_to(others, total)
        return
    y, x = (query - 1) // columns, (query - 1) % columns
    _add_to(others + 4, load_float(gradient))
    width = 2 * columns - 1
    index = (y + rows - 1) * width + x + columns - 1  # see bias_row
    run_, source = bins + 4 * ((2 * rows - 1) * width - 1 - index), gradient + 4
    for _ in range(rows):
        for k in range(0, columns, LANES):
            value = first_lanes(load(source + 4 * k), columns - k, splat(_ZERO))
            store(run_ + 4 * k, load(run_ + 4 * k) + value)
        run_ += 4 * width
        source += 4 * columns


@njit(error_model="numpy")
def _turn(source, source_bytes, rows, columns, target, target_bytes):
    """target (columns, rows) = source (rows, columns) turned, in whole blocks of LANES x LANES."""
    for column in range(0, columns, LANES):
        for row in range(0, rows, LANES):
            here = target + column * target_bytes + 4 * row
            transpose(source + row * source_bytes + 4 * column, source_bytes, here, target_bytes, splat(_ONE))


def attention_backward(args, task, thread):
    """One head of one image: dq, dk, dv and its share of the table's gradient."""
    p = _read(args, thread)
    heads, count, size, table, bins = p.heads, p.count, p.size, p.table, p.bins
    row_bytes, g_bytes, d_row_bytes, table_bytes = p.row_bytes, p.g_bytes, p.d_row_bytes, p.table_bytes
    grid_rows, grid_columns, scale_at = p.grid_rows, p.grid_columns, p.scale
    image, head = task // heads, task % heads
    offset = image * p.image_bytes + head * p.head_bytes
    d_offset = image * p.d_image_bytes + head * p.d_head_bytes
    q, k, v = p.q + offset, p.k + offset, p.v + offset
    dq, dk, dv = p.dq + d_offset, p.dk + d_offset, p.dv + d_offset
    g = p.g + image * count * g_bytes + head * size * 4
    scale = load_float(scale_at)
    padded_count = (count + LANES - 1) // LANES * LANES
    padded_size = (size + LANES - 1) // LANES * LANES
    score_bytes, turned_bytes, sum_bytes = padded_count * 4 + 64, QUERY_ROWS * 4 + 64, padded_size * 4

    keys = p.scratch  # scaled, a panel being some tokens
    values = keys + padded_count * size * 4
    key_columns = values + padded_count * size * 4  # a panel being some of the d columns
    g_columns = key_columns + padded_size * count * 4
    query_columns = g_columns + padded_size * QUERY_ROWS * 4
    probs = query_columns + padded_size * QUERY_ROWS * 4
    gradient = probs + QUERY_ROWS * score_bytes
    probs_turned = gradient + QUERY_ROWS * score_bytes
    gradient_turned = probs_turned + padded_count * turned_bytes
    dk_sums = gradient_turned + padded_count * turned_bytes
    dv_sums = dk_sums + count * sum_bytes
    tile = dv_sums + count * sum_bytes
    reversed_ = tile + MR * sum_bytes

    _pack_keys(k, row_bytes, count, size, keys, scale_at)
    _pack_keys(v, row_bytes, count, size, values, 0)
    _pack_values(k, row_bytes, count, size, key_columns)
    to_cls = row0 = corner = _ZERO
    offsets = (2 * grid_rows - 1) * (2 * grid_columns - 1)
    if table != 0:
        row0, to_cls, corner = read_bias(table, table_bytes, head, grid_rows, grid_columns, reversed_)
        bins += task * (offsets + 2 * LANES) * 4
        for j in range(offsets + 2 * LANES):
            store_float(bins + 4 * j, _ZERO)

    for first in range(0, count, QUERY_ROWS):
        some = min(QUERY_ROWS, count - first)
        _pack_values(g + first * g_bytes, g_bytes, some, size, g_columns)
        _pack_values(q + first * row_bytes, row_bytes, some, size, query_columns)
        for row in range(0, some, MR):
            n = min(MR, some - row)
            scores, ds = probs + row * score_bytes, gradient + row * score_bytes
            if table != 0:
                for i in range(n):
                    bias_row(
                        scores + i * score_bytes, first + row + i, grid_rows, grid_columns, reversed_, to_cls, row0,
                        corner,
                    )  # fmt: skip
            queries = q + (first + row) * row_bytes
            _multiply(n, queries, row_bytes, size, keys, count, scores, score_bytes, 1 if table != 0 else 0)
            _multiply(n, g + (first + row) * g_bytes, g_bytes, size, values, count, ds, score_bytes, 0)
            for i in range(n):
                _normalise(scores + i * score_bytes, count, padded_count)
                _softmax_gradient(scores + i * score_bytes, ds + i * score_bytes, padded_count)
                if table != 0:
                    _add_bias_row(ds + i * score_bytes, first + row + i, grid_rows, grid_columns, bins, offsets)
            _multiply(n, ds, score_bytes, count, key_columns, size, tile, sum_bytes, 0)
            for i in range(n):
                _scale_row(tile + i * sum_bytes, size, scale, dq + (first + row + i) * d_row_bytes)
        _turn(probs, score_bytes, some, padded_count, probs_turned, turned_bytes)
        _turn(gradient, score_bytes, some, padded_count, gradient_turned, turned_bytes)
        for row in range(0, count, MR):
            n, at, sums = min(MR, count - row), row * turned_bytes, row * sum_bytes
            _multiply(n, probs_turned + at, turned_bytes, some, g_columns, size, dv_sums + sums, sum_bytes, first)
            _multiply(
                n, gradient_turned + at, turned_bytes, some, query_columns, size, dk_sums + sums, sum_bytes, first
            )  # fmt: skip
    for row in range(count):
        _scale_row(dv_sums + row * sum_bytes, size, _ONE, dv + row * d_row_bytes)
        _scale_row(dk_sums + row * sum_bytes, size, scale, dk + row * d_row_bytes)
