"""Memory of results, weights and scratch, and the only way to its addresses: an `Operand`, which owns what it names.

Kernels read and write at bare addresses, some time after Python named them.  So no other file of this backend asks an
array for its address: `operand`, `constant_operand` and `result` give it together with a reference that keeps the
memory alive, and `queue.run` takes nothing else.

Fresh memory is expensive: the system zeroes it page by page when it is first written, which for the results of one
forward pass costs several percent of its time.  So results lie in buffers that are used again, whose rows begin cache
lines.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from ...files import mapped_file
from . import guard

_LINE = 64
_KEPT_BYTES = 128 << 20  # buffers of results that are kept for the next ones
_STEP = 1 << 16  # their sizes are multiples of this
_FLOAT32 = np.dtype(np.float32)


class Operand:
    """An array as a kernel gets it: its address, and what must be kept alive until the kernel has run.

    `address` and `owner` are for `queue.run` alone.  `bytes` is how many the owner may keep alive for the queue alone.
    """

    __slots__ = ("address", "array", "bytes", "owner")

    def __init__(self, array: np.ndarray | None, address: int, owner: Any, size: int) -> None:
        self.array, self.address, self.owner, self.bytes = array, address, owner, size

    def at(self, offset: int) -> Operand:
        """The same memory from `offset` bytes on."""
        return Operand(self.array, self.address + offset, self.owner, self.bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.array is None:
            return _nothing, ()
        return constant_operand, (self.array,)  # a copy, or another process, has the array elsewhere


def _nothing() -> Operand:
    return NOTHING


NOTHING = Operand(None, 0, None, 0)  # address 0: an argument that is not there


def operand(x: np.ndarray) -> Operand:
    """The memory of an array from its first element on."""
    recycler = _local.recycler
    if recycler is not None:
        buffer = recycler.buffers.get(id(x.base))
        if buffer is not None:
            return Operand(x, x.ctypes.data, buffer, 0)
    return Operand(x, x.ctypes.data, x, x.nbytes)


def constant_operand(x: np.ndarray) -> Operand:
    """The same for weights, which a model keeps: they do not count as memory that only the queue keeps alive."""
    return Operand(x, x.ctypes.data, x, 0)


def aligned(shape: tuple[int, ...], dtype: np.dtype | type = np.float32) -> np.ndarray:
    """An uninitialised array that begins at a multiple of 64 bytes (under `guard` ends at a protected page)."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw, start, _ = _buffer(size, size)
    return np.ndarray(shape, dtype, raw, start)


def aligned_copy(x: np.ndarray) -> np.ndarray:
    """A copy of an array, contiguous and aligned."""
    copy = aligned(x.shape, x.dtype)
    copy[...] = x
    return copy


def is_aligned(x: np.ndarray) -> bool:
    """Whether an array begins at a multiple of 64 bytes."""
    return x.ctypes.data % _LINE == 0


_Buffer = tuple[np.ndarray, int, int]  # memory, where in it a cache line begins, the address of that


