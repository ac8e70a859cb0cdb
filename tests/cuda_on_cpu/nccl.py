"""The pretended NCCL: ranks are threads of one process, each with a device of its own.

A sum runs in the stream that it is given, and the order of streams is checked as for kernels.  Unlike the real one it
lets the host wait until its own part of the sum is ready, as threads must meet to exchange what they have.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np

from .memory import memory_at
from .queues import Queue, launch
from .world import world

NCCL_SUM, NCCL_FLOAT32, NCCL_FLOAT64 = 0, 7, 8
SECONDS = 60  # after which a rank that waits for another gives up
_TYPES = {NCCL_FLOAT32: np.float32, NCCL_FLOAT64: np.float64}
_meetings: dict[tuple[int, ...], _Meeting] = {}


class _Meeting:
    """Where the ranks of one communicator exchange arrays."""

    def __init__(self) -> None:
        self.parts: dict[int, np.ndarray] = {}
        self.devices: list[int] = []
        self.barrier: threading.Barrier | None = None
        self.lock = threading.Lock()

    def joined(self, count: int, device: int) -> None:
        """Waits for the others.  Raises RuntimeError, in every rank, if two have the same device."""
        with self.lock:
            self.devices.append(device)
            self.barrier = self.barrier or threading.Barrier(count, timeout=SECONDS)
        self.barrier.wait()
        if len(set(self.devices)) < count:
            raise RuntimeError("NCCL_ERROR_INVALID_USAGE: Duplicate GPU detected")

    def total(self, rank: int, part: np.ndarray) -> np.ndarray:
        assert self.barrier is not None
        self.parts[rank] = part
        self.barrier.wait()
        sum_ = np.sum([self.parts[i] for i in sorted(self.parts)], axis=0, dtype=part.dtype)
        self.barrier.wait()
        return sum_


def get_unique_id() -> tuple[int, ...]:
    """What the ranks of a new communicator have in common."""
    made = (len(_meetings), 4711)
    _meetings[made] = _Meeting()
    return made


class NcclCommunicator:
    """One rank, on the device that is current now.  Returns when all have come."""

    def __init__(self, ndev: int, commId: tuple[int, ...], rank: int) -> None:
        self._rank, self._device, self._meeting = rank, world.current, _meetings[commId]
        self._meeting.joined(ndev, world.current)

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int) -> None:
        """Queues the sum over all ranks in the stream."""
        if op != NCCL_SUM or world.current != self._device:
            raise RuntimeError("NCCL_ERROR_INVALID_ARGUMENT")
        dtype, queue = np.dtype(_TYPES[datatype]), _queue(stream)
        size, own = count * dtype.itemsize, []
        first, last = (_memory(address, size) for address in (sendbuf, recvbuf))
        source, target = (ctypes.c_char * size).from_address(sendbuf), int(recvbuf)
        reads = first.use(False, int(sendbuf), int(sendbuf) + size)
        launch("a sum of NCCL", lambda: own.append(np.frombuffer(bytes(source), dtype)), [reads], queue)
        queue.finish()
        sum_ = self._meeting.total(self._rank, own[0])
        writes = last.use(True, target, target + size)
        launch("a sum of NCCL", lambda: ctypes.memmove(target, sum_.ctypes.data, size), [writes], queue)


def _memory(address: int, size: int) -> Any:
    memory = memory_at(address, size)
    if memory is None or memory.device_id != world.current:
        raise RuntimeError("NCCL_ERROR_INVALID_ARGUMENT: no memory of this device")
    return memory


def _queue(stream: int) -> Queue:
    found = next((queue for queue in Queue.alive if id(queue) == stream), None)
    if found is None:
        raise RuntimeError("NCCL_ERROR_INVALID_ARGUMENT: no such stream")
    return found
