"""Softmax of the rows of logits, for losses of many rows: a row is copied to where it can be read in whole vectors."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..gradient_arguments import LOG_SUMS, LOSS_ROWS, SOFTMAX_GRADIENT
from ..target import LANES
from .attention import _exponentials, largest_score
from .vector import exp, load, load_float, reader, splat, store, store_float

_ZERO = np.float32(0)
_read_sums, _read_gradient = reader(LOG_SUMS), reader(SOFTMAX_GRADIENT)


@njit(error_model="numpy")
def _copy(source, target, width):
    whole = width // LANES * LANES
    for k in range(0, whole, LANES):
        store(target + 4 * k, load(source + 4 * k))
    for k in range(whole, width):
        store_float(target + 4 * k, load_float(source + 4 * k))


def log_sums(args, task, thread):
    """For LOSS_ROWS rows the largest element, and the sum of exp(element - largest)."""
    p = _read_sums(args, thread)
    row, width = p.scratch, p.width
    padded = (width + LANES - 1) // LANES * LANES
    for i in range(task * LOSS_ROWS, min((task + 1) * LOSS_ROWS, p.count)):
        _copy(p.logits + i * p.row_bytes, row, width)
        largest = largest_score(row, width, padded)
        store_float(p.largest + 4 * i, largest)
        store_float(p.sums + 4 * i, _exponentials(row, width, padded, largest))


def softmax_gradient(args, task, thread):
    """For LOSS_ROWS rows exp(logits - log_sums) times the row's factor."""
    p = _read_gradient(args, thread)
    row, width = p.scratch, p.width
    for i in range(task * LOSS_ROWS, min((task + 1) * LOSS_ROWS, p.count)):
        factor, log_sum, rest = (
            load_float(p.factors + 4 * i),
            load_float(p.log_sums + 4 * i),
            load_float(p.rests + 4 * i),
        )
        _copy(p.logits + i * p.row_bytes, row, width)
        for k in range(0, width, LANES):
            value = exp(load(row + 4 * k) - splat(log_sum) - splat(rest)) * splat(factor)
            store(row + 4 * k, value if factor != _ZERO else splat(_ZERO))
        _copy(row, p.y + 4 * i * width, width)
