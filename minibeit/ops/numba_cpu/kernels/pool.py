"""What the threads of the pool run: the caller's side and the workers' side of a job.

The control block is an array of int64, one cache line per counter.
"""

from __future__ import annotations

from numba import njit

from .vector import add_atomic, call_task, load_atomic, pause, sched_yield, store_atomic

_SEQUENCE, _OPEN, _NEXT, _ACTIVE, _JOINED = 0, 64, 128, 192, 256  # byte offsets
_FUNCTION, _ARGUMENTS, _COUNT, _LIMIT = 320, 328, 336, 344
_SPINS = 40_000  # about a millisecond of pauses


@njit(error_model="numpy")
def _work(control, thread):
    function, arguments = load_atomic(control + _FUNCTION), load_atomic(control + _ARGUMENTS)
    count = load_atomic(control + _COUNT)
    task = add_atomic(control + _NEXT, 1)
    while task < count:
        call_task(function, arguments, task, thread)
        task = add_atomic(control + _NEXT, 1)


def execute(control, function, arguments, count, limit):
    """The caller: opens a job of `count` tasks for `limit` threads, takes tasks itself, returns when all are done."""
    store_atomic(control + _FUNCTION, function)
    store_atomic(control + _ARGUMENTS, arguments)
    store_atomic(control + _COUNT, count)
    store_atomic(control + _LIMIT, limit)
    store_atomic(control + _NEXT, 0)
    store_atomic(control + _JOINED, 0)
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


def wait(control, asleep):
    """A worker: serves jobs until none came for a while, then marks itself asleep and returns."""
    seen, idle = -1, 0
    while True:
        if load_atomic(control + _OPEN) == 1 and load_atomic(control + _SEQUENCE) != seen:
            add_atomic(control + _ACTIVE, 1)  # from here the job cannot end, if it is still open
            if load_atomic(control + _OPEN) == 1:
                seen = load_atomic(control + _SEQUENCE)
                ticket = add_atomic(control + _JOINED, 1)
                if ticket < load_atomic(control + _LIMIT) - 1:
                    _work(control, ticket + 1)
            add_atomic(control + _ACTIVE, -1)
            store_atomic(asleep, 0)
            idle = 0
        elif idle < _SPINS:
            idle += 1
            pause()
        elif load_atomic(asleep) == 1:
            return
        else:
            store_atomic(asleep, 1)  # then one more look, so that no job is missed
