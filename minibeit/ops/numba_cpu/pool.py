"""Threads: workers that wait in machine code, counters from which they take tasks, one job at a time per process.

Which thread does a task never changes its result, so results are the same at any number of threads.  numba's own
thread layers are not used: the default one aborts the process when two Python threads call at once.

A worker that finds no job for about a millisecond goes to sleep on a Python semaphore; in between, an operation starts
within a microsecond.  kernels/pool.py is what caller and workers run.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ...machine import usable_cpus
from . import guard
from .arguments import CONTROL_BYTES, LEFT, MORE, RECORD, STARTED
from .machine_code import Kernel
from .memory import Operand, aligned, constant_operand

SLICE = 20_000_000  # nanoseconds that the caller spends in machine code at a time: in between Python sees signals

_execute = Kernel("minibeit.ops.numba_cpu.kernels.pool", "execute", 2)
_cancel = Kernel("minibeit.ops.numba_cpu.kernels.pool", "cancel", 1)
_wait = Kernel("minibeit.ops.numba_cpu.kernels.pool", "wait", 3)


class Job(NamedTuple):
    """A kernel's call for each of its tasks.  `owners` keep the memory alive that `arguments` point at."""

    function: int
    tasks: int
    threads: int
    scratch: int  # bytes for each thread
    arguments: Sequence[int]
    owners: Sequence[Any]


class _Pool:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.busy = False  # the thread that holds the lock has jobs running
        self.running: Any = None  # what a call uses that may not have ended
        self.control = aligned((CONTROL_BYTES // 8,), np.int64)
        self.control[:] = 0
        self.address = constant_operand(self.control).address
        self.workers: list[tuple[Operand, threading.Semaphore]] = []
        self.scratch, self.scratch_bytes = constant_operand(aligned((0,), np.uint8)), 0

    def _serve(self, asleep: Operand, bell: threading.Semaphore, thread: int) -> None:
        while True:
            _wait(self.address, asleep.address, thread)
            bell.acquire()

    def wake(self, threads: int) -> None:
        """Makes sure that threads - 1 workers exist and look for jobs; fewer where the system starts no more."""
        for i in range(threads - 1):
            if i == len(self.workers) and not self._start(i):
                return
            asleep, bell = self.workers[i]
            if asleep.array[0]:  # type: ignore[index]
                asleep.array[0] = 0  # type: ignore[index]
                bell.release()

    def _start(self, i: int) -> bool:
        asleep, bell = constant_operand(aligned((8,), np.int64)), threading.Semaphore(0)
        asleep.array[:] = 0  # type: ignore[index]
        arguments = asleep, bell, i + 1
        try:
            threading.Thread(target=self._serve, args=arguments, daemon=True, name=f"minibeit-{i + 1}").start()
        except (RuntimeError, MemoryError):  # a limit on processes, or the interpreter is about to end
            return False
        self.workers.append((asleep, bell))
        return True

    def execute(self, jobs: Sequence[Job], threads: int) -> None:
        """Runs jobs one after another on at most `threads` threads.

        An exception of a signal handler ends it between two slices.  All that kernels may still use then stays in
        `running` until they have been told to stop, by this call or, if that was interrupted as well, by the next one.
        """
        if self.running is not None:
            self.stop()
        need = threads * max(job.scratch for job in jobs)
        if self.scratch_bytes < need:
            self.scratch, self.scratch_bytes = constant_operand(aligned((need,), np.uint8)), need
        address = self.scratch.address
        records = array("q")
        for function, tasks, limit, size, arguments, _ in jobs:
            records.extend((function, tasks, min(limit, threads), len(arguments) + 2, address, size, *arguments))
        self.running = jobs, records, guard.before(jobs, records, threads) if guard.ACTIVE else None
        self.control[RECORD // 8] = records.buffer_info()[0]
        self.control[STARTED // 8] = 0
        self.control[MORE // 8] = self.control[LEFT // 8] = len(jobs)  # from here no worker falls asleep
        try:
            while self.control[LEFT // 8]:
                if threads > 1:
                    self.wake(threads)
                _execute(self.address, SLICE)
        except BaseException:
            self.stop()
            raise
        if guard.ACTIVE:
            guard.after(self.running[2])
        self.running = None

    def stop(self) -> None:
        """Waits for the tasks that were begun, and forgets the others."""
        _cancel(self.address)
        self.running = None


_pool = _Pool()


def _reset_after_fork() -> None:
    global _pool
    _pool = _Pool()  # threads do not survive a fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


def execute(jobs: Sequence[Job]) -> None:
    """Runs jobs one after another; returns when all are done."""
    pool = _pool
    threads = max(job.threads for job in jobs)
    if threads > 1:
        threads = min(threads, usable_cpus())  # more would take turns with each other, spinning
    with pool.lock:
        if pool.busy:  # this is a signal handler, in the middle of the thread's own jobs
            _Pool().execute(jobs, 1)
            return
        try:
            pool.busy = True
            pool.execute(jobs, threads)
        finally:
            pool.busy = False


class _Local(threading.local):
    threads: int | None = None  # those of `num_threads(...)`


_local = _Local()


@lru_cache(maxsize=1)
def default_num_threads() -> int:
    """MINIBEIT_NUM_THREADS as it was when first asked for, else the CPUs this process may use.  Raises ValueError."""
    text = os.environ.get("MINIBEIT_NUM_THREADS", "")
    if text and not (text.isdigit() and int(text) > 0):
        raise ValueError(f"MINIBEIT_NUM_THREADS must be a positive whole number, found {text!r}; set it to 1 or more.")
    return int(text) if text else usable_cpus()


def get_num_threads() -> int:
    """Threads that an operation called here may use: those of `num_threads(...)`, else the default."""
    return _local.threads or default_num_threads()


@contextmanager
def num_threads(count: int | None) -> Iterator[None]:
    """Within the block, operations called from this Python thread use `count` threads (None: leave it as it is)."""
    if count is not None and (not isinstance(count, int) or count < 1):
        raise ValueError(f"num_threads must be a positive whole number, found {count!r}; pass 1 or more.")
    before = _local.threads
    _local.threads = before if count is None else count
    try:
        yield
    finally:
        _local.threads = before
