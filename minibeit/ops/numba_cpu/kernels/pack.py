"""One panel of packed weights."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..target import LANES, NR
from .vector import arguments, load, load_float, splat, store_float, transpose

_ZERO, _ONE = np.float32(0), np.float32(1)
_BLOCK = 16  # numbers of a row at a time: a cache line is read, and the lines that are written stay in the cache


@njit(error_model="numpy")
def pack_panel(source, row_bytes, step_bytes, rows, steps, panel, width, scale, scale_bytes):
    """Panel (steps, width) of `rows` rows of `steps` numbers; zeros beyond the rows.

    Row j is multiplied by the number at scale + j * scale_bytes (0 or 4), unless `scale` is 0.
    """
    whole = rows // LANES * LANES if step_bytes == 4 else 0  # rows that go by blocks of LANES x LANES numbers
    for first in range(0, steps, _BLOCK):
        last = min(first + _BLOCK, steps)
        whole_steps = first + (last - first) // LANES * LANES
        for j in range(0, whole, LANES):
            factors = splat(load_float(scale) if scale != 0 else _ONE)
            if scale_bytes != 0 and scale != 0:
                factors = load(scale + j * scale_bytes)
            for k in range(first, whole_steps, LANES):
                target = panel + (k * width + j) * 4
                transpose(source + j * row_bytes + k * 4, row_bytes, target, width * 4, factors)
        for j in range(rows):
            factor = load_float(scale + j * scale_bytes) if scale != 0 else _ONE
            row = source + j * row_bytes
            for k in range(whole_steps if j < whole else first, last):
                store_float(panel + (k * width + j) * 4, load_float(row + k * step_bytes) * factor)
        for j in range(rows, width):
            for k in range(first, last):
                store_float(panel + (k * width + j) * 4, _ZERO)


def pack(args, task, thread):
    """Copies rows task * NR ... of a matrix (out, in) into panel `task`, times the row's scale if there is one."""
    _, _, matrix, panel_at, scale, row_bytes, out, steps, step_bytes = arguments(args, 9)
    row = task * NR
    pack_panel(
        matrix + row * row_bytes, row_bytes, step_bytes, min(NR, out - row), steps, panel_at + row * steps * 4, NR,
        scale + 4 * row if scale != 0 else 0, 4,
    )  # fmt: skip
