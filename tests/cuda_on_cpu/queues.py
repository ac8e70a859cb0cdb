"""Work that waits in queues, as on a GPU, and the check that nothing in them depends on luck.

While `world.asynchronous`, a job runs no sooner than the host waits for it: jobs of one stream in their order, jobs of
other streams as late as events and the null stream's rules allow.  Each job says which bytes it reads and writes.  Two
that touch the same bytes, one of them writing, without anything that orders them are a HazardError when the second is
launched, whatever the results would have been.

What orders jobs: their stream; an event that one stream records and another waits for; the null stream, which waits for
every blocking stream of its device and is waited for by them; a host that waited for the first before it launched the
second, in whichever thread.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from .world import FOLDER, world


class HazardError(Exception):
    """Memory is used, changed or given back while work that waits in a queue still counts on it."""


class Use(NamedTuple):
    """What a job does with memory: bytes `first` to `end` of what `history` is about."""

    history: History
    first: int
    end: int
    write: bool


class Job(NamedTuple):
    """One piece of work.  `after` says how far other queues must be before it may run."""

    name: str
    place: str
    queue: Queue
    number: int
    after: dict[Queue, int]
    run: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.name} on {self.queue} (at {self.place})"


class Queue:
    """What waits in one stream.  `seen` is how many jobs of other queues precede whatever is launched here next."""

    count = 0
    alive: weakref.WeakSet[Queue] = weakref.WeakSet()

    def __init__(self, device: int, null: bool = False, non_blocking: bool = False) -> None:
        Queue.count += 1
        Queue.alive.add(self)
        self.device, self.null, self.non_blocking = device, null, non_blocking
        self.name = "the null stream" if null else f"stream {Queue.count}"
        self.jobs: deque[Job] = deque()
        self.launched = self.done = 0
        self.seen: dict[Queue, int] = {}

    def __str__(self) -> str:
        return self.name

    def clock(self) -> dict[Queue, int]:
        """How far every queue is that anything launched here so far depends on, this one included."""
        return {queue: n for queue, n in {**self.seen, self: self.launched}.items() if n > queue.done}

    def wait_for(self, clock: dict[Queue, int]) -> None:
        """Whatever is launched here from now on runs after what `clock` counts."""
        for queue, number in clock.items():
            if queue is not self:
                self.seen[queue] = max(number, self.seen.get(queue, 0))

    def finish(self, number: int | None = None) -> None:
        """The host waits for the jobs up to `number`, by default for all.

        Raises what one of them does; then, as on a GPU, everything else that waits on the device is lost.
        """
        number = self.launched if number is None else number
        with world.lock:
            while self.jobs and self.jobs[0].number <= number:
                job = self.jobs.popleft()
                for queue, until in job.after.items():
                    queue.finish(until)
                self.done = job.number
                if not self.jobs:
                    _active.discard(self)
                _run(job)

    def abandon(self) -> None:
        """Forgets what waits here."""
        self.jobs.clear()
        self.done = self.launched
        _active.discard(self)


class History:
    """Who used some memory and may still be at it: {(queue, write, first, end): the last job that did}."""

    def __init__(self) -> None:
        self.uses: dict[tuple[Queue, bool, int, int], Job] = {}

    def idle(self) -> bool:
        """Whether the host knows that everybody has finished."""
        self.uses = {key: job for key, job in self.uses.items() if job.number > job.queue.done}
        return not self.uses

    def queues(self) -> set[Queue]:
        """Those that still have work with the memory."""
        self.idle()
        return {queue for queue, *_ in self.uses}

    def check(self, new: Job, first: int, end: int, write: bool) -> None:
        """Raises HazardError if `new` may overtake, or be overtaken by, a job that it must not meet."""
        if self.idle():
            return
        for (queue, wrote, low, high), job in self.uses.items():
            apart = first >= high or low >= end or not (write or wrote)
            if not apart and queue is not new.queue and new.after.get(queue, 0) < job.number:
                raise HazardError(
                    f"{new} {'writes' if write else 'reads'} memory that {job} {'writes' if wrote else 'reads'}, and "
                    "nothing orders the two: let the host wait in between, or one stream for an event of the other"
                )


_active: set[Queue] = set()  # those with jobs
_null: dict[int, Queue] = {}
_local = threading.local()


def launch(name: str, run: Callable[[], None], uses: Iterable[Use] = (), queue: Queue | None = None) -> None:
    """Queues `run`, by default in the current stream; runs it at once unless `world.asynchronous`.

    `run` must hold no device array: a launch keeps nothing alive.  Raises HazardError.
    """
    with world.lock:
        if not world.asynchronous:
            run()
            return
        queue = queue or current_queue()
        _order_by_null_stream(queue)
        after = {other: n for other, n in queue.seen.items() if n > other.done}
        queue.seen = dict(after)
        job = Job(name, caller(), queue, queue.launched + 1, after, run)
        uses = [use for use in uses if use.end > use.first]
        for use in uses:
            use.history.check(job, use.first, use.end, use.write)
        for use in uses:
            use.history.uses[queue, use.write, use.first, use.end] = job
        queue.launched += 1
        queue.jobs.append(job)
        _active.add(queue)


def _order_by_null_stream(queue: Queue) -> None:
    for other in list(_active):
        met = other.device == queue.device and other is not queue and not (queue.non_blocking or other.non_blocking)
        if met and (queue.null or other.null):
            queue.wait_for(other.clock())


def _run(job: Job) -> None:
    try:
        job.run()
    except Exception as error:
        for queue in _of_device(job.queue.device):
            queue.abandon()
        error.args = (f"{error}; launched at {job.place}", *error.args[1:])
        raise


def _of_device(device: int) -> list[Queue]:
    return [queue for queue in _active if queue.device == device]


def current_queue() -> Queue:
    """That of this thread's stream on its device."""
    return current_queues().get(world.current) or null_queue(world.current)


def current_queues() -> dict[int, Queue]:
    """{device: queue} of the streams that this thread made current."""
    if not hasattr(_local, "queues"):
        _local.queues = {}
    return _local.queues


def null_queue(device: int) -> Queue:
    """That of a device's null stream."""
    if device not in _null:
        _null[device] = Queue(device, null=True)
    return _null[device]


def pending_on(device: int) -> bool:
    """Whether a device has work that has not run."""
    return bool(_of_device(device))


def finish_device(device: int) -> None:
    """The host waits for all work of a device."""
    for queue in _of_device(device):
        queue.finish()


def finish_all(quietly: bool = False) -> None:
    """The host waits for everything; `quietly`: what is raised is left out, as something else is on its way."""
    while _active:
        try:
            next(iter(_active)).finish()
        except Exception:
            if not quietly:
                finish_all(quietly=True)
                raise


def caller() -> str:
    """The nearest line outside this folder."""
    frame = sys._getframe(1)
    while frame is not None and os.path.dirname(frame.f_code.co_filename) == FOLDER:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "?"
