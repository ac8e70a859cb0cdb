"""Items read by threads before they are asked for, so that a model does not wait for images to be decoded."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
MOST_WORKERS = 8


def read_ahead(
    items: Iterable[Item], read: Callable[[Item], Result], workers: int | None = None, most: int | None = None
) -> Iterator[Result]:
    """read(item) for every item, in the order of the items, computed by threads while the caller is busy.

    `read` may be an image processor: `for inputs in read_ahead(paths, processor): model(**inputs)`.  `workers` is the
    number of threads (by default one for each CPU, at most 8), `most` how many results are kept before they are asked
    for (by default twice as many): with them it bounds the memory, and how far `items`, which may be a generator, is
    consumed.  What `read` raises is raised where its result would come.  Threads end with the iterator, and do not
    delay the end of the program.
    """
    count = default_workers() if workers is None else workers
    limit = 2 * count if most is None else most
    if count < 1 or limit < 0:
        raise ValueError(f"expected at least one worker and not less than 0 results, found {workers} and {most}")
    return _results(items, read, count, limit)


def default_workers() -> int:
    """One thread for each CPU that this process may use, at most MOST_WORKERS."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, MOST_WORKERS)


def _results(items: Iterable[Item], read: Callable[[Item], Result], workers: int, most: int) -> Iterator[Result]:
    tasks: SimpleQueue[Any] = SimpleQueue()
    waiting: deque[Future[Result]] = deque()
    started = 0
    try:
        for item in items:
            waiting.append(Future())
            tasks.put((waiting[-1], item))
            if started < workers:  # daemons, unlike those of ThreadPoolExecutor: Ctrl-C does not wait for a large image
                threading.Thread(target=_work, args=(tasks, read), daemon=True, name="minibeit-read").start()
                started += 1
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        for _ in range(started):
            tasks.put(None)


def _work(tasks: SimpleQueue[Any], read: Callable[[Any], Any]) -> None:
    while (task := tasks.get()) is not None:
        future, item = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(read(item))
            except BaseException as error:
                future.set_exception(error)
        del task, future, item  # while the thread waits it keeps nothing in memory
