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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any

import numpy as np

from .machine_code import Kernel
from .memory import aligned, held_bytes, let_go, own_buffers

SHARES = 64  # of a job's tasks, one for each thread; further threads begin with another one's
MORE = 224  # where in the control block stands how many jobs are still to come, in bytes
_CONTROL_BYTES = 256 + 64 * SHARES  # see kernels/pool.py
_MOST_HELD = 64 << 20  # bytes that jobs may keep alive by waiting

_execute = Kernel("minibeit.ops.numba_cpu.kernels.pool", "execute", 3)
_wait = Kernel("minibeit.ops.numba_cpu.kernels.pool", "wait", 3)


class _Pool:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.control = aligned((_CONTROL_BYTES // 8,), np.int64)
        self.control[:] = 0
        self.control_address = self.control.ctypes.data
        self.workers: list[tuple[np.ndarray, threading.Semaphore]] = []
        self.scratch = aligned((0,), np.uint8)
        self.scratch_address = 0

    def _serve(self, asleep: np.ndarray, bell: threading.Semaphore, thread: int) -> None:
        while True:
            _wait(self.control_address, asleep.ctypes.data, thread)
            bell.acquire()

    def wake(self, threads: int) -> None:
        """Makes sure that threads - 1 workers exist and look for jobs."""
        for i in range(threads - 1):
            if i == len(self.workers):
                asleep, bell = aligned((8,), np.int64), threading.Semaphore(0)
                asleep[:] = 0
                self.workers.append((asleep, bell))
                name, arguments = f"minibeit-{i + 1}", (asleep, bell, i + 1)
                threading.Thread(target=self._serve, args=arguments, daemon=True, name=name).start()
            asleep, bell = self.workers[i]
            if asleep[0]:
                asleep[0] = 0
                bell.release()


_pool = _Pool()


def _reset_after_fork() -> None:
    global _pool
    _pool = _Pool()  # threads do not survive a fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


Job = tuple[int, int, int, int, Sequence[int]]  # kernel, tasks, threads, scratch bytes of each, arguments


class _Local(threading.local):
    threads: int | None = None  # those of `num_threads(...)`
    waiting: list[Job] | None = None


_local = _Local()


@lru_cache(maxsize=1)
def default_num_threads() -> int:
    """MINIBEIT_NUM_THREADS as it was when first asked for, else the cores this process may use.  Raises ValueError."""
    text = os.environ.get("MINIBEIT_NUM_THREADS", "")
    if text and not (text.isdigit() and int(text) > 0):
        raise ValueError(f"MINIBEIT_NUM_THREADS must be a positive whole number, found {text!r}; set it to 1 or more.")
    if text:
        return int(text)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def run(kernel: Kernel, tasks: int, arguments: Sequence[int], scratch: int = 0, small: bool = False) -> None:
    """Runs `kernel(arguments, task, thread)` for each task; every thread has `scratch` bytes of its own.

    The kernel finds the address of the scratch memory and the bytes per thread as its arguments 0 and 1, then
    `arguments` from 2 on.  `small` work, of some microseconds, is done by the calling thread alone.
    """
    threads = 1 if small else min(get_num_threads(), tasks)
    size = -(-scratch // 64) * 64 + 64  # never a multiple of a page on which the threads' scratch would alias
    job = kernel.address, tasks, threads, size, arguments
    waiting = _local.waiting
    if waiting is None:
        _run([job])
        return
    waiting.append(job)
    if held_bytes() > _MOST_HELD:
        finish()


@contextmanager
def deferred(wanted: bool = True) -> Iterator[None]:
    """Within the block `run` notes this thread's jobs; they run one after another when it ends, or at `finish()`.

    Between two kernels Python is three times slower than it need be: its code and data have been driven from the
    caches by then.  So it does all its work first.  Until then results are not there: nothing but ops that end in
    `run` may touch them.  If the block raises, its jobs are dropped.  Where it is not `wanted`, jobs run at once.
    """
    if not wanted:
        with _at_once():
            yield
        return
    if _local.waiting is not None:
        yield
        finish()
        return
    with own_buffers():
        _local.waiting = []
        try:
            yield
            finish()
        finally:
            _local.waiting = None


def finish() -> None:
    """Runs the jobs of this thread that wait."""
    waiting = _local.waiting
    if waiting:
        _local.waiting = []
        _run(waiting)
        let_go()


@contextmanager
def _at_once() -> Iterator[None]:
    """Within the block no job waits; those that did run before."""
    finish()
    waiting, _local.waiting = _local.waiting, None
    try:
        yield
    finally:
        _local.waiting = waiting


def settled(op: Callable[..., Any]) -> Callable[..., Any]:
    """An op that reads arrays itself, or whose jobs cannot wait: what waits runs before it, its own jobs at once."""

    @wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _at_once():
            return op(*args, **kwargs)

    return call


def _run(jobs: Sequence[Job]) -> None:
    pool = _pool
    threads = max(job[2] for job in jobs)
    need = max(job[2] * job[3] for job in jobs)
    with pool.lock:
        if pool.scratch.nbytes < need:
            pool.scratch = aligned((need,), np.uint8)
            pool.scratch_address = pool.scratch.ctypes.data
        records = array("q")
        for function, tasks, limit, size, arguments in jobs:
            records.extend((function, tasks, limit, len(arguments) + 2, pool.scratch_address, size, *arguments))
        try:
            if threads > 1:
                pool.control[MORE // 8] = len(jobs)  # from here no worker falls asleep
                pool.wake(threads)
            _execute(pool.control_address, records.buffer_info()[0], len(jobs))
        finally:
            pool.control[MORE // 8] = 0
