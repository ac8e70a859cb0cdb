"""Copies between the host and the device that neither of them waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .device import cupy

Array = Any
RING = 2  # batches on the device: one that is computed, one that is on its way


class Uploads:
    """Batches go up on a stream of their own, from pinned memory, while the device computes with the one before.

    Memory is used again in turns.  A copy into it waits, on the device, for what has used it last; the host waits only
    until the same pinned memory has been copied the last time, which is two batches ago.
    """

    def __init__(self) -> None:
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._places: list[_Place | None] = [None] * RING
        self._turn = 0

    def upload(self, x: np.ndarray) -> Array:
        """`x` on the device, for the current stream; to be used there until the next one is uploaded."""
        before = self._places[self._turn - 1]
        if before is not None:
            before.used.record()
        place = self._places[self._turn]
        if place is None or place.array.shape != x.shape or place.array.dtype != x.dtype:
            if place is not None:
                place.copied.synchronize()  # its pinned memory goes back to the pool
            place = self._places[self._turn] = _Place(x)
        self._turn = (self._turn + 1) % RING
        place.fill(x, self._stream)
        return place.array


class _Place:
    """An array on the device, and pinned memory of its size."""

    def __init__(self, x: np.ndarray) -> None:
        self.array = cupy.empty(x.shape, x.dtype)
        self.pinned = cupy.cuda.alloc_pinned_memory(x.nbytes)
        self.staged = np.frombuffer(self.pinned, x.dtype, x.size).reshape(x.shape)
        self.copied = cupy.cuda.Event(disable_timing=True)
        self.used = cupy.cuda.Event(disable_timing=True)
        self.used.record()  # the pool may have given out what the stream still uses

    def fill(self, x: np.ndarray, stream: Any) -> None:
        self.copied.synchronize()
        self.staged[...] = x
        stream.wait_event(self.used)
        self.array.data.copy_from_host_async(self.pinned.ptr, x.nbytes, stream)
        self.copied.record(stream)
        cupy.cuda.get_current_stream().wait_event(self.copied)


class Downloads:
    """Arrays on their way to the host, after what the current stream has to do so far."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self._copies = [_Copy(array) for array in arrays]
        self._done = cupy.cuda.Event(disable_timing=True)
        self._done.record()

    def wait(self) -> list[np.ndarray]:
        """The arrays, once they are there."""
        self._done.synchronize()
        return [np.array(copy.staged) for copy in self._copies]


class _Copy:
    """The copy of one array to pinned memory."""

    def __init__(self, x: Array) -> None:
        self.source = cupy.ascontiguousarray(x)  # kept, as its memory is read later
        self.pinned = cupy.cuda.alloc_pinned_memory(max(x.nbytes, 1))
        self.staged = np.frombuffer(self.pinned, x.dtype, x.size).reshape(x.shape)
        if x.size:
            self.source.data.copy_to_host_async(self.pinned.ptr, x.nbytes, cupy.cuda.get_current_stream())
