"""Items read by threads while the model computes; what cannot be read is named and left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from ..errors import ImageError
from ..images.ahead import read_ahead

Item = TypeVar("Item")
AHEAD = 2  # batches that are read before they are asked for


class Reader(Generic[Item]):
    """Reads `items` by `workers` threads, in their order; `left_out` collects a sentence for each that cannot be."""

    def __init__(self, items: Sequence[Item], read: Callable[[Item], Any], workers: int) -> None:
        self.items, self.read, self.workers = items, read, workers
        self.left_out: list[str] = []

    def each(self, most: int = AHEAD) -> Iterator[tuple[Item, Any]]:
        """(item, what `read` makes of it), `most` of them before they are asked for."""
        results = read_ahead(self.items, self._tried, self.workers, most)
        for item, result in zip(self.items, results):
            if isinstance(result, _Refused):
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
