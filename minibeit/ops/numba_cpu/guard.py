"""Guard mode, for tests on Linux: MINIBEIT_GUARD=1 makes faults of memory visible where they happen.

Every buffer (results, packed weights, scratch of each thread) lies between two protected pages and ends at the second:
a kernel that goes beyond it is a segmentation fault (`python -X faulthandler` tells where).  Buffers begin as NaN, and
what is freed stays protected for a while.  Before jobs run, every address must lie in memory that its owner owns;
afterwards the bytes between a buffer and the page before it must be as they were.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import sys
import threading
import weakref
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from .arguments import HEADER

ACTIVE = os.environ.get("MINIBEIT_GUARD", "") not in ("", "0")
if ACTIVE and not sys.platform.startswith("linux"):
    raise RuntimeError(f"MINIBEIT_GUARD: guard mode protects pages as Linux does, found {sys.platform}; unset it.")

_PAGE = mmap.PAGESIZE
_FILL = 0xFF  # of all four bytes of a float32: NaN
_MOST_FREED = 2000, 4 << 30  # regions and bytes that stay protected; older ones are given back to the system
_NONE, _READ_WRITE, _PRIVATE_ANONYMOUS, _DONT_NEED = 0, 3, 0x22, 4


class GuardError(Exception):
    """A fault of memory, found before or after it did harm."""


class _Region:
    """Pages of which the first and the last are protected, those between hold `size` bytes, at their end."""

    def __init__(self, size: int) -> None:
        self.length = (max(1, -(-size // _PAGE)) + 2) * _PAGE
        self.start = _libc.mmap(None, self.length, _NONE, _PRIVATE_ANONYMOUS, -1, 0)
        if self.start in (None, ctypes.c_void_p(-1).value):
            raise MemoryError(f"guard mode: no {size} bytes left")
        self.end = self.start + self.length
        self.address = self.end - _PAGE - size
        _libc.mprotect(self.start + _PAGE, self.length - 2 * _PAGE, _READ_WRITE)
        ctypes.memset(self.start + _PAGE, _FILL, self.length - 2 * _PAGE)

    def intact(self) -> bool:
        """Whether nobody wrote in front of the buffer."""
        before = self.start + _PAGE
        return ctypes.string_at(before, self.address - before).strip(bytes([_FILL])) == b""

    def protect(self) -> None:
        """Gives the memory back; whoever still uses it is stopped."""
        _libc.madvise(self.start, self.length, _DONT_NEED)
        _libc.mprotect(self.start, self.length, _NONE)


class _Regions:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.starts: list[int] = []
        self.by_start: dict[int, _Region] = {}
        self.freed: set[int] = set()
        self.oldest: deque[_Region] = deque()
        self.bytes = 0

    def add(self, region: _Region) -> None:
        with self.lock:
            bisect.insort(self.starts, region.start)
            self.by_start[region.start] = region

    def free(self, region: _Region) -> None:
        with self.lock:
            damaged = not region.intact()
            region.protect()
            self.freed.add(region.start)
            self.oldest.append(region)
            self.bytes += region.length
            while len(self.oldest) > _MOST_FREED[0] or self.bytes > _MOST_FREED[1]:
                gone = self.oldest.popleft()
                self.bytes -= gone.length
                self.starts.remove(gone.start)
                self.freed.discard(gone.start)
                del self.by_start[gone.start]
                _libc.munmap(gone.start, gone.length)
        if damaged:  # an exception would be lost here
            os.write(2, b"GuardError: somebody wrote in front of a buffer that is freed now\n")
            os.abort()

    def find(self, address: int) -> _Region | None:
        """The region, with its protected pages, in which an address lies."""
        with self.lock:
            i = bisect.bisect_right(self.starts, address) - 1
            region = self.by_start[self.starts[i]] if i >= 0 else None
            return region if region is not None and address < region.end else None


if ACTIVE:
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    _libc.mprotect.argtypes = _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_regions = _Regions()
_results: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()  # by address


def allocate(size: int) -> np.ndarray:
    """`size` bytes that end at a protected page; they are protected when no array refers to them any more."""
    region = _Region(size)
    _regions.add(region)
    memory = (ctypes.c_ubyte * size).from_address(region.address)
    weakref.finalize(memory, _regions.free, region).atexit = False
    return np.ndarray((size,), np.uint8, memory)  # type: ignore[arg-type]


def hand_out(result: np.ndarray, address: int, at_once: bool) -> None:
    """Notes a result.  Raises GuardError if its memory holds one that is alive; poisons it if no job may need it."""
    if _results.get(address) is not None:
        raise GuardError(f"a result of shape {result.shape} was given memory in which another one is alive")
    _results[address] = result
    if at_once:
        region = _regions.find(address)
        assert region is not None
        ctypes.memset(region.address, _FILL, region.end - _PAGE - region.address)


def before(jobs: Sequence[Any], records: array[int], threads: int) -> Any:
    """Checks the addresses of jobs and gives each thread scratch memory that ends at a protected page.

    Returns what `after` wants, which keeps the scratch memory.  Raises GuardError.
    """
    kept, place = [], 0
    for job in jobs:
        addresses = job.arguments[: len(job.owners)]
        for i, (address, owner) in enumerate(zip(addresses, job.owners)):
            _check(f"argument {i} of a kernel", address, owner)
        size = -(-job.scratch // _PAGE) * _PAGE
        scratch = _scratch(min(job.threads, threads), job.scratch)
        records[place + HEADER], records[place + HEADER + 1] = scratch.start + _PAGE + size - job.scratch, size + _PAGE
        kept.append((scratch, addresses))
        place += HEADER + records[place + HEADER - 1]
    return kept


def after(kept: Any) -> None:
    """Raises GuardError if jobs wrote in front of a buffer."""
    for scratch, addresses in kept:
        regions = [_regions.find(address) for address in addresses]
        if not all(region.intact() for region in regions if region is not None):
            raise GuardError("a kernel wrote in front of a buffer")
        scratch.protect()
        _libc.munmap(scratch.start, scratch.length)


def _scratch(threads: int, size: int) -> _Region:
    """Pages for `size` bytes of each thread, a protected one behind each."""
    share = -(-size // _PAGE) * _PAGE + _PAGE
    region = _Region(threads * share)
    for i in range(threads):
        _libc.mprotect(region.start + _PAGE + (i + 1) * share - _PAGE, _PAGE, _NONE)
    return region


def _check(what: str, address: int, owner: Any) -> None:
    if address == 0:
        return
    region = _regions.find(address)
    if region is not None and region.start in _regions.freed:
        raise GuardError(f"{what} points at memory that was freed")
    memory = owner[0] if isinstance(owner, tuple) else owner
    if not isinstance(memory, np.ndarray):
        raise GuardError(f"{what} is an address that nothing keeps alive")
    low = high = memory.ctypes.data
    for length, stride in zip(memory.shape, memory.strides):
        low, high = low + min(0, (length - 1) * stride), high + max(0, (length - 1) * stride)
    if not low <= address < high + memory.itemsize and memory.size:
        raise GuardError(f"{what} does not point at what its owner keeps alive")
