"""Ranks that are threads of one process, to test in moments what several processes do."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from minibeit.train.ranks import Ranks

SECONDS = 60  # after which a rank that waits for another gives up


class Meeting:
    """Where threads wait for each other and see what each has brought."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=SECONDS)
        self.brought: list[Any] = [None] * count

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.brought[rank] = value
        self.barrier.wait()
        values = list(self.brought)
        self.barrier.wait()
        return values


class ThreadRanks(Ranks):
    """One of several threads.  Sums are made late, at `end_sums`, so that whoever reads them before sees it."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank, self.count = meeting, rank, len(meeting.brought)
        self.begun: list[np.ndarray] = []
        self.handed_over = 0

    def total(self, numbers):
        return sum(self.meeting.exchange(self.rank, numbers.copy()))

    def gathered(self, value):
        values = self.meeting.exchange(self.rank, value)
        return values if self.first else []

    def from_first(self, make):
        made = self.meeting.exchange(self.rank, make() if self.first else None)[0]
        return made if self.first else copy.deepcopy(made)

    def copy_from_first(self, array):
        array[...] = self.meeting.exchange(self.rank, array.copy())[0]

    def begin_sum(self, array):
        self.handed_over += array.nbytes
        self.begun.append(array)

    def end_sums(self):
        for array in self.begun:
            array[...] = self.total(array)
        self.begun = []


def on_ranks(count: int, work: Callable[[ThreadRanks], Any]) -> list[Any]:
    """work(ranks) of `count` threads; the error of the first that failed is raised."""
    meeting = Meeting(count)
    made: list[Any] = [None] * count

    def run(rank: int) -> None:
        try:
            made[rank] = work(ThreadRanks(meeting, rank))
        except BaseException as error:  # what pytest is to see
            made[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [value for value in made if isinstance(value, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return made
