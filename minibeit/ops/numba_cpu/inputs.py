"""Arrays as kernels read them: by address."""

from __future__ import annotations

from functools import cache

import numpy as np

from .memory import hold
from .pool import finish


def address(x: np.ndarray) -> int:
    """Where an array begins; jobs that wait (see `pool.deferred`) keep it alive, others leave that to their caller."""
    hold(x)
    return x.ctypes.data


def rows(x: np.ndarray) -> tuple[np.ndarray, int, int]:
    """`x` (..., D) as float32 rows: (the array to read, number of rows, bytes between rows).

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
        return x, count, step or 4 * width
    return contiguous(x), count, 4 * width


def contiguous(x: np.ndarray) -> np.ndarray:
    """`x` as float32 numbers side by side; copies only if they do not lie so."""
    if x.dtype != np.float32 or not x.flags.c_contiguous:
        finish()  # what is copied must be there
        x = np.ascontiguousarray(x, np.float32)
    return x


@cache
def constant(value: float) -> int:
    """The address of a float32, since kernels take nothing but integers; a model has two or three."""
    array = np.array([value], np.float32)
    _constants.append(array)
    return array.ctypes.data


_constants: list[np.ndarray] = []  # never forgotten
