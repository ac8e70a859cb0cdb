"""The pretended machine: how many devices there are, what they answer, which copies and launches were made."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

FOLDER = os.path.dirname(__file__)

_local = threading.local()


class CUDARuntimeError(RuntimeError):
    """What a call of the CUDA runtime answered, with the runtime's own words."""

    WORDS = {
        1: "cudaErrorInvalidValue: invalid argument",
        2: "cudaErrorMemoryAllocation: out of memory",
        35: "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version",
        100: "cudaErrorNoDevice: no CUDA-capable device is detected",
        101: "cudaErrorInvalidDevice: invalid device ordinal",
        400: "cudaErrorInvalidResourceHandle: invalid resource handle",
        600: "cudaErrorNotReady: device not ready",
    }

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(self.WORDS[status])


class CUDADriverError(RuntimeError):
    """What a call of the CUDA driver answered."""


class OutOfMemoryError(MemoryError):
    """A pool met its limit, or the device its end."""

    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        self._size, self._total, self._limit = size, total, limit
        tail = f", limit set to: {limit:,} bytes" if limit else ""
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes{tail}).")


@dataclass
class Copy:
    """One copy between host and device: which way, how much, and which line asked for it."""

    way: str
    nbytes: int
    place: str


@dataclass
class World:
    """Everything that is pretended.  `driver` False: no driver at all.  `backwards`: threads run in reverse order.

    `asynchronous`: work waits in queues until the host waits for it, and hazards are reported (see queues.py); False
    runs everything at once, so that a mistake shows at the launch.
    """

    devices: int = 2
    memory: int = 1 << 34
    driver: bool = True
    backwards: bool = False
    asynchronous: bool = True
    copies: list[Copy] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)  # the lines that made the host wait for a device that was not done
    launches: list[str] = field(default_factory=list)  # names of kernels, of NumPy functions and of cuBLAS functions
    allocations: dict[int, Any] = field(default_factory=dict)  # {address: weak reference to Memory}
    lock: Any = field(default_factory=threading.RLock)  # one kernel runs at a time

    @property
    def current(self) -> int:
        """The device of this thread."""
        return getattr(_local, "device", 0)

    @current.setter
    def current(self, device: int) -> None:
        _local.device = device

    def check(self) -> None:
        """Raises what the CUDA runtime answers without a driver or without devices."""
        if not self.driver:
            raise CUDARuntimeError(35)
        if not self.devices:
            raise CUDARuntimeError(100)

    def note_wait(self, pending: bool) -> None:
        """Counts that the host waits, if there is something to wait for."""
        if pending:
            self.waits.append(_place())

    def note_copy(self, way: str, nbytes: int) -> None:
        """Counts a copy; its place is the nearest caller outside this folder."""
        self.copies.append(Copy(way, nbytes, _place()))


def _place() -> str:
    frames = [f for f in traceback.extract_stack(limit=24) if os.path.dirname(f.filename) != FOLDER]
    return f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}" if frames else "?"


world = World()


@contextmanager
def counted() -> Iterator[World]:
    """A fresh count of copies, launches and waits."""
    copies, launches, waits = world.copies, world.launches, world.waits
    world.copies, world.launches, world.waits = [], [], []
    try:
        yield world
    finally:
        world.copies, world.launches = copies + world.copies, launches + world.launches
        world.waits = waits + world.waits
