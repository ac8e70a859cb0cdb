"""The trace: optionally keeps the intermediate arrays of a call under their canonical names.

Hidden states, attention maps and the verifier all read from it.  Names are paths such as
`encoder.3.attention.probs`; the glob patterns given when the trace is made choose which are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any


class Trace(Mapping[str, Any]):
    """An ordered mapping from canonical names to the intermediate arrays of one forward pass.

    `select` is one glob pattern or several; only names that match one of them are kept.
    """

    def __init__(self, select: str | Iterable[str] = "*") -> None:
        self.select = (select,) if isinstance(select, str) else tuple(select)
        self._arrays: dict[str, Any] = {}

    def wants(self, name: str) -> bool:
        """Whether an array of that name would be kept; if not, fused code need not compute it."""
        return any(fnmatchcase(name, pattern) for pattern in self.select)

    def record(self, name: str, array: Any) -> Any:
        """Keeps `array` if its name is wanted; returns the array to continue with, here `array` itself.

        The verifier's traces return another array: that of the implementation under test.
        """
        if self.wants(name):
            self._arrays[name] = array
        return array

    def __getitem__(self, name: str) -> Any:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


class Scope:
    """Part of a trace: what is recorded here as `name` is kept as `prefix.name`."""

    def __init__(self, sinks: tuple[Trace, ...], prefix: str = "") -> None:
        self._sinks = sinks
        self._prefix = prefix

    @property
    def silent(self) -> bool:
        """Whether nothing at all is kept."""
        return not self._sinks

    def at(self, name: str | int) -> Scope:
        """The scope one level down."""
        return Scope(self._sinks, f"{self._prefix}{name}.")

    def wants(self, name: str) -> bool:
        return any(sink.wants(self._prefix + name) for sink in self._sinks)

    def record(self, name: str, array: Any) -> Any:
        """Passes `array` to every sink; returns the array to continue with."""
        for sink in self._sinks:
            array = sink.record(self._prefix + name, array)
        return array


SILENT = Scope(())  # keeps nothing: the default everywhere
