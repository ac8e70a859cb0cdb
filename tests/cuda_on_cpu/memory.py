"""The pretended devices' memory between guard pages, pools with limits, pinned memory, copies by address.

While `world.asynchronous`, a pool gives freed memory out again as early as CuPy's may: as soon as the stream that it
was given out for wants some, and first of all what another stream still works with.  Pinned memory is given out again
as soon as it is freed.  Both are spoilt in between.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections import defaultdict
from typing import Any

from .queues import HazardError, History, Queue, Use, caller, current_queue, finish_device, launch
from .world import CUDARuntimeError, OutOfMemoryError, world

PAGE = mmap.PAGESIZE
ALIGNMENT = 32  # of an allocation's start, four doubles; CuPy's is 512, but then few arrays would end at a guard page
ROUNDING = 512  # what a pool gives out in
SPOILT = b"\xff"  # every byte of fresh memory: NaN in every float type, -1 in every integer

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


# Of devices ---------------------------------------------------------------------------------------------------------


class Block:
    """Whole pages, spoilt, between two pages that nobody may touch."""

    def __init__(self, room: int) -> None:
        self._whole = room + 2 * PAGE
        access = mmap.PROT_READ | mmap.PROT_WRITE
        self._start = _libc.mmap(None, self._whole, access, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if self._start in (None, ctypes.c_void_p(-1).value):
            raise MemoryError("the host has no memory for the pretended device")
        self.first, self.last, self.room = self._start + PAGE, self._start + PAGE + room, room
        self.history = History()
        self.spoil()
        for guard in (self._start, self.last):
            _libc.mprotect(guard, PAGE, 0)

    def spoil(self) -> None:
        """Fills the pages with what no result looks like."""
        ctypes.memset(self.first, SPOILT[0], self.room)

    def spoilt_outside(self, ptr: int, size: int) -> bool:
        """Whether all but the `size` bytes from `ptr` on are as `spoil` left them."""
        before, behind = ptr - self.first, self.last - ptr - size
        return (
            ctypes.string_at(self.first, before) == SPOILT * before
            and ctypes.string_at(ptr + size, behind) == SPOILT * behind
        )

    def unmap(self) -> None:
        """Gives the pages back to the system."""
        _libc.munmap(self._start, self._whole)


class Memory:
    """`size` bytes of the current device, their end at a page that nobody may touch, filled with 0xff."""

    def __init__(self, size: int) -> None:
        world.check()
        self.size, self.device_id = size, world.current
        room, queue = max(PAGE, -(-size // PAGE) * PAGE), current_queue()
        with world.lock:
            self.block = _given_again(room, queue) or Block(room)
            self.ptr = self.block.last - -(-size // ALIGNMENT) * ALIGNMENT if size else self.block.first
            world.allocations[self.ptr] = weakref.ref(self)
            weakref.finalize(self, _release, self.ptr, self.block, queue)

    def use(self, write: bool, first: int | None = None, end: int | None = None) -> Use:
        """That a job reads or writes the bytes from address `first` to `end`, by default all."""
        first, end = self.ptr if first is None else first, self.ptr + self.size if end is None else end
        return Use(self.block.history, first, end, write)


_free: defaultdict[Queue, list[Block]] = defaultdict(list)  # by the stream that the memory was given out for


def _release(ptr: int, block: Block, queue: Queue) -> None:
    world.allocations.pop(ptr, None)
    if world.asynchronous:
        _free[queue].append(block)
    else:
        block.unmap()


def _given_again(room: int, queue: Queue) -> Block | None:
    """A freed block that jobs may still be at, if there is one large enough; it is spoilt in the stream's order."""
    blocks = _free[queue]
    _unmap_idle(blocks)
    fitting = [block for block in blocks if block.room == room][-1:]
    still_used = [block for block in blocks if block.room >= room and block.history.queues() != {queue}]
    for block in (*still_used, *fitting):
        whole = Use(block.history, block.first, block.last, True)
        launch("the pool, giving out freed memory again,", block.spoil, [whole])
        blocks.remove(block)
        return block
    return None


def _unmap_idle(blocks: list[Block]) -> None:
    for block in [block for block in blocks if block.history.idle()]:
        blocks.remove(block)
        block.unmap()


def unmap_free(device: int | None = None) -> None:
    """Gives freed memory of a device, or of all, back to the system, once no job is at it."""
    with world.lock:
        for queue, blocks in list(_free.items()):
            if device in (None, queue.device):
                _unmap_idle(blocks)


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


def memory_at(address: int, size: int = 1) -> Memory | None:
    """The allocation in which `size` bytes lie.  Raises HazardError for an address taken from an array that is gone."""
    if isinstance(address, Address) and address.memory() is None:
        raise HazardError(f"an address is used whose array is gone (at {caller()})")
    live = (ref() for ref in list(world.allocations.values()))
    return next((m for m in live if m is not None and m.ptr <= address <= address + size <= m.ptr + m.size), None)


