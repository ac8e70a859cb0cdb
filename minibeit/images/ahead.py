"""Items read by threads before they are asked for, so that a model does not wait for images to be decoded."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np

from ..machine import usable_cpus

Item = TypeVar("Item")
Result = TypeVar("Result")
MOST_WORKERS = 8
AHEAD = 2  # batches that are read before they are computed


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


def computed(
    items: Iterable[Item],
    read: Callable[[Item], np.ndarray],
    compute: Callable[[np.ndarray], Iterable[Any]],
    batch_size: int = 1,
    workers: int | None = None,
) -> Iterator[tuple[Item, Any]]:
    """(item, its value) for all items in their order; the value is a ValueError where there is none.

    `read` makes an array of an item, in threads ahead of `compute`, which makes a sequence of values of a batch of
    arrays.  Arrays of different shapes do not share a batch.  Only ValueErrors of the two become values.
    """

    def tried(item: Item) -> tuple[Item, Any]:
        try:
            return item, read(item)
        except ValueError as error:
            return item, error

    waiting: list[tuple[Item, Any]] = []
    shape, count = None, 0
    for item, array in read_ahead(items, tried, workers, AHEAD * batch_size):
        good = isinstance(array, np.ndarray)
        if good and count and array.shape != shape:
            yield from _values(waiting, compute)
            waiting, count = [], 0
        waiting.append((item, array))
        if good:
            shape, count = array.shape, count + 1
        if count in (0, batch_size):
            yield from _values(waiting, compute)
            waiting, count = [], 0
    yield from _values(waiting, compute)


def default_workers() -> int:
    """One thread for each CPU that this process may use, at most MOST_WORKERS."""
    return min(usable_cpus(), MOST_WORKERS)


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


def _values(waiting: list[tuple[Item, Any]], compute: Callable[[np.ndarray], Any]) -> Iterator[tuple[Item, Any]]:
    arrays = [array for _, array in waiting if isinstance(array, np.ndarray)]
    refused: ValueError | None = None
    values: Iterator[Any] = iter(())
    try:
        values = iter(compute(np.stack(arrays)) if arrays else ())
    except ValueError as error:
        refused = error
    for item, array in waiting:
        yield item, (refused or next(values)) if isinstance(array, np.ndarray) else array
