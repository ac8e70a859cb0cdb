"""The queue: kernels are noted as jobs and run one after another when it is flushed.

Python between kernels starts with cold caches, its code and data driven out, which makes it three times slower.  So
within `queued()` it does all its work first.

The rule that makes this safe: a kernel gets memory as `memory.Operand`s only, and its job keeps their owners until it
has run.  Nothing else has to be kept alive by anyone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from .machine_code import Kernel
from .memory import Operand, private_buffers, shared_buffers
from .pool import Job, execute, get_num_threads

_MOST_HELD = 64 << 20  # bytes that jobs alone may keep alive


class Queue:
    """The jobs of one thread that have not run, and how much memory they keep alive."""

    def __init__(self, recycler: Any) -> None:
        self.jobs: list[Job] = []
        self.recycler = recycler
        self.bytes = 0

    def add(self, job: Job, operands: Sequence[Operand]) -> None:
        """Notes a job that uses `operands`."""
        self.jobs.append(job)
        for o in operands:
            self.bytes += o.bytes
        if self.bytes + self.recycler.dropped > _MOST_HELD:
            self.flush()

    def flush(self) -> None:
        """Runs the jobs and releases what they kept alive."""
        jobs, self.jobs = self.jobs, []
        if not jobs:
            return
        before, _local.queue = _local.queue, None  # a signal handler that runs a model meanwhile has nothing to do
        try:
            with shared_buffers():  # with this queue, nor with buffers that its jobs are using
                execute(jobs)
        finally:
            _local.queue = before
        self.bytes = self.recycler.dropped = 0


class _Local(threading.local):
    queue: Queue | None = None  # None where kernels run at once


_local = _Local()


def run(
    kernel: Kernel,
    tasks: int,
    operands: Sequence[Operand],
    numbers: Sequence[int],
    scratch: int = 0,
    small: bool = False,
) -> None:
    """Runs `kernel(arguments, task, thread)` for each task, or notes that as a job for the queue.

    The kernel gets the address of the scratch memory, the bytes of it for each thread (at least `scratch`), the
    addresses of `operands` (0 for NOTHING), then `numbers`; both are made by its `Arguments`.  `small` work, of some
    microseconds, is done by the calling thread alone.
    """
    threads = 1 if small else min(get_num_threads(), tasks)
    size = -(-scratch // 64) * 64 + 64  # never a multiple of a page on which the threads' scratch would alias
    arguments = [o.address for o in operands]
    arguments += numbers
    job = Job(kernel.address, tasks, threads, size, arguments, [o.owner for o in operands])
    queue = _local.queue
    if queue is None:
        execute([job])
    else:
        queue.add(job, operands)


@contextmanager
def queued(wanted: bool = True) -> Iterator[None]:
    """Within the block this thread's kernels are queued; they run when it ends, or at `flush()`.

    Until then results are not there: nothing but ops that end in `run` may touch them.  If the block raises, its jobs
    are dropped.  Where it is not `wanted`, kernels run at once.
    """
    if not wanted:
        with _synchronous():
            yield
        return
    if _local.queue is not None:
        yield
        flush()
        return
    with private_buffers() as recycler:
        try:
            _local.queue = Queue(recycler)
            yield
            flush()
        finally:
            _local.queue = None


def flush() -> None:
    """Runs the jobs of this thread that are queued."""
    if _local.queue is not None:
        _local.queue.flush()


def kept_alive_bytes() -> int:
    """Bytes that the queued jobs of this thread may be the only ones to keep alive."""
    queue = _local.queue
    return 0 if queue is None else queue.bytes + queue.recycler.dropped


@contextmanager
def _synchronous() -> Iterator[None]:
    """Within the block nothing is queued; what was, has run before."""
    flush()
    queue, _local.queue = _local.queue, None
    try:
        yield
    finally:
        _local.queue = queue


def synchronous(op: Callable[..., Any]) -> Callable[..., Any]:
    """An op that reads arrays itself, or whose kernels cannot be queued: flushes first, then runs its own at once."""

    @wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _synchronous():
            return op(*args, **kwargs)

    return call
