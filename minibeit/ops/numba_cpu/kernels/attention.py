"""Attention of one head of one image, a tile of query rows at a time."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..arguments import ATTENTION
from ..target import LANES, MR, NR, STEPS
from .micro import multiply_narrow_tile, multiply_tile, prefetch
from .pack import pack_panel
from .vector import (
    exp,
    first_lanes,
    load,
    load_float,
    max_lanes,
    maximum,
    reader,
    splat,
    store,
    store_float,
    sum_lanes,
)  # fmt: skip

_ZERO, _LOW = np.float32(0), np.float32(-np.inf)
_read = reader(ATTENTION)


# Columns beyond the last whole panel of NR go by panels of LANES: 197 keys are three of 64 and one of 16.


@njit(error_model="numpy")
def _pack_keys(keys, row_bytes, count, size, panels, scale):
    """Keys (N, d) times the element at `scale` as panels (d, NR or LANES) of tokens, zeros beyond the last token."""
    whole = count // NR * NR
    for first in range(0, whole, NR):
        pack_panel(keys + first * row_bytes, row_bytes, 4, NR, size, panels + first * size * 4, NR, scale, 0)
    for first in range(whole, count, LANES):
        rows, source = min(LANES, count - first), keys + first * row_bytes
        pack_panel(source, row_bytes, 4, rows, size, panels + first * size * 4, LANES, scale, 0)


@njit(error_model="numpy")
def _pack_values(values, row_bytes, count, size, panels):
    """Values (N, d) as panels (N, NR or LANES) of columns, zeros beyond the last column."""
    whole = size // NR * NR
    for k in range(count):
        row = values + k * row_bytes
        for first in range(0, whole, NR):
            for j in range(0, NR, LANES):
                store(panels + (first * count + k * NR + j) * 4, load(row + 4 * (first + j)))
        for first in range(whole, size, LANES):
            target, columns = panels + (first * count + k * LANES) * 4, min(LANES, size - first)
            if columns == LANES:
                store(target, load(row + 4 * first))
                continue
            store(target, splat(_ZERO))
            for j in range(columns):
                store_float(target + 4 * j, load_float(row + 4 * (first + j)))


@njit(error_model="numpy")
def _scale_row(source, size, factor, target):
    """target = source * factor, both of `size` elements."""
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
def read_bias(table, table_bytes, head, rows, columns, reversed_):
    """One head of the bias table: its offsets reversed; returns (CLS to patches, patches to CLS, CLS to CLS)."""
    offsets = (2 * rows - 1) * (2 * columns - 1)
    _reverse_table(table, table_bytes, head, offsets, reversed_)
    ends = table + offsets * table_bytes + 4 * head
    return load_float(ends), load_float(ends + table_bytes), load_float(ends + 2 * table_bytes)


@njit(error_model="numpy")
def bias_row(scores, query, rows, columns, reversed_, to_cls, row0, corner):
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
def last_scores(scores, count, tail):
    """The scores from `tail` on, -inf beyond the last token."""
    return first_lanes(load(scores + 4 * tail), count - tail, splat(_LOW))


@njit(error_model="numpy")
def largest_score(scores, count, padded_count):
    """max s of one row."""
    tail = padded_count - LANES
    largest = last_scores(scores, count, tail)
    for k in range(0, tail, LANES):
        largest = maximum(load(scores + 4 * k), largest)
    return max_lanes(largest)


@njit(error_model="numpy")
def _exponentials(scores, count, padded_count, largest):
    """exp(s - max s) in place, zeros beyond the last token; returns the sum.  A NaN anywhere makes the sum NaN."""
    tail, top = padded_count - LANES, splat(largest)
    total = exp(last_scores(scores, count, tail) - top)
    store(scores + 4 * tail, total)
    for k in range(0, tail, LANES):
        value = exp(load(scores + 4 * k) - top)
        total = total + value
        store(scores + 4 * k, value)
    return sum_lanes(total)


@njit(error_model="numpy")
def store_context(tile, count, columns, factors, context, context_bytes):
    """Context rows = tile / sum of the row's exponentials."""
    for i in range(count):
        _scale_row(tile + i * NR * 4, columns, load_float(factors + 4 * i), context + i * context_bytes)


