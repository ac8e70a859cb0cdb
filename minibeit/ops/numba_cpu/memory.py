"""Arrays whose first element, and where asked each row, begins a cache line; results in memory that is used again.

Fresh memory is dear: the system zeroes it page by page when it is first written, which for the results of one forward
pass costs several percent of its time.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


_Buffer = tuple[np.ndarray, int, int]  # memory, where in it a cache line begins, the address of that


class _Recycler:
    """Buffers that are used again, by one thread at a time.  One that nothing but this object refers to is free.

    A view of an array refers to the array that owns the memory, however many views lie between, so the reference count
    of the owner tells whether any result in it is still alive.
    """

    def __init__(self) -> None:
        # By size; sizes and buffers in order of use, the latest last.
        self._buffers: dict[int, list[_Buffer]] = {}
        self._owners: set[int] = set()  # identities of the buffers
        self._bytes = 0

    def take(self, size: int) -> _Buffer:
        """A buffer of at least `size` bytes that holds no result."""
        size = -(-(size + _LINE) // _STEP) * _STEP
        if size > _KEPT_BYTES // 4:
            return _buffer(size)
        buffers = self._buffers.pop(size, [])
        self._buffers[size] = buffers
        for i in reversed(range(len(buffers))):  # what was used last may still be in a cache
            if sys.getrefcount(buffers[i][0]) == _UNUSED:
                buffers.append(buffers.pop(i))
                return buffers[-1]
        buffers.append(_buffer(size))
        self._owners.add(id(buffers[-1][0]))
        self._bytes += size
        kept = buffers[-1]
        self._trim()
        return kept

    def owns(self, x: np.ndarray) -> bool:
        """Whether an array lies in a buffer of this recycler."""
        return id(x.base) in self._owners

    def _trim(self) -> None:
        """Forgets the buffers that were not used for longest; those that hold results live on with them."""
        while self._bytes > _KEPT_BYTES:
            size, buffers = next(iter(self._buffers.items()))
            oldest = buffers.pop(0)[0]
            self._owners.discard(id(oldest))
            hold(oldest)
            self._bytes -= size
            if not buffers:
                del self._buffers[size]


def _buffer(size: int) -> _Buffer:
    raw = np.empty(size, np.uint8)
    start = -raw.ctypes.data % _LINE
    return raw, start, raw.ctypes.data + start


_probe = [_buffer(0)]
_UNUSED = sys.getrefcount(_probe[0][0])  # the tuple and the argument; the number depends on the interpreter
_idle: list[_Recycler] = []  # recyclers that no thread uses; the last one has the warmest memory


class _Held:
    """What the jobs of a thread that have not run yet (see `pool.deferred`) need."""

    def __init__(self) -> None:
        self.recycler = _borrow()  # the thread's own: a buffer that is free to it may be in use to others
        self.arrays: list[np.ndarray] = []  # those outside of it that nothing else may refer to any more
        self.bytes = 0


class _Local(threading.local):
    held: _Held | None = None  # None where no job waits


_local = _Local()


def _borrow() -> _Recycler:
    try:
        return _idle.pop()
    except IndexError:
        return _Recycler()


@contextmanager
def own_buffers() -> Iterator[None]:
    """Within the block, `padded` arrays of this thread are free for nobody else, and `hold` holds."""
    _local.held = held = _Held()
    try:
        yield
    finally:
        _local.held = None
        _idle.append(held.recycler)


def hold(x: np.ndarray) -> None:
    """Keeps an array that a job reads or writes until the job has run, if that is not at once."""
    held = _local.held
    if held is not None and not held.recycler.owns(x):
        held.arrays.append(x)
        held.bytes += x.nbytes


def held_bytes() -> int:
    """Bytes of the arrays that are held."""
    return _local.held.bytes if _local.held is not None else 0


def let_go() -> None:
    """All jobs of this thread have run: holds nothing any more."""
    if _local.held is not None:
        _local.held.arrays.clear()
        _local.held.bytes = 0


def _renew() -> None:
    _idle.clear()  # a recycler that another thread was using did not survive the fork whole


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def result(shape: tuple[int, ...]) -> tuple[np.ndarray, int, int]:
    """(an uninitialised float32 array for a result, its address, bytes between its rows); waiting jobs keep it alive.

    Its rows lie an odd number of cache lines apart.  Rows a multiple of 4096 bytes apart would fall into the same sets
    of the first-level cache, and the rows of a tile would not fit there.
    """
    size, strides = _padding(shape)
    held = _local.held
    recycler = _borrow() if held is None else held.recycler
    raw, start, address = recycler.take(size)
    if held is None:
        _idle.append(recycler)
    y: np.ndarray = np.ndarray(shape, _FLOAT32, raw, start, strides)
    hold(y)
    return y, address, strides[-2] if len(strides) > 1 else size


def padded(shape: tuple[int, ...]) -> np.ndarray:
    """The array of `result` alone."""
    return result(shape)[0]


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
