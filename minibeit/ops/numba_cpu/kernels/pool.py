"""What the threads of the pool run: the caller's side and the workers' side of a job.

The control block is an array of int64, one cache line per counter.  Tasks are numbered, and thread i begins with the
i-th share of the numbers, so that from one job to the next it finds its rows in its own caches; a thread that is done
takes tasks of the others' shares.

The caller comes back to Python when its time is over, between two of its tasks, and goes on where it was: all that it
must know for that stands in the control block.  All threads compute in the default mode of floating point.
"""

from __future__ import annotations

from numba import njit

from ..arguments import (
    ACTIVE,
    ARGUMENTS,
    COUNT,
    FUNCTION,
    HEADER,
    LEFT,
    LIMIT,
    MORE,
    NEXT,
    OPEN,
    RECORD,
    SEQUENCE,
    SHARES,
    STARTED,
)  # fmt: skip
from .system import DEFAULT_FLOAT_MODE, clock, float_mode, pause, sched_yield, set_float_mode
from .vector import add_atomic, arguments, call_task, load_atomic, store_atomic

_SPINS = 40_000  # about a millisecond of pauses
_PATIENCE = 2000  # spins until another thread, which may hold the worker's core, gets its turn
_TASKS_PER_LOOK = 8  # at the clock, which costs some 50 ns; a task takes microseconds, a few milliseconds at most
_NEVER = (1 << 63) - 1


@njit(error_model="numpy")
def _work(control, thread, deadline):
    """Takes tasks until none is left; False if the deadline came first."""
    function, arguments = load_atomic(control + FUNCTION), load_atomic(control + ARGUMENTS)
    count, shares = load_atomic(control + COUNT), min(load_atomic(control + LIMIT), SHARES)
    done = 0
    for i in range(shares):
        share = (thread + i) % shares
        counter, end = control + NEXT + 64 * share, count * (share + 1) // shares
        task = add_atomic(counter, 1)
        while task < end:
            call_task(function, arguments, task, thread)
            done += 1
            if done % _TASKS_PER_LOOK == 0 and deadline != _NEVER and clock() > deadline:
                return False
            task = add_atomic(counter, 1)
    return True


@njit(error_model="numpy")
def _open(control, record):
    """Opens the job of a record."""
    function, count, limit, _ = arguments(record, HEADER)
    store_atomic(control + FUNCTION, function)
    store_atomic(control + ARGUMENTS, record + 8 * HEADER)
    store_atomic(control + COUNT, count)
    store_atomic(control + LIMIT, limit)
    shares = min(limit, SHARES)
    for share in range(shares):
        store_atomic(control + NEXT + 64 * share, count * share // shares)
    store_atomic(control + STARTED, 1)
    add_atomic(control + SEQUENCE, 1)
    store_atomic(control + OPEN, 1)


@njit(error_model="numpy")
def _close(control, deadline):
    """Closes the job, of which no task is left to take, when the workers are done; False if the deadline came first."""
    store_atomic(control + OPEN, 0)
    spins = 0
    while load_atomic(control + ACTIVE) != 0:
        spins += 1
        pause()
        if spins > _PATIENCE:
            if clock() > deadline:
                return False
            sched_yield()
    return True


@njit(error_model="numpy")
def _execute(control, deadline):
    while load_atomic(control + LEFT) > 0:
        record = load_atomic(control + RECORD)
        if load_atomic(control + STARTED) == 0:
            store_atomic(control + MORE, load_atomic(control + LEFT) - 1)
            _open(control, record)
        if not _work(control, 0, deadline) or not _close(control, deadline):
            return
        store_atomic(control + STARTED, 0)
        store_atomic(control + RECORD, record + 8 * HEADER + 8 * arguments(record, HEADER)[3])
        add_atomic(control + LEFT, -1)
        if clock() > deadline:
            return


def execute(control, nanoseconds):
    """The caller: goes on with the jobs at RECORD, of which LEFT are left, for about so long.

    The record of each is function, tasks, threads, how many arguments, these.
    """
    mode = float_mode()
    set_float_mode(DEFAULT_FLOAT_MODE)
    _execute(control, clock() + nanoseconds)
    set_float_mode(mode)


def cancel(control):
    """The caller: forgets the jobs, once no worker is at one of their tasks any more."""
    store_atomic(control + OPEN, 0)
    store_atomic(control + LEFT, 0)
    store_atomic(control + MORE, 0)
    for share in range(SHARES):
        store_atomic(control + NEXT + 64 * share, 1 << 62)
    _close(control, _NEVER)
    store_atomic(control + STARTED, 0)


def wait(control, asleep, thread):
    """Worker number `thread`: serves jobs until none came for a while, then marks itself asleep and returns."""
    set_float_mode(DEFAULT_FLOAT_MODE)
    seen, idle = -1, 0
    while True:
        if load_atomic(control + OPEN) == 1 and load_atomic(control + SEQUENCE) != seen:
            add_atomic(control + ACTIVE, 1)  # from here the job cannot end, if it is still open
            if load_atomic(control + OPEN) == 1:
                seen = load_atomic(control + SEQUENCE)
                if thread < load_atomic(control + LIMIT):
                    _work(control, thread, _NEVER)
            add_atomic(control + ACTIVE, -1)
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
