"""Kernels for the tests of the thread pool."""

from __future__ import annotations

import numpy as np

from minibeit.ops.numba_cpu.kernels.system import float_mode, set_float_mode
from minibeit.ops.numba_cpu.kernels.vector import arguments, load_float, store_atomic, store_float


def count_task(args, task, thread):
    """Adds 1 to the number at the task's place."""
    _, _, done = arguments(args, 3)
    place = done + 4 * task
    store_float(place, load_float(place) + np.float32(1))


def set_mode(mode):
    """Sets the calling thread's mode of floating point."""
    set_float_mode(mode)


def get_mode(place):
    """Writes the calling thread's mode of floating point."""
    store_atomic(place, float_mode())
