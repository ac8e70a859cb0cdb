"""For the tests of compiled kernels on disk: a folder to keep them in, and a kernel that is compiled quickly."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from minibeit.ops.numba_cpu import cache, machine_code

posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="folders of this system have no owners and modes")


def kernels_below(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """For a fixture `use`; use(folder): kernels are kept below it, as in a process that has just begun."""

    def begin(base: object, **environment: str) -> None:
        for name, value in {"NUMBA_CACHE_DIR": str(base), **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(cache, "_complained", False)
        cache.folder.cache_clear()

    yield begin
    cache.folder.cache_clear()


def count_with_new_kernel() -> tuple[bool, float]:
    """(whether the kernel of count_tasks.py was compiled, what it added): its code is looked for on disk first."""
    kernel = machine_code.Kernel("count_tasks", "count_task")
    machine_code.ALL.remove(kernel)
    compiled_before, numbers = machine_code._compiled, np.zeros(5, np.float32)
    arguments = np.array([0, 0, numbers.ctypes.data])
    kernel(arguments.ctypes.data, 3, 0)
    assert not numbers[[0, 1, 2, 4]].any()
    return machine_code._compiled > compiled_before, numbers[3]


def kept(base: Path) -> Path:
    """The file of that kernel below `base`."""
    (file,) = base.glob("kernels-*/count_task-*.o")
    return file
