"""Arrays as kernels read them: float32 rows or contiguous numbers, copied only where they do not lie so."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .memory import Operand, constant_operand, operand
from .queue import flush


def rows(x: np.ndarray) -> tuple[Operand, int, int]:
    """`x` (..., D) as float32 rows: (the rows, how many, bytes between them).

    Copies only where the rows do not lie evenly spaced.  Strides of axes of size 1 mean nothing and are not looked at.
    """
    width, count, step, span = x.shape[-1], 1, 0, 0
    even = x.dtype == np.float32 and (width == 1 or x.strides[-1] == 4)
    for axis in range(x.ndim - 2, -1, -1):
        size, stride = x.shape[axis], x.strides[axis]
        if size != 1:
            if step == 0:
                step = span = stride
            even = even and stride == span and stride > 0 and stride % 4 == 0
            span *= size
            count *= size
    if even:
        return operand(x), count, step or 4 * width
    return operand(contiguous(x)), count, 4 * width


def contiguous(x: np.ndarray) -> np.ndarray:
    """`x` as contiguous float32 elements; copies only if they do not lie so."""
    if x.dtype != np.float32 or not x.flags.c_contiguous:
        flush()  # what is copied must be there
        x = np.ascontiguousarray(x, np.float32)
    return x


@lru_cache(maxsize=256)
def scalar(value: float) -> Operand:
    """A float32 in memory, since kernels take nothing but integers; a model has two or three."""
    return constant_operand(np.array([value], np.float32))
