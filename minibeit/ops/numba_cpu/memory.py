"""Arrays whose first element, and where asked each row, begins a cache line; results in memory that is used again.

Fresh memory is dear: the system zeroes it page by page when it is first written, which for the results of one forward
pass costs several percent of its time.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from functools import lru_cache

import numpy as np

_LINE = 64
_KEPT_BYTES = 128 << 20  # buffers of results that are kept for the next ones
_STEP = 1 << 16  # their sizes are multiples of this
_FLOAT32 = np.dtype(np.float32)


def aligned(shape: tuple[int, ...], dtype: np.dtype | type = np.float32) -> np.ndarray:
    """An uninitialised array that begins at a multiple of 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _LINE, np.uint8)
    return np.ndarray(shape, dtype, raw, -raw.ctypes.data % _LINE)


class _Recycler:
    """Buffers that are used again.  One that nothing but this object refers to is free.

    A view of an array refers to the array that owns the memory, however many views lie between, so the reference count
    of the owner tells whether any result in it is still alive.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By size: buffers, and where in them a line begins; sizes and buffers in order of use, the latest last.
        self._buffers: dict[int, list[tuple[np.ndarray, int]]] = {}
        self._bytes = 0

    def take(self, size: int) -> tuple[np.ndarray, int]:
        """A buffer that holds no result, and where in it `size` bytes begin on a cache line."""
        size = -(-(size + _LINE) // _STEP) * _STEP
        if size > _KEPT_BYTES // 4:
            return _buffer(size)
        with self._lock:
            buffers = self._buffers.pop(size, [])
            self._buffers[size] = buffers
            for i in range(len(buffers)):
                if sys.getrefcount(buffers[i][0]) == _UNUSED:
                    buffers.append(buffers.pop(i))
                    return buffers[-1]
            buffers.append(_buffer(size))
            self._bytes += size
            kept = buffers[-1]
            self._trim()
            return kept

    def _trim(self) -> None:
        """Forgets the buffers that were not used for longest; those that hold results live on with them."""
        while self._bytes > _KEPT_BYTES:
            size, buffers = next(iter(self._buffers.items()))
            buffers.pop(0)
            self._bytes -= size
            if not buffers:
                del self._buffers[size]


def _buffer(size: int) -> tuple[np.ndarray, int]:
    raw = np.empty(size, np.uint8)
    return raw, -raw.ctypes.data % _LINE


_probe = [_buffer(0)]
_UNUSED = sys.getrefcount(_probe[0][0])  # the tuple and the argument; the number depends on the interpreter
_recycler = _Recycler()


def _renew() -> None:
    global _recycler
    _recycler = _Recycler()  # its lock may have been held by a thread that did not survive the fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def padded(shape: tuple[int, ...]) -> np.ndarray:
    """An uninitialised float32 array for a result; its rows lie an odd number of cache lines apart.

    Rows a multiple of 4096 bytes apart would fall into the same sets of the first-level cache, and the rows of a
    tile would not fit there.
    """
    size, strides = _padding(shape)
    raw, start = _recycler.take(size)
    return np.ndarray(shape, _FLOAT32, raw, start, strides)


def row_bytes(y: np.ndarray) -> int:
    """Bytes between rows of a padded array."""
    return y.strides[-2] if y.ndim > 1 else y.nbytes


@lru_cache(maxsize=256)
def _padding(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """(bytes, strides) of a padded array."""
    lines = -(-4 * shape[-1] // _LINE)
    size = (lines + 1 - lines % 2) * _LINE
    strides: tuple[int, ...] = (4,)
    for length in shape[-2::-1]:
        strides = (size, *strides)
        size *= length
    return size, strides


def rows(x: np.ndarray) -> tuple[np.ndarray, int, int]:
    """`x` (..., D) as float32 rows: (the array that owns the memory, number of rows, bytes between rows).

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
    return np.ascontiguousarray(x, np.float32), count, 4 * width
