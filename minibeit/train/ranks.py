"""The processes that train one model together, called ranks: which samples each has, and what they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")
Value = TypeVar("Value")


class Ranks:
    """A single process, to which nobody has anything to tell.  Ranks of several processes have the same methods.

    Every rank computes the same step on samples of its own, and calls these methods in the same order as the others.
    """

    rank, count = 0, 1  # this rank's number, how many there are
    local, on_host = 0, 1  # the same of those on this machine

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes files and speaks."""
        return self.rank == 0

    def shares(self, size: int) -> list[np.ndarray]:  # -> count x (n,)
        """The samples of a batch of `size` that each rank has, rising.

        With every sample i comes size - 1 - i, with which mixup mixes it.  Raises ValueError for a batch that does not
        have a sample for every rank.
        """
        pairs = (size + 1) // 2
        if pairs < self.count:
            raise ValueError(
                f"batch size: expected at least {2 * self.count - 1} for {self.count} ranks, which take two images at "
                f"a time, found {size}; start fewer ranks or make the batch larger"
            )
        halves = [np.arange(rank, pairs, self.count) for rank in range(self.count)]
        return [np.unique(np.concatenate([half, size - 1 - half])) for half in halves]

    def total(self, numbers: np.ndarray) -> np.ndarray:  # -> the same shape
        """The sum of an array over all ranks."""
        return numbers

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any rank."""
        return bool(self.total(np.array([float(flag)]))[0])

    def gathered(self, value: Value) -> list[Value]:
        """What each rank gives, in the first rank; in the others an empty list."""
        return [value]

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What the first rank makes, in every rank."""
        return make()

    def divided(self, items: Sequence[Item], work: Callable[[Sequence[Item]], list[Value]]) -> list[Value]:
        """work(items), a result for each item, of which every rank does its part; all results in every rank."""
        parts = self.gathered(work(items[self.rank :: self.count]))
        parts = self.from_first(lambda: parts)
        made: list[Any] = [None] * len(items)
        for rank, part in enumerate(parts):
            made[rank :: self.count] = part
        return made

    def copy_from_first(self, array: np.ndarray) -> None:
        """Overwrites an array by that of the first rank."""

    def cores(self, usable: int) -> int:
        """How many of `usable` cores are this rank's own, if it shares them evenly with others on this machine."""
        return usable

    def begin_sum(self, array: np.ndarray) -> None:
        """Begins to replace a contiguous array, which nobody touches until `end_sums`, by its sum over all ranks."""

    def go_on(self) -> None:
        """Gives the sums that have begun a moment to go on."""

    def end_sums(self) -> None:
        """Waits for all sums that have begun."""
