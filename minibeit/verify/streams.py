"""Model runs that stop at every recorded array, so that several advance together and none keeps all its arrays.

A `Stream` is a coroutine made of a thread: exactly one thread runs at any time, and only current arrays are alive.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from ..trace import Trace

Array = Any


class _Stopped(BaseException):
    """Unwinds a run whose remaining arrays nobody wants; no `except Exception` of a model may catch it."""


class Source(Protocol):
    """One implementation: named arrays that are asked for roughly in the order of the network."""

    label: str
    names: tuple[str, ...]  # everything it will deliver
    dtypes: Mapping[str, str]  # of names whose arrays do not say in which precision they were stored

    def take(self, name: str) -> Array | None:
        """The array of that name, handed out once; None if this source does not have it."""

    def close(self) -> None:
        """Ends the run behind it."""


class Stream:
    """A run in slow motion: `advance()` lets it go on to its next recorded array.

    `run` is called on a thread of its own with a `Trace` that wants `names`, by default all; what `advance` is given
    becomes the result of `record`, that is what the run goes on with.  What the run raises comes out of `advance`.
    """

    def __init__(self, run: Callable[[Trace], Any], names: Iterable[str] | None = None) -> None:
        self._tap = _Tap(self, names)
        self._run = run
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._item: tuple[str, Array] | None = None
        self._reply: Array | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._over = self._stopped = False

    def advance(self, reply: Array | None = None) -> tuple[str, Array] | None:
        """(name, array) of the next record; None when the run is over.

        `reply` replaces the array of the record before; None leaves that as it was.
        """
        if self._over:
            return None
        self._reply = reply
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        else:
            self._theirs.release()
        self._mine.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        item, self._item = self._item, None
        return item

    def close(self) -> None:
        """Ends the run where it stands."""
        self._stopped = True
        if self._thread is not None and not self._over:
            self._theirs.release()
            self._mine.acquire()
        self._over = True

    def _work(self) -> None:
        try:
            self._run(self._tap)
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        self._over = True
        self._mine.release()

    def _hand_over(self, name: str, array: Array) -> Array:
        self._item = name, array
        self._mine.release()
        self._theirs.acquire()
        if self._stopped:
            raise _Stopped
        reply, self._reply = self._reply, None
        return array if reply is None else reply


class _Tap(Trace):
    """The trace of a streamed run: keeps nothing, hands everything over."""

    def __init__(self, stream: Stream, names: Iterable[str] | None) -> None:
        super().__init__()
        self._stream = stream
        self._names = None if names is None else frozenset(names)

    def wants(self, name: str) -> bool:
        return self._names is None or name in self._names

    def record(self, name: str, array: Array) -> Array:
        return self._stream._hand_over(name, array) if self.wants(name) else array


class RunSource:
    """A run as a source; arrays that come before they are asked for wait here.

    It stands one record ahead, where what the op before needed beside its result is gone: half a gigabyte at the end of
    PyTorch's segmentation head.
    """

    def __init__(self, label: str, names: Iterable[str], run: Callable[[Trace], Any]) -> None:
        self.label = label
        self.names = tuple(names)
        self.dtypes: Mapping[str, str] = {}
        self.run = run
        self._stream = Stream(run, self.names)
        self._waiting: dict[str, Array] = {}
        self._expected = set(self.names)

    def take(self, name: str) -> Array | None:
        while name in self._expected and self._go_on():
            pass
        array = self._waiting.pop(name, None)
        if not self._waiting:
            self._go_on()
        return array

    def _go_on(self) -> bool:
        """Lets the run come to its next array; False if there is none."""
        item = self._stream.advance()
        if item is None:
            return False
        self._expected.discard(item[0])
        self._waiting[item[0]] = host(item[1])
        return True

    def close(self) -> None:
        self._stream.close()
        self._waiting.clear()


class TraceSource:
    """A finished trace, in memory or in a file, as a source."""

    def __init__(self, label: str, arrays: Mapping[str, Array], dtypes: Mapping[str, str] | None = None) -> None:
        self.label = label
        self.names = tuple(arrays)
        self.dtypes = dtypes or {}
        self._arrays = arrays

    def take(self, name: str) -> Array | None:
        return host(self._arrays[name]) if name in self._arrays else None

    def close(self) -> None:
        """Nothing runs."""


def host(array: Array) -> np.ndarray:
    """An array of any backend in main memory."""
    return array.get() if hasattr(array, "get") else np.asarray(array)
