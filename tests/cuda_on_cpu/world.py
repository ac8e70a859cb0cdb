"""The pretended machine: devices, their memory between guard pages, pools with limits, streams, counted copies."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

FOLDER = os.path.dirname(__file__)
PAGE = mmap.PAGESIZE
ALIGNMENT = 32  # of an allocation's start, four doubles; CuPy's is 512, but then few arrays would end at a guard page
ROUNDING = 512  # what a pool gives out in
SPOILT = b"\xff" * PAGE  # fresh memory: NaN in every float type, -1 in every integer

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class CUDARuntimeError(RuntimeError):
    """What a call of the CUDA runtime answered, with the runtime's own words."""

    WORDS = {
        1: "cudaErrorInvalidValue: invalid argument",
        2: "cudaErrorMemoryAllocation: out of memory",
        35: "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version",
        100: "cudaErrorNoDevice: no CUDA-capable device is detected",
        101: "cudaErrorInvalidDevice: invalid device ordinal",
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
    """Everything that is pretended.  `driver` False: no driver at all.  `backwards`: threads run in reverse order."""

    devices: int = 2
    memory: int = 1 << 34
    driver: bool = True
    backwards: bool = False
    current: int = 0
    copies: list[Copy] = field(default_factory=list)
    launches: list[str] = field(default_factory=list)  # names of kernels, of NumPy functions and of cuBLAS functions
    allocations: dict[int, Any] = field(default_factory=dict)  # {address: weak reference to Memory}

    def check(self) -> None:
        """Raises what the CUDA runtime answers without a driver or without devices."""
        if not self.driver:
            raise CUDARuntimeError(35)
        if not self.devices:
            raise CUDARuntimeError(100)

    def note_copy(self, way: str, nbytes: int) -> None:
        """Counts a copy; its place is the nearest caller outside this folder."""
        frames = [f for f in traceback.extract_stack(limit=24) if os.path.dirname(f.filename) != FOLDER]
        place = f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}" if frames else "?"
        self.copies.append(Copy(way, nbytes, place))


world = World()


@contextmanager
def counted() -> Iterator[World]:
    """A fresh count of copies and launches."""
    copies, launches = world.copies, world.launches
    world.copies, world.launches = [], []
    try:
        yield world
    finally:
        world.copies, world.launches = copies + world.copies, launches + world.launches


# Memory -------------------------------------------------------------------------------------------------------------


