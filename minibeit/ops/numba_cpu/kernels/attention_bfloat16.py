"""Attention whose products are of bfloat16: as `attention`, with pairs of elements for every step of a sum."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..low_arguments import ATTENTION_BFLOAT16
from ..target import LANES, MR, NR
from .attention import bias_row, largest_score, last_scores, prefetch_rows, read_bias, store_context
from .low_precision import multiply_bfloat16, multiply_narrow_bfloat16, store_bfloat16, store_bfloat16_pairs
from .pack import pack_panel
from .vector import exp, load, load_float, reader, splat, store_float, sum_lanes

_ZERO = np.float32(0)
_read = reader(ATTENTION_BFLOAT16)


@njit(error_model="numpy")
def _round_row(source, size, factor, tail, target):
    """A row of `size` elements times a factor as bfloat16, in whole vectors, zeros behind the last element."""
    whole = size // LANES * LANES
    for e in range(0, whole, LANES):
        store_bfloat16(target + 2 * e, load(source + 4 * e) * splat(factor))
    if whole < size:
        store_bfloat16(target + 2 * whole, _row_end(source + 4 * whole, size - whole, tail) * splat(factor))


@njit(error_model="numpy")
def _row_end(source, count, tail):
    """The last elements of a row as a vector, zeros behind them."""
    for k in range(LANES):
        store_float(tail + 4 * k, load_float(source + 4 * k) if k < count else _ZERO)
    return load(tail)


@njit(error_model="numpy")
def _pack_keys(keys, row_bytes, count, size, factor, rows, short_bytes, tail, panels):
    """Keys (N, d) times a factor as panels (d / 2, NR or LANES) of pairs of elements of a token."""
    pairs, whole = (size + 1) // 2, count // NR * NR
    for i in range(count):
        _round_row(keys + i * row_bytes, size, factor, tail, rows + i * short_bytes)
    for first in range(0, whole, NR):  # a pair is moved as if it were a float32
        pack_panel(rows + first * short_bytes, short_bytes, 4, NR, pairs, panels + first * pairs * 4, NR, 0, 0)
    for first in range(whole, count, LANES):
        n, source = min(LANES, count - first), rows + first * short_bytes
        pack_panel(source, short_bytes, 4, n, pairs, panels + first * pairs * 4, LANES, 0, 0)


@njit(error_model="numpy")
def _pack_values(values, row_bytes, count, size, tail, panels):
    """Values (N, d) as panels (N / 2, NR or LANES) of pairs of tokens, zeros for a last token that is missing."""
    pairs, whole = (count + 1) // 2, size // NR * NR
    for pair in range(pairs):
        upper = values + 2 * pair * row_bytes
        lower, both = upper + row_bytes, 2 * pair + 1 < count
        for first in range(0, size, LANES):
            width = NR if first < whole else LANES
            panel = first // NR * NR if first < whole else first
            target = panels + (panel * pairs + pair * width + first - panel) * 4
            here = 4 * first
            if first + LANES <= size:
                low = load(lower + here) if both else splat(_ZERO)
                store_bfloat16_pairs(target, load(upper + here), low)
            else:
                high = _row_end(upper + here, size - first, tail)
                low = _row_end(lower + here, size - first, tail) if both else splat(_ZERO)
                store_bfloat16_pairs(target, high, low)


@njit(error_model="numpy")
def _exponentials(scores, count, padded_count, largest):
    """exp(s - max s) as bfloat16, from where the scores begin; returns the float32 sum."""
    tail, top = padded_count - LANES, splat(largest)
    last = exp(last_scores(scores, count, tail) - top)
    total = last
    for k in range(0, tail, LANES):
        value = exp(load(scores + 4 * k) - top)
        total = total + value
        store_bfloat16(scores + 2 * k, value)  # over scores that have been read
    store_bfloat16(scores + 2 * tail, last)
    return sum_lanes(total)


def attention_bfloat16(args, task, thread):
    """One head of one image, `query_rows` query rows or what is left of them."""
    p = _read(args, thread)
    count, size, row_bytes, context_bytes = p.count, p.size, p.row_bytes, p.context_bytes
    table, table_bytes, grid_rows, grid_columns = p.table, p.table_bytes, p.grid_rows, p.grid_columns

    chunks = (count + p.query_rows - 1) // p.query_rows
    image, head, chunk = task // (p.heads * chunks), task // chunks % p.heads, task % chunks
    offset = image * p.image_bytes + head * p.head_bytes
    following = offset + p.head_bytes if head + 1 < p.heads else (image + 1) * p.image_bytes
    padded_count = (count + LANES - 1) // LANES * LANES
    padded_size = (size + LANES - 1) // LANES * LANES
    pairs, token_pairs, short_bytes = (size + 1) // 2, (count + 1) // 2, 2 * padded_size

    keys = p.scratch
    values = keys + padded_count * pairs * 4
    score_bytes = padded_count * 4 + 64  # not a power of two
    scores = values + padded_size * token_pairs * 4
    tile = scores + MR * score_bytes + 64
    factors = tile + MR * NR * 4
    tail = factors + MR * 4
    rows = tail + LANES * 4
    reversed_ = rows + count * short_bytes

    _pack_keys(p.k + offset, row_bytes, count, size, load_float(p.scale), rows, short_bytes, tail, keys)
    _pack_values(p.v + offset, row_bytes, count, size, tail, values)
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
        for i in range(n):  # the keys' rows have been packed: the queries' lie in their place
            _round_row(queries + i * row_bytes, size, np.float32(1), tail, rows + i * short_bytes)
        if table != 0:
            for i in range(n):
                bias_row(scores + i * score_bytes, row + i, grid_rows, grid_columns, reversed_, to_cls, row0, corner)
        for first in range(0, whole_keys, NR):
            b, here = keys + first * pairs * 4, scores + 4 * first
            more = here if table != 0 else 0
            multiply_bfloat16(n, rows, short_bytes, b, here, score_bytes, pairs, more, score_bytes, b, 0, b, 0)
        for first in range(whole_keys, count, LANES):
            b, here = keys + first * pairs * 4, scores + 4 * first
            more = here if table != 0 else 0
            multiply_narrow_bfloat16(n, rows, short_bytes, b, here, score_bytes, pairs, more, score_bytes, b, 0, b, 0)
        for i in range(n):  # of all rows first: no row's exponentials wait for a maximum
            store_float(factors + 4 * i, largest_score(scores + i * score_bytes, count, padded_count))
        for i in range(n):
            total = _exponentials(scores + i * score_bytes, count, padded_count, load_float(factors + 4 * i))
            store_float(factors + 4 * i, np.float32(1) / total)
        for first in range(0, whole_values, NR):
            b, here = values + first * token_pairs * 4, target + 4 * first
            multiply_bfloat16(
                n, scores, score_bytes, b, tile, NR * 4, token_pairs, 0, 0, b, 0, here, context_bytes
            )  # fmt: skip
            store_context(tile, n, NR, factors, here, context_bytes)
        for first in range(whole_values, size, LANES):
            b, here = values + first * token_pairs * 4, target + 4 * first
            multiply_narrow_bfloat16(
                n, scores, score_bytes, b, tile, NR * 4, token_pairs, 0, 0, b, 0, here, context_bytes
            )  # fmt: skip
            store_context(tile, n, min(LANES, size - first), factors, here, context_bytes)
