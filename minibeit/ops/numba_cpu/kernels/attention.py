"""Attention of one head of one image, a tile of query rows at a time."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..attention import QUERY_ROWS
from ..target import LANES, MR, NR, STEPS
from .micro import multiply_tile
from .pack import pack_panel
from .vector import (
    arguments,
    exp,
    load,
    load_float,
    max_lanes,
    maximum,
    splat,
    store,
    store_float,
    sum_lanes,
)  # fmt: skip

_ZERO, _LOW = np.float32(0), np.float32(-np.inf)


@njit(error_model="numpy")
def _pack_keys(keys, row_bytes, count, size, panels):
    """Keys (N, d) as panels of NR tokens: (ceil(N / NR), d, NR), zeros beyond the last token."""
    for first in range(0, count, NR):
        rows = min(NR, count - first)
        pack_panel(keys + first * row_bytes, row_bytes, 4, rows, size, panels + first * size * 4, 0)


@njit(error_model="numpy")
def _pack_values(values, row_bytes, count, size, panels):
    """Values (N, d) as panels of NR columns: (ceil(d / NR), N, NR), zeros beyond the last column."""
    for first in range(0, size, NR):
        panel, columns = panels + first * count * 4, min(NR, size - first)
        whole = columns // LANES * LANES
        for k in range(count):
            row, target = values + k * row_bytes + 4 * first, panel + k * NR * 4
            for j in range(0, whole, LANES):
                store(target + 4 * j, load(row + 4 * j))
            for j in range(whole, columns):
                store_float(target + 4 * j, load_float(row + 4 * j))
            for j in range(columns, NR):
                store_float(target + 4 * j, _ZERO)


@njit(error_model="numpy")
def _scale_row(source, size, factor, target):
    """target = source * factor, both of `size` numbers."""
    whole = size // LANES * LANES
    for e in range(0, whole, LANES):
        store(target + 4 * e, load(source + 4 * e) * splat(factor))
    for e in range(whole, size):
        store_float(target + 4 * e, load_float(source + 4 * e) * factor)


@njit(error_model="numpy")
def _reverse_table(table, table_bytes, head, offsets, reversed_):
    """One head's column of the bias table, last offset first, so that the bias of one query row lies in runs."""
    for r in range(offsets):
        store_float(reversed_ + 4 * (offsets - 1 - r), load_float(table + r * table_bytes + 4 * head))
    for j in range(LANES):
        store_float(reversed_ + 4 * (offsets + j), _ZERO)


@njit(error_model="numpy")
def _bias_row(scores, query, rows, columns, reversed_, to_cls, row0, corner):
    """Bias of one query row over all tokens.

    Against the patches of one grid row the offsets fall by one from patch to patch: a run of the reversed table.  Runs
    are copied in whole vectors, each overwriting what the one before wrote too much.
    """
    if query == 0:
        store_float(scores, corner)
        for k in range(1, rows * columns + 1):
            store_float(scores + 4 * k, row0)
        return
    y, x = (query - 1) // columns, (query - 1) % columns
    store_float(scores, to_cls)
    width = 2 * columns - 1
    index = (y + rows - 1) * width + x + columns - 1  # of the first row of patches; each further row is `width` before
    run_ = reversed_ + 4 * ((2 * rows - 1) * width - 1 - index)
    target = scores + 4
    for _ in range(rows):
        for k in range(0, columns, LANES):
            store(target + 4 * k, load(run_ + 4 * k))
        run_ += 4 * width
        target += 4 * columns


@njit(error_model="numpy")
def _softmax_row(scores, count, padded_count):
    """exp(s - max s) in place, zeros beyond the last token; returns the sum.  A NaN anywhere makes the sum NaN."""
    for k in range(count, padded_count):
        store_float(scores + 4 * k, _LOW)
    largest = load(scores)
    for k in range(LANES, padded_count, LANES):
        largest = maximum(load(scores + 4 * k), largest)
    top = splat(max_lanes(largest))
    total = splat(_ZERO)
    for k in range(0, padded_count, LANES):
        value = exp(load(scores + 4 * k) - top)
        total = total + value
        store(scores + 4 * k, value)
    return sum_lanes(total)


@njit(error_model="numpy")
def _store_context(tile, count, size, factors, context, context_bytes):
    """Context rows = tile / sum of the row's exponentials."""
    for i in range(count):
        _scale_row(tile + i * NR * 4, min(size, NR), load_float(factors + 4 * i), context + i * context_bytes)


def attention(args, task, thread):
    """One head of one image, up to QUERY_ROWS query rows."""
    (
        scratch, scratch_bytes, q, k, v, context, heads, count, size, chunks, image_bytes, head_bytes, row_bytes,
        context_bytes, scale_at, table, table_bytes, grid_rows, grid_columns,
    ) = arguments(args, 19)  # fmt: skip
    scratch = scratch + thread * scratch_bytes

    image, head, chunk = task // (heads * chunks), task // chunks % heads, task % chunks
    offset = image * image_bytes + head * head_bytes
    padded_count = (count + NR - 1) // NR * NR
    value_panels = (size + NR - 1) // NR
    scale = load_float(scale_at)

    keys = scratch
    values = keys + padded_count * size * 4
    queries = values + value_panels * count * NR * 4
    score_bytes = padded_count * 4 + 64  # not a power of two
    scores = queries + MR * size * 4
    tile = scores + MR * score_bytes + 64
    factors = tile + MR * NR * 4
    reversed_ = factors + MR * 4

    _pack_keys(k + offset, row_bytes, count, size, keys)
    _pack_values(v + offset, row_bytes, count, size, values)
    to_cls = row0 = corner = _ZERO
    if table != 0:
        offsets = (2 * grid_rows - 1) * (2 * grid_columns - 1)
        _reverse_table(table, table_bytes, head, offsets, reversed_)
        row0 = load_float(table + offsets * table_bytes + 4 * head)
        to_cls = load_float(table + (offsets + 1) * table_bytes + 4 * head)
        corner = load_float(table + (offsets + 2) * table_bytes + 4 * head)

    first_row = chunk * QUERY_ROWS
    last_row = min(first_row + QUERY_ROWS, count)
    for row in range(first_row, last_row, MR):
        n = min(MR, last_row - row)
        for i in range(n):
            _scale_row(q + offset + (row + i) * row_bytes, size, scale, queries + i * size * 4)
            if table != 0:
                _bias_row(scores + i * score_bytes, row + i, grid_rows, grid_columns, reversed_, to_cls, row0, corner)
        for panel in range(padded_count // NR):
            b, here = keys + panel * size * NR * 4, scores + panel * NR * 4
            addend = here if table != 0 else 0
            multiply_tile(n, queries, size * 4, b, NR * 4, here, score_bytes, size, addend, score_bytes, b, 0)
        for i in range(n):
            total = _softmax_row(scores + i * score_bytes, count, padded_count)
            store_float(factors + 4 * i, np.float32(1) / total)
        for panel in range(value_panels):
            b = values + panel * count * NR * 4
            for step in range(0, count, STEPS):
                multiply_tile(
                    n, scores + 4 * step, score_bytes, b + step * NR * 4, NR * 4, tile, NR * 4,
                    min(STEPS, count - step), tile if step > 0 else 0, NR * 4, b, 0,
                )  # fmt: skip
            target = context + (image * count + row) * context_bytes + (head * size + panel * NR) * 4
            _store_context(tile, n, size - panel * NR, factors, target, context_bytes)
