"""Items read by threads while the model computes; what cannot be read is named and left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from ..errors import ImageError
from ..images.ahead import read_ahead

Item = TypeVar("Item")
Record = TypeVar("Record")
AHEAD = 2  # batches that are read before they are asked for


@dataclass(frozen=True)
class Measured(Generic[Record]):
    """What was found of each image that could be used, and of the others their paths and a sentence each."""

    records: list[Record]
    lost: list[str]
    left_out: list[str]


class Reader(Generic[Item]):
    """Reads `items`, paths or what has a path, by `workers` threads, in their order.

    `lost` collects the paths of those that cannot be read, `left_out` a sentence for each.
    """

    def __init__(self, items: Sequence[Item], read: Callable[[Item], Any], workers: int) -> None:
        self.items, self.read, self.workers = items, read, workers
        self.lost: list[str] = []
        self.left_out: list[str] = []

    def each(self, most: int = AHEAD) -> Iterator[tuple[Item, Any]]:
        """(item, what `read` makes of it), `most` of them before they are asked for."""
        results = read_ahead(self.items, self._tried, self.workers, most)
        for item, result in zip(self.items, results):
            if isinstance(result, _Refused):
                self.lost.append(getattr(item, "path", str(item)))
                self.left_out.append(result.reason)
            else:
                yield item, result

    def batches(self, size: int) -> Iterator[tuple[list[Item], np.ndarray]]:
        """(items, arrays stacked): batches of `size`, of fewer at the end and where the shape of arrays changes."""
        for items, arrays in self.groups(size, np.shape):
            yield items, np.stack(arrays)

    def groups(self, size: int, key: Callable[[Any], Any]) -> Iterator[tuple[list[Item], list[Any]]]:
        """(items, what `read` makes of them): `size` of them, fewer at the end and where the `key` of what is read
        changes."""
        items: list[Item] = []
        read: list[Any] = []
        for item, one in self.each(AHEAD * size):
            if read and (len(read) == size or key(one) != key(read[0])):
                yield items, read
                items, read = [], []
            items.append(item)
            read.append(one)
        if read:
            yield items, read

    def measured(self, records: list[Record]) -> Measured[Record]:
        """What was found of what was read, beside what could not be."""
        return Measured(records, self.lost, self.left_out)

    def _tried(self, item: Item) -> Any:
        try:
            return self.read(item)
        except OSError as error:
            named = error.filename is not None and error.strerror is not None
            return _Refused(f"{error.filename}: {error.strerror}" if named else str(error))
        except ImageError as error:
            return _Refused(str(error))


class _Refused:
    def __init__(self, reason: str) -> None:
        self.reason = reason
