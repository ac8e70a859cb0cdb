"""Ranks that talk to each other by MPI, as mpi4py offers it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from ..machine import own_cpus
from .ranks import Ranks

Value = TypeVar("Value")


def world() -> MpiRanks:
    """The ranks that mpiexec has started together.  Raises ImportError, naming the extra, without mpi4py or MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
        raise ImportError(
            f'training on several ranks needs mpi4py and an MPI library: pip install "minibeit[mpi]"{reason}'
        ) from None
    return MpiRanks(MPI)


class MpiRanks(Ranks):
    """The ranks of MPI's world.  `handed_over` counts the bytes of gradients that were given to MPI to be summed.

    Sums are MPI's Iallreduce, whose result is the same in every rank and in every run of as many ranks.
    """

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        # Apart from each other: a batch norm may need a sum of its own while those of gradients are on their way.
        self._comm, self._gradients = mpi.COMM_WORLD.Dup(), mpi.COMM_WORLD.Dup()
        self.rank, self.count = self._comm.rank, self._comm.size
        self.handed_over = 0
        self._begun: list[Any] = []
        host = self._comm.Split_type(mpi.COMM_TYPE_SHARED)
        self.local, self.on_host = host.rank, host.size
        self._cores = host.allgather(own_cpus())
        host.Free()

    def total(self, numbers: np.ndarray) -> np.ndarray:
        made = np.empty_like(numbers)
        self._wait([self._comm.Iallreduce(np.ascontiguousarray(numbers), made)])
        return made

    def gathered(self, value: Value) -> list[Value]:
        self._wait([self._comm.Ibarrier()])
        return self._comm.gather(value) or []

    def from_first(self, make: Callable[[], Value]) -> Value:
        made = make() if self.first else None
        self._wait([self._comm.Ibarrier()])
        return self._comm.bcast(made)

    def copy_from_first(self, array: np.ndarray) -> None:
        self._wait([self._comm.Ibcast(array)])

    def begin_sum(self, array: np.ndarray) -> None:
        self.handed_over += array.nbytes
        self._begun.append(self._gradients.Iallreduce(self._mpi.IN_PLACE, array))

    def go_on(self) -> None:
        self._mpi.Request.Testall(self._begun)  # MPI moves data only while it is called

    def end_sums(self) -> None:
        self._wait(self._begun)
        self._begun = []

    def _wait(self, requests: list[Any]) -> None:
        """Waits for what others have to do, and lets them: MPI's own waiting keeps a core busy, and Ctrl-C out."""
        while not self._mpi.Request.Testall(requests):
            _give_way()

    def cores(self, usable: int) -> int:
        own = own_cpus()
        shares = sum(1 / sum(core in cores for cores in self._cores) for core in own)
        return max(1, int(usable * shares / len(own) + 1e-9))


def _give_way() -> None:
    """Lets another process run on this core, if one wants to."""
    if hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(0)
