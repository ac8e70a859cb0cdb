"""One panel of packed weights."""

from __future__ import annotations

import numpy as np

from ..target import NR
from .vector import arguments, load_float, store_float

_ZERO, _ONE = np.float32(0), np.float32(1)
_BLOCK = 16  # numbers of a row in a row: a cache line is read, and the lines that are written stay in the cache


def pack(args, task, thread):
    """Copies rows task * NR ... of a matrix (out, in) into panel `task`, times the row's scale if there is one."""
    _, _, matrix, row_bytes, out, steps, step_bytes, panel_at, scale = arguments(args, 9)
    panel = panel_at + task * steps * NR * 4
    rows = min(NR, out - task * NR)
    for first in range(0, steps, _BLOCK):
        last = min(first + _BLOCK, steps)
        for j in range(NR):
            target = panel + j * 4
            if j >= rows:
                for k in range(first, last):
                    store_float(target + k * NR * 4, _ZERO)
                continue
            factor = load_float(scale + 4 * (task * NR + j)) if scale != 0 else _ONE
            source = matrix + (task * NR + j) * row_bytes
            for k in range(first, last):
                store_float(target + k * NR * 4, load_float(source + k * step_bytes) * factor)
