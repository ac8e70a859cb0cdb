"""How loaded weights are sent to another process: as the name of a file that both can map, or as arrays."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..files import mapped_file

LEAST = 1 << 20  # bytes; views of files smaller than that are sent as arrays
Stamp = tuple[tuple[str, int, int], ...]  # (path, size, time of change in nanoseconds) of every file


@dataclass(frozen=True)
class Origin:
    """The files that something was loaded from, with size and time, and the call that loads it again."""

    stamp: Stamp
    load: Callable[[], Any]

    def again(self) -> Any:
        """Loads it again.  Raises CheckpointError if a file is missing or has changed."""
        for path, size, time in self.stamp:
            if _stamp(path) != (path, size, time):
                raise CheckpointError(
                    f"{path}: a model that was loaded from it came here by its name, but the file is not here or has "
                    "changed; put it back, or load the model where it is used"
                )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were shown when the model was first loaded
            return self.load()


def origin(files: Iterable[str | os.PathLike[str]], load: Callable[..., Any], *arguments: Any) -> Origin:
    """The origin of the result of `load(*arguments)`, which reads `files`."""
    return Origin(tuple(_stamp(os.path.abspath(file)) for file in files), functools.partial(load, *arguments))


def _stamp(path: str) -> tuple[str, int, int]:
    try:
        state = Path(path).stat()
    except OSError:
        return path, -1, 0
    return path, state.st_size, state.st_mtime_ns


class LoadedArrays(dict[str, np.ndarray]):
    """{canonical name: array}; when pickled, views of a file become the file's name, other arrays are copied."""

    def __init__(self, arrays: dict[str, np.ndarray], origin: Origin | None = None) -> None:
        super().__init__(arrays)
        self.origin = origin

    def __reduce__(self) -> tuple[Any, ...]:
        mapped = [name for name, array in self.items() if mapped_file(array) is not None] if self.origin else []
        if sum(self[name].nbytes for name in mapped) < LEAST:
            return LoadedArrays, (dict(self),)
        rest = {name: array for name, array in self.items() if name not in set(mapped)}
        return _joined, (self.origin, tuple(self), rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedArrays:
        return LoadedArrays({name: array.copy() for name, array in self.items()})


def _joined(origin: Origin, names: tuple[str, ...], rest: dict[str, np.ndarray]) -> LoadedArrays:
    loaded = origin.again()
    return LoadedArrays({name: rest[name] if name in rest else loaded[name] for name in names}, origin)