class Address(int):
    """An address that knows whose it is, also after some bytes were added."""

    memory: Any

    def __new__(cls, value: int, memory: Any) -> Address:
        made = super().__new__(cls, value)
        made.memory = memory
        return made

    def __add__(self, offset: int) -> Address:
        return Address(int(self) + offset, self.memory)

    __radd__ = __add__

    def __sub__(self, offset: int) -> Any:
        return int(self) - offset if isinstance(offset, Address) else self + -offset


class MemoryPointer:
    """An address in a Memory, which lives as long as this does."""

    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr = mem, Address(mem.ptr + offset, weakref.ref(mem))
        self.device_id = mem.device_id

    @property
    def device(self) -> Any:
        from .streams import Device

        return Device(self.device_id)

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)

    def copy_from_host_async(self, mem: int, size: int, stream: Any = None) -> None:
        """Copies `size` bytes from the address `mem`, which must stay as they are until the copy has run."""
        first, place = self._checked(size), caller()
        world.note_copy("upload", size)
        before = ctypes.string_at(mem, size)

        def run() -> None:
            if _host_bytes(mem, size) != before:
                raise HazardError(f"host memory was changed or freed before its upload had run (asked for at {place})")
            ctypes.memmove(first, before, size)

        launch("an upload", run, [self.mem.use(True, first, first + size)], stream and stream.queue)

    def copy_to_host_async(self, mem: int, size: int, stream: Any = None) -> None:
        """Copies `size` bytes to the address `mem`, where nobody else may write until the copy has run."""
        first, place = self._checked(size), caller()
        world.note_copy("download", size)
        if world.asynchronous:
            ctypes.memset(mem, SPOILT[0], size)

        def run() -> None:
            if world.asynchronous and _host_bytes(mem, size) != SPOILT * size:
                raise HazardError(f"host memory was changed or freed before a download (asked for at {place}) wrote it")
            ctypes.memmove(mem, first, size)

        launch("a download", run, [self.mem.use(False, first, first + size)], stream and stream.queue)

    def _checked(self, size: int) -> int:
        if not 0 <= size <= self.mem.ptr + self.mem.size - self.ptr:
            raise CUDARuntimeError(1)
        return int(self.ptr)


class MemoryPool:
    """Counts what is in use and what would be kept for later, per device; refuses above its limit."""

    def __init__(self) -> None:
        self._used: dict[int, int] = {}
        self._total: dict[int, int] = {}
        self._limit: dict[int, int] = {}

    def malloc(self, size: int) -> MemoryPointer:
        world.check()
        device, rounded = world.current, -(-size // ROUNDING) * ROUNDING
        with world.lock:
            used = self._used.get(device, 0)
            limit = self._limit.get(device, 0)
            if used + rounded > (limit or world.memory):
                raise OutOfMemoryError(rounded, self._total.get(device, 0), limit)
            memory = Memory(size)
            used = self._used[device] = self._used.get(device, 0) + rounded  # some may be free by now
            self._total[device] = min(max(self._total.get(device, 0), used), limit or world.memory)
        weakref.finalize(memory, self._give_back, device, rounded)
        return MemoryPointer(memory, 0)

    def _give_back(self, device: int, rounded: int) -> None:
        with world.lock:
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
        finish_device(world.current)  # as cudaFree does
        unmap_free(world.current)
        self._total[world.current] = self.used_bytes()

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        if (size is None) == (fraction is None):
            raise ValueError("size and fraction cannot be specified at one time")
        self._limit[world.current] = int(world.memory * fraction) if size is None else int(size)

    def get_limit(self) -> int:
        return self._limit.get(world.current, 0)


default_pool = MemoryPool()
allocator = [default_pool.malloc]


# Of the host --------------------------------------------------------------------------------------------------------

_pinned: defaultdict[int, list[bytearray]] = defaultdict(list)


def alloc_pinned_memory(size: int) -> Any:
    """Memory of the host as a buffer with its address in `ptr`: what was freed last, if that is of the same size."""
    rounded = -(-size // ROUNDING) * ROUNDING
    storage = _pinned[rounded].pop() if _pinned[rounded] else bytearray(SPOILT * rounded)
    made = type("PinnedMemoryPointer", (ctypes.c_char * size,), {}).from_buffer(storage)
    made.ptr = ctypes.addressof(made)
    weakref.finalize(made, _release_pinned, storage)
    return made


def _release_pinned(storage: bytearray) -> None:
    storage[:] = SPOILT * len(storage)
    _pinned[len(storage)].append(storage)


def _host_bytes(address: int, size: int) -> bytes:
    """What lies there, or as much of it as is still mapped."""
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        try:
            return os.pread(memory.fileno(), size, address)
        except OSError:
            return b""
