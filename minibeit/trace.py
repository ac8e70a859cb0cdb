"""The one optional trace: a sink that keeps intermediate arrays under their canonical names.

Hidden states, attention maps and the verifier all read from it.  Names are paths such as
`encoder.3.attention.probs`; which of them are kept is chosen by glob patterns when the trace is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any


class Trace(Mapping[str, Any]):
    """An ordered mapping from canonical names to the arrays one forward pass produced.

    `select` is a glob pattern or several of them; only names that match one are kept.
    """

    def __init__(self, select: str | Iterable[str] = "*") -> None:
        self.select = (select,) if isinstance(select, str) else tuple(select)
        self._arrays: dict[str, Any] = {}

    def wants(self, name: str) -> bool:
        """Whether an array of that name would be kept, so that fused code knows what it may leave out."""
        return any(fnmatchcase(name, pattern) for pattern in self.select)

    def record(self, name: str, array: Any) -> Any:
        """Keeps `array` if its name is wanted; gives back what the pass is to go on with, here `array` itself.

        The verifier's traces give back another array: that of the implementation under test.
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
        """Hands `array` to every sink; gives back what the pass is to go on with."""
        for sink in self._sinks:
            array = sink.record(self._prefix + name, array)
        return array


SILENT = Scope(())  # keeps nothing: the default everywhere
