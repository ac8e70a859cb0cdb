"""What the threads of the pool run: the caller's side and the workers' side of a job.

The control block is an array of int64, one cache line per counter.  Tasks are numbered, and thread i begins with the
i-th share of the numbers, so that from one job to the next it finds its rows in its own caches; a thread that is done
takes tasks of the others' shares.
"""

from __future__ import annotations

from numba import njit

from ..pool import MORE, SHARES
from .vector import add_atomic, arguments, call_task, load_atomic, pause, sched_yield, store_atomic

_SEQUENCE, _OPEN, _ACTIVE = 0, 64, 128  # byte offsets
_FUNCTION, _ARGUMENTS, _COUNT, _LIMIT = 192, 200, 208, 216
_NEXT = 256  # the next task of each share
_SPINS = 40_000  # about a millisecond of pauses


@njit(error_model="numpy")
def _work(control, thread):
    function, arguments = load_atomic(control + _FUNCTION), load_atomic(control + _ARGUMENTS)
    count, shares = load_atomic(control + _COUNT), min(load_atomic(control + _LIMIT), SHARES)
    for i in range(shares):
        share = (thread + i) % shares
        counter, end = control + _NEXT + 64 * share, count * (share + 1) // shares
        task = add_atomic(counter, 1)
        while task < end:
            call_task(function, arguments, task, thread)
            task = add_atomic(counter, 1)


@njit(error_model="numpy")
def _job(control, function, count, limit, arguments):
    """Opens a job of `count` tasks for `limit` threads, takes tasks itself, returns when all are done."""
    store_atomic(control + _FUNCTION, function)
    store_atomic(control + _ARGUMENTS, arguments)
    store_atomic(control + _COUNT, count)
    store_atomic(control + _LIMIT, limit)
    shares = min(limit, SHARES)
    for share in range(shares):
        store_atomic(control + _NEXT + 64 * share, count * share // shares)
    add_atomic(control + _SEQUENCE, 1)
    store_atomic(control + _OPEN, 1)
    _work(control, 0)
    store_atomic(control + _OPEN, 0)
    spins = 0
    while load_atomic(control + _ACTIVE) != 0:
        spins += 1
        pause()
        if spins > 2000:  # the worker may have lost its core to another process
            sched_yield()


def execute(control, records, jobs):
    """The caller: runs jobs in turn; the record of each is function, tasks, threads, how many arguments, these."""
    for left in range(jobs, 0, -1):
        store_atomic(control + MORE, left - 1)
        function, count, limit, length = arguments(records, 4)
        _job(control, function, count, limit, records + 32)
        records += 32 + 8 * length


def wait(control, asleep, thread):
    """Worker number `thread`: serves jobs until none came for a while, then marks itself asleep and returns."""
    seen, idle = -1, 0
    while True:
        if load_atomic(control + _OPEN) == 1 and load_atomic(control + _SEQUENCE) != seen:
            add_atomic(control + _ACTIVE, 1)  # from here the job cannot end, if it is still open
            if load_atomic(control + _OPEN) == 1:
                seen = load_atomic(control + _SEQUENCE)
                if thread < load_atomic(control + _LIMIT):
                    _work(control, thread)
            add_atomic(control + _ACTIVE, -1)
            store_atomic(asleep, 0)
            idle = 0
        elif idle < _SPINS:
            idle += 1
            pause()
        elif load_atomic(control + MORE) > 0:  # jobs are coming, and nobody will be woken for them
            sched_yield()
        elif load_atomic(asleep) == 1:
            return
        else:
            store_atomic(asleep, 1)  # then one more look, so that no job is missed
