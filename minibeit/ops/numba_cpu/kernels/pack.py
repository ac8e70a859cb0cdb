"""One panel of packed weights."""

from __future__ import annotations

import numpy as np

from ..target import NR
from .vector import arguments, load_float, store_float


def pack(args, task, thread):
    """Copies rows task * NR ... of a matrix (out, in) into panel `task`, times the row's scale if there is one."""
    _, _, matrix, row_bytes, out, steps, step_bytes, panel_at, scale = arguments(args, 9)
    panel = panel_at + task * steps * NR * 4
    for j in range(NR):
        row = task * NR + j
        if row < out:
            factor = load_float(scale + 4 * row) if scale != 0 else np.float32(1)
            for k in range(steps):
                value = load_float(matrix + row * row_bytes + k * step_bytes)
                store_float(panel + (k * NR + j) * 4, value * factor)
        else:
            for k in range(steps):
                store_float(panel + (k * NR + j) * 4, np.float32(0))