@njit(error_model="numpy")
def _weigh_values(n, scores, score_bytes, count, values, width, tile, context, context_bytes):
    """tile = the scores of n rows @ one panel of values, NR or LANES wide; it will go to `context`."""
    for step in range(0, count, STEPS):
        a, b, length = scores + 4 * step, values + step * width * 4, min(STEPS, count - step)
        sums = tile if step > 0 else 0
        if width == NR:
            multiply_tile(
                n, a, score_bytes, b, tile, NR * 4, length, sums, NR * 4, b, 0, context, context_bytes
            )  # fmt: skip
        else:
            multiply_narrow_tile(
                n, a, score_bytes, b, tile, NR * 4, length, sums, NR * 4, b, 0, context, context_bytes
            )  # fmt: skip


@njit(error_model="numpy")
def prefetch_rows(address, row_bytes, count, size):
    """Prefetches `count` rows of `size` elements, which lie too far apart for the CPU to foresee."""
    for i in range(count):
        for byte in range(0, 4 * size, 64):
            prefetch(address + i * row_bytes + byte)


def attention(args, task, thread):
    """One head of one image, `query_rows` query rows or what is left of them."""
    p = _read(args, thread)
    count, size, row_bytes, context_bytes = p.count, p.size, p.row_bytes, p.context_bytes
    table, table_bytes, grid_rows, grid_columns = p.table, p.table_bytes, p.grid_rows, p.grid_columns

    chunks = (count + p.query_rows - 1) // p.query_rows
    image, head, chunk = task // (p.heads * chunks), task // chunks % p.heads, task % chunks
    offset = image * p.image_bytes + head * p.head_bytes
    # Where the next head lies, after the last chunk most likely this thread's next task.
    following = offset + p.head_bytes if head + 1 < p.heads else (image + 1) * p.image_bytes
    padded_count = (count + LANES - 1) // LANES * LANES
    padded_size = (size + LANES - 1) // LANES * LANES

    keys = p.scratch
    values = keys + padded_count * size * 4
    score_bytes = padded_count * 4 + 64  # not a power of two
    scores = values + padded_size * count * 4
    tile = scores + MR * score_bytes + 64
    factors = tile + MR * NR * 4
    reversed_ = factors + MR * 4

    _pack_keys(p.k + offset, row_bytes, count, size, keys, p.scale)
    _pack_values(p.v + offset, row_bytes, count, size, values)
    to_cls = row0 = corner = _ZERO
    if table != 0:
        row0, to_cls, corner = read_bias(table, table_bytes, head, grid_rows, grid_columns, reversed_)

    first_row = chunk * p.query_rows
    last_row = min(first_row + p.query_rows, count)
    whole_keys, whole_values = count // NR * NR, size // NR * NR
    for row in range(first_row, last_row, MR):
        n, queries = min(MR, last_row - row), p.q + offset + row * row_bytes
        target = p.context + (image * count + row) * context_bytes + head * size * 4
        if chunk == chunks - 1:
            for part in (p.q, p.k, p.v):
                prefetch_rows(part + following + row * row_bytes, row_bytes, n, size)
        if table != 0:
            for i in range(n):
                bias_row(scores + i * score_bytes, row + i, grid_rows, grid_columns, reversed_, to_cls, row0, corner)
        for first in range(0, whole_keys, NR):
            b, here = keys + first * size * 4, scores + 4 * first
            more = here if table != 0 else 0
            multiply_tile(n, queries, row_bytes, b, here, score_bytes, size, more, score_bytes, b, 0, b, 0)
        for first in range(whole_keys, count, LANES):
            b, here = keys + first * size * 4, scores + 4 * first
            more = here if table != 0 else 0
            multiply_narrow_tile(n, queries, row_bytes, b, here, score_bytes, size, more, score_bytes, b, 0, b, 0)
        for i in range(n):  # of all rows first: no row's exponentials wait for a maximum
            store_float(factors + 4 * i, largest_score(scores + i * score_bytes, count, padded_count))
        for i in range(n):
            largest = load_float(factors + 4 * i)
            total = _exponentials(scores + i * score_bytes, count, padded_count, largest)
            store_float(factors + 4 * i, np.float32(1) / total)
        for first in range(0, whole_values, NR):
            here = target + 4 * first
            _weigh_values(n, scores, score_bytes, count, values + first * count * 4, NR, tile, here, context_bytes)
            store_context(tile, n, NR, factors, here, context_bytes)
        for first in range(whole_values, size, LANES):
            here = target + 4 * first
            _weigh_values(n, scores, score_bytes, count, values + first * count * 4, LANES, tile, here, context_bytes)
            store_context(tile, n, min(LANES, size - first), factors, here, context_bytes)