class _Recycler:
    """Buffers that are used again, by one thread at a time.  One that no array refers to is free.

    A view of an array refers to the array that owns the memory, however many views lie between, so the reference count
    of the owner tells whether any result in it is still alive.  Jobs of the queue refer to the `_Buffer` instead, which
    keeps the memory and does not count: they run in order, so what comes later may write where an earlier one read.
    """

    def __init__(self) -> None:
        self.buffers: dict[int, _Buffer] = {}  # by identity of the memory
        # By size; sizes and buffers in order of use, the latest last.
        self._by_size: dict[int, list[_Buffer]] = {}
        self._bytes = 0
        self.dropped = 0  # bytes that only jobs may keep alive by now

    def take(self, need: int) -> tuple[_Buffer, int]:
        """(a buffer of at least `need` bytes that holds no result, bytes that are not kept when it is free again)."""
        size = need if guard.ACTIVE else -(-(need + _LINE) // _STEP) * _STEP
        if size > _KEPT_BYTES // 4:
            return _buffer(size, need), size
        buffers = self._by_size.pop(size, [])
        self._by_size[size] = buffers
        for i in reversed(range(len(buffers))):  # what was used last may still be in a cache
            if sys.getrefcount(buffers[i][0]) == _UNUSED:
                buffers.append(buffers.pop(i))
                return buffers[-1], 0
        taken = _buffer(size, need)
        buffers.append(taken)
        self.buffers[id(taken[0])] = taken
        self._bytes += size
        self._trim()
        return taken, 0

    def _trim(self) -> None:
        """Forgets the buffers that were not used for longest; those that hold results live on with them."""
        while self._bytes > _KEPT_BYTES:
            size, buffers = next(iter(self._by_size.items()))
            del self.buffers[id(buffers.pop(0)[0])]
            self._bytes -= size
            self.dropped += size
            if not buffers:
                del self._by_size[size]


def _buffer(size: int, need: int) -> _Buffer:
    """At least `size` bytes from a cache line on; a guarded one is of `need` bytes."""
    if guard.ACTIVE:
        raw = guard.allocate(need)
        return raw, 0, raw.ctypes.data
    raw = np.empty(size + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    return raw, start, raw.ctypes.data + start


_probe = [_buffer(0, 0)]
_UNUSED = sys.getrefcount(_probe[0][0])  # the tuple and the argument; the number depends on the interpreter
_idle: list[_Recycler] = []  # recyclers that no thread uses; the last one has the warmest memory


class _Local(threading.local):
    recycler: _Recycler | None = None  # the thread's own


_local = _Local()


def _borrow() -> _Recycler:
    try:
        return _idle.pop()
    except IndexError:
        return _Recycler()


@contextmanager
def private_buffers() -> Iterator[_Recycler]:
    """Within the block this thread's results come from a recycler of its own, since jobs may still use what it frees.

    If the block raises, the recycler is given up: kernels that were interrupted may write to its buffers once more.
    """
    before, _local.recycler = _local.recycler, _borrow()
    try:
        yield _local.recycler
        _idle.append(_local.recycler)
    finally:
        _local.recycler = before


@contextmanager
def shared_buffers() -> Iterator[None]:
    """Within the block this thread has no recycler of its own: whatever runs in it must not touch what jobs use."""
    before, _local.recycler = _local.recycler, None
    try:
        yield
    finally:
        _local.recycler = before


def _renew() -> None:
    _idle.clear()  # a recycler that another thread was using did not survive the fork whole


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def result(shape: tuple[int, ...]) -> tuple[np.ndarray, Operand, int]:
    """(an uninitialised float32 array for a result, the same as an operand, bytes between its rows).

    Its rows lie an odd number of cache lines apart.  Rows a multiple of 4096 bytes apart would fall into the same sets
    of the first-level cache, and the rows of a tile would not fit there.
    """
    size, strides, last = _padding(shape)
    recycler = _local.recycler
    if recycler is None:
        recycler = _borrow()
        (raw, start, address), _ = recycler.take(last)
        _idle.append(recycler)
        y: np.ndarray = np.ndarray(shape, _FLOAT32, raw, start, strides)
        if guard.ACTIVE:
            guard.hand_out(y, address, at_once=True)
        return y, Operand(y, address, y, 0), strides[-2] if len(strides) > 1 else size
    buffer, new = recycler.take(last)
    raw, start, address = buffer
    y = np.ndarray(shape, _FLOAT32, raw, start, strides)
    if guard.ACTIVE:
        guard.hand_out(y, address, at_once=False)
    return y, Operand(y, address, buffer, new), strides[-2] if len(strides) > 1 else size


def padded(shape: tuple[int, ...]) -> np.ndarray:
    """The array of `result` alone."""
    return result(shape)[0]


@lru_cache(maxsize=256)
def _padding(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...], int]:
    """(bytes, strides, bytes up to the end of the last row) of a padded array."""
    lines = -(-4 * shape[-1] // _LINE)
    size = row = (lines + 1 - lines % 2) * _LINE
    strides: tuple[int, ...] = (4,)
    for length in shape[-2::-1]:
        strides = (size, *strides)
        size *= length
    return size, strides, max(0, size - row + 4 * shape[-1])


def release_pages(array: np.ndarray) -> None:
    """Lets the system drop the pages of a memory-mapped array; they are read again from the file if needed.

    Does nothing for any other array: there it would lose the data.
    """
    if not sys.platform.startswith("linux") or mapped_file(array) is None:
        return
    page = mmap.PAGESIZE
    start = -(-array.ctypes.data // page) * page  # whole pages inside the array only
    length = (array.ctypes.data + array.nbytes - start) // page * page
    if array.flags.c_contiguous and length > 0:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), 4)  # 4 is MADV_DONTNEED
