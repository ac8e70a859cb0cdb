"""One panel of packed weights."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..arguments import PACK
from ..target import LANES, NR
from .vector import load, load_float, reader, splat, store_float, transpose

_ZERO, _ONE = np.float32(0), np.float32(1)
_BLOCK = 16  # elements of a row at a time: a cache line is read, and the lines that are written stay in the cache
_read = reader(PACK)


@njit(error_model="numpy")
def pack_panel(source, row_bytes, step_bytes, rows, steps, panel, width, scale, scale_bytes):
    """Panel (steps, width) of `rows` rows of `steps` elements; zeros beyond the rows.

    Row j is multiplied by the element at scale + j * scale_bytes (0 or 4), unless `scale` is 0.
    """
    whole = rows // LANES * LANES if step_bytes == 4 else 0  # rows that go by blocks of LANES x LANES elements
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
    p = _read(args, thread)
    row = task * NR
    pack_panel(
        p.matrix + row * p.row_bytes, p.row_bytes, p.step_bytes, min(NR, p.out - row), p.steps,
        p.panels + row * p.steps * 4, NR, p.scale + 4 * row if p.scale != 0 else 0, 4,
    )  # fmt: skip