class Memory:
    """`size` bytes of the current device, its end at a page that nobody may touch, filled with 0xff."""

    def __init__(self, size: int) -> None:
        world.check()
        self.size, self.device_id = size, world.current
        room = max(PAGE, -(-size // PAGE) * PAGE)
        whole = room + 2 * PAGE
        start = _libc.mmap(None, whole, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if start in (None, ctypes.c_void_p(-1).value):
            raise MemoryError("the host has no memory for the pretended device")
        self._first, self._last = start + PAGE, start + PAGE + room
        self.ptr = self._last - -(-size // ALIGNMENT) * ALIGNMENT if size else self._first
        ctypes.memset(self._first, 0xFF, room)
        for guard in (start, self._last):
            _libc.mprotect(guard, PAGE, 0)
        world.allocations[self.ptr] = weakref.ref(self)
        self._free = weakref.finalize(self, _release, self.ptr, start, whole)

    def spoilt_outside(self) -> bool:
        """Whether the bytes between the allocation and its guard pages are as they were."""
        before, end = self.ptr - self._first, self.ptr + self.size
        return (
            ctypes.string_at(self._first, before) == SPOILT[:before]
            and ctypes.string_at(end, self._last - end) == SPOILT[: self._last - end]
        )


def _release(ptr: int, start: int, whole: int) -> None:
    world.allocations.pop(ptr, None)
    _libc.munmap(start, whole)


def where_is(address: int) -> str:
    """An address in words: how far it is from the nearest allocation."""
    live = [memory for memory in (ref() for ref in list(world.allocations.values())) if memory is not None]
    if not live:
        return "nowhere near an array"
    near = min(live, key=lambda m: max(m.ptr - address, address - m.ptr - m.size + 1, 0))
    if near.ptr <= address < near.ptr + near.size:
        return f"byte {address - near.ptr} of an array's {near.size}"
    if address < near.ptr:
        return f"{near.ptr - address} bytes before an array of {near.size} bytes"
    return f"{address - near.ptr - near.size} bytes behind the end of an array of {near.size} bytes"


class MemoryPointer:
    """An address in a Memory, which lives as long as this does."""

    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr = mem, mem.ptr + offset
        self.device_id = mem.device_id

    @property
    def device(self) -> Device:
        return Device(self.device_id)

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)

    def copy_from_host_async(self, mem: int, size: int, stream: Any = None) -> None:
        """Copies `size` bytes from the address `mem`, at once; here that memory need not be pinned."""
        if not 0 <= size <= self.mem.ptr + self.mem.size - self.ptr:
            raise CUDARuntimeError(1)
        world.note_copy("upload", size)
        ctypes.memmove(self.ptr, mem, size)


def alloc_pinned_memory(size: int) -> Any:
    """Memory of the host as a buffer with its address in `ptr`."""
    made = type("PinnedMemoryPointer", (ctypes.c_char * size,), {})()
    made.ptr = ctypes.addressof(made)
    return made


class MemoryPool:
    """Counts what is in use and what would be kept for later, per device; refuses above its limit."""

    def __init__(self) -> None:
        self._used: dict[int, int] = {}
        self._total: dict[int, int] = {}
        self._limit: dict[int, int] = {}

    def malloc(self, size: int) -> MemoryPointer:
        world.check()
        device, rounded = world.current, -(-size // ROUNDING) * ROUNDING
        used = self._used.get(device, 0)
        limit = self._limit.get(device, 0)
        if used + rounded > (limit or world.memory):
            raise OutOfMemoryError(rounded, self._total.get(device, 0), limit)
        memory = Memory(size)
        self._used[device] = used + rounded
        self._total[device] = min(max(self._total.get(device, 0), used + rounded), limit or world.memory)
        weakref.finalize(memory, self._give_back, device, rounded)
        return MemoryPointer(memory, 0)

    def _give_back(self, device: int, rounded: int) -> None:
        self._used[device] -= rounded

    def used_bytes(self) -> int:
        return self._used.get(world.current, 0)

    def total_bytes(self) -> int:
        return self._total.get(world.current, 0)

    def free_bytes(self) -> int:
        return self.total_bytes() - self.used_bytes()

    def n_free_blocks(self) -> int:
        return int(self.free_bytes() > 0)

    def free_all_blocks(self, stream: Any = None) -> None:
        self._total[world.current] = self.used_bytes()

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        if (size is None) == (fraction is None):
            raise ValueError("size and fraction cannot be specified at one time")
        self._limit[world.current] = int(world.memory * fraction) if size is None else int(size)

    def get_limit(self) -> int:
        return self._limit.get(world.current, 0)


default_pool = MemoryPool()
allocator = [default_pool.malloc]


# Devices, streams, events -------------------------------------------------------------------------------------------


class Device:
    """Device `id`, made current by `with` or `use`."""

    def __init__(self, device: Any = None) -> None:
        if device is None:
            world.check()
        self.id = world.current if device is None else int(device)
        self._before: list[int] = []

    def use(self) -> Device:
        world.check()
        if not 0 <= self.id < world.devices:
            raise CUDARuntimeError(101)
        world.current = self.id
        return self

    def __enter__(self) -> Device:
        self._before.append(world.current)
        return self.use()

    def __exit__(self, *args: Any) -> None:
        world.current = self._before.pop()

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return hash(("device", self.id))

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def synchronize(self) -> None:
        world.check()

    @property
    def compute_capability(self) -> str:
        return "90"

    @property
    def mem_info(self) -> tuple[int, int]:
        with self:
            return world.memory - default_pool.total_bytes(), world.memory


class Stream:
    """A stream that has always finished."""

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False) -> None:
        self.ptr = 0 if null else id(self)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def use(self) -> Stream:
        return self

    def synchronize(self) -> None:
        world.check()

    def record(self, event: Any = None) -> Any:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Any) -> None:
        pass


null_stream = Stream(null=True)
Stream.null = null_stream


class Event:
    """A moment of the host's clock."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.time: float | None = None

    def record(self, stream: Any = None) -> None:
        world.check()
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        world.check()

    @property
    def done(self) -> bool:
        return True


def get_elapsed_time(start: Event, end: Event) -> float:
    """Milliseconds between two recorded events."""
    if start.time is None or end.time is None:
        raise CUDARuntimeError(1)
    return 1e3 * (end.time - start.time)
