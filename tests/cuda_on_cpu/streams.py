"""The pretended `cupy.cuda.Device`, `Stream` and `Event`."""

from __future__ import annotations

import threading
import time
from typing import Any

from .memory import default_pool
from .queues import Queue, current_queue, current_queues, finish_device, launch, null_queue, pending_on
from .world import CUDARuntimeError, world

_local = threading.local()


class Device:
    """Device `id`, made this thread's current one by `with` or `use`."""

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
        world.note_wait(pending_on(self.id))
        finish_device(self.id)

    @property
    def compute_capability(self) -> str:
        return "90"

    @property
    def mem_info(self) -> tuple[int, int]:
        with self:
            return world.memory - default_pool.total_bytes(), world.memory


class Stream:
    """A stream of the current device; the null stream is that of whichever device is current when it is used."""

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False) -> None:
        if ptds:
            raise NotImplementedError("the stand-in knows no default stream of each thread")
        self._queue = None if null else Queue(world.current, non_blocking=non_blocking)
        self.ptr = 0 if null else id(self._queue)

    @property
    def queue(self) -> Queue:
        return self._queue or null_queue(world.current)

    def __enter__(self) -> Stream:
        _left().append((world.current, current_queues().get(world.current)))
        return self.use()

    def __exit__(self, *args: Any) -> None:
        _make_current(*_left().pop())

    def use(self) -> Stream:
        """Makes it the stream of this thread on its device."""
        if self._queue and self._queue.device != world.current:
            raise CUDARuntimeError(400)
        _make_current(world.current, self._queue)
        return self

    def synchronize(self) -> None:
        world.check()
        world.note_wait(bool(self.queue.jobs))
        self.queue.finish()

    def record(self, event: Any = None) -> Any:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Any) -> None:
        """What is launched here later runs after what the event stands for: nothing, if it was never recorded."""
        self.queue.wait_for(event.clock)


def _left() -> list[tuple[int, Queue | None]]:
    """What this thread's streams, entered and not yet left, took the place of."""
    if not hasattr(_local, "left"):
        _local.left = []
    return _local.left


def _make_current(device: int, queue: Queue | None) -> None:
    if queue is None:
        current_queues().pop(device, None)
    else:
        current_queues()[device] = queue


def get_current_stream(device_id: int = -1) -> Stream:
    """That of this thread on its device."""
    queue = current_queue()
    if queue.null:
        return null_stream
    stream = object.__new__(Stream)
    stream._queue, stream.ptr = queue, id(queue)
    return stream


null_stream = Stream(null=True)
Stream.null = null_stream


class Event:
    """A place in a queue, and the moment of the host's clock when everything before it had run."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.time: float | None = None
        self.clock: dict[Queue, int] = {}

    def record(self, stream: Any = None) -> None:
        world.check()
        queue = stream.queue if stream else current_queue()
        self.time = None
        launch("an event", self._happen, queue=queue)
        self.clock = queue.clock()

    def _happen(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        world.check()
        world.note_wait(any(queue.done < number for queue, number in self.clock.items()))
        for queue, number in self.clock.items():
            queue.finish(number)

    @property
    def done(self) -> bool:
        """Whether it has happened or was never recorded.  Who asks again and again sees the device get on."""
        queue, number = next(reversed(self.clock.items()), (None, 0))
        if queue is None or queue.done >= number:
            return True
        queue.finish(queue.done + 1)
        return False


def get_elapsed_time(start: Event, end: Event) -> float:
    """Milliseconds between two events that have happened."""
    if any(event.time is None for event in (start, end)):
        raise CUDARuntimeError(600 if start.clock and end.clock else 1)
    return 1e3 * (end.time - start.time)
