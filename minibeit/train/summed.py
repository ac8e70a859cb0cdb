"""The gradients of a batch that is computed in pieces or by several ranks, summed while the backward goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .optimizer import Slot
from .ranks import Ranks

BUCKET_BYTES = 1 << 24  # large enough that its sum costs bandwidth and not latency, small against a model


class SummedGradients:
    """One flat vector of all gradients, laid out as the optimizer's weights.

    Gradients are added as the backward completes them, last layer first.  In the last piece of a batch each bucket,
    a run of neighbours, is summed over the ranks as soon as it is complete: every element is handed over once.
    """

    empty: Callable[..., Any] = staticmethod(np.empty)  # memory for the vector

    def __init__(self, slots: Sequence[Slot], dtype: np.dtype, ranks: Ranks, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.ranks = ranks
        self.vector = self.empty(slots[-1].stop, dtype)
        self.slots = {slot.name: slot for slot in slots}
        self.buckets = _buckets(slots, bucket_bytes // self.vector.itemsize)
        self._bucket_of = {slot.name: i for i, bucket in enumerate(self.buckets) for slot in bucket}
        self.begin()

    def begin(self) -> None:
        """Forgets the batch before."""
        self._seen: set[str] = set()
        self._missing = [len(bucket) for bucket in self.buckets]

    def add(self, name: str, gradient: np.ndarray, last: bool) -> np.ndarray:
        """Adds a parameter's gradient and returns its place in the vector; `last` says that no piece is to follow."""
        slot = self.slots[name]
        place = self.vector[slot.start : slot.stop].reshape(gradient.shape)
        if name in self._seen:
            place += gradient
        else:
            place[...] = gradient
            self._seen.add(name)
        if last:
            number = self._bucket_of[name]
            self._missing[number] -= 1
            if not self._missing[number]:
                self._send(number)
            self.ranks.go_on()
        return place

    def seen(self) -> list[bool]:
        """Which parameters have a gradient in this batch, in the order of the slots."""
        return [name in self._seen for name in self.slots]

    def end(self) -> None:
        """Waits until the vector is the sum over all ranks; what had no gradient in the batch counts as zero."""
        for number, missing in enumerate(self._missing):
            if missing:
                for slot in self.buckets[number]:
                    if slot.name not in self._seen:
                        self.vector[slot.start : slot.stop] = 0
                self._send(number)
        self.ranks.end_sums()

    def _send(self, number: int) -> None:
        bucket = self.buckets[number]
        self.ranks.begin_sum(self.vector[bucket[0].start : bucket[-1].stop])


def _buckets(slots: Sequence[Slot], elements: int) -> list[list[Slot]]:
    """Runs of slots of at least so many elements each, but for the last."""
    buckets: list[list[Slot]] = [[]]
    for slot in slots:
        if buckets[-1] and buckets[-1][-1].stop - buckets[-1][0].start >= elements:
            buckets.append([])
        buckets[-1].append(slot)
    return buckets
