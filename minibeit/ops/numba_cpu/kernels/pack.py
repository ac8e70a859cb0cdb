"""One panel of packed weights."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..target import NR
from .vector import arguments, load_float, store_float

_ZERO, _ONE = np.float32(0), np.float32(1)
_BLOCK = 16  # numbers of a row at a time: a cache line is read, and the lines that are written stay in the cache


@njit(error_model="numpy")
def pack_panel(source, row_bytes, step_bytes, rows, steps, panel, scale):
    """Panel (steps, NR) of `rows` rows of `steps` numbers, times `scale` (rows,) unless 0; zeros beyond the rows."""
    for first in range(0, steps, _BLOCK):
        last = min(first + _BLOCK, steps)
        for j in range(rows):
            factor = load_float(scale + 4 * j) if scale != 0 else _ONE
            row = source + j * row_bytes
            for k in range(first, last):
                store_float(panel + (k * NR + j) * 4, load_float(row + k * step_bytes) * factor)
        for j in range(rows, NR):
            for k in range(first, last):
                store_float(panel + (k * NR + j) * 4, _ZERO)


def pack(args, task, thread):
    """Copies rows task * NR ... of a matrix (out, in) into panel `task`, times the row's scale if there is one."""
    _, _, matrix, row_bytes, out, steps, step_bytes, panel_at, scale = arguments(args, 9)
    row = task * NR
    pack_panel(
        matrix + row * row_bytes, row_bytes, step_bytes, min(NR, out - row), steps, panel_at + row * steps * 4,
        scale + 4 * row if scale != 0 else 0,
    )  # fmt: skip
