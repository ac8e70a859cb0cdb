"""Gives memory that a process no longer uses back to the system: freed blocks and pages of mapped weights.

Six simultaneous runs leave much of both: glibc keeps freed blocks of up to 32 MB for every thread, and each page of a
mapped checkpoint that was read once counts as memory in use.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..files import mapped_file


class Unused:
    """The memory that runs on `arrays` (weights) could do without."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._files = _mapped_files(arrays.values())
        self._trim = _malloc_trim()

    def give_back(self) -> None:
        """Returns free memory to the system; mapped weights are read from their file again when they are needed."""
        for file in self._files:
            file.madvise(mmap.MADV_DONTNEED)
        if self._trim is not None:
            self._trim(0)


def _mapped_files(arrays: Iterable[np.ndarray]) -> list[mmap.mmap]:
    """The files, mapped read-only, that these arrays are views of."""
    files = {id(file): file for file in map(mapped_file, arrays) if file is not None}
    return list(files.values()) if sys.platform.startswith("linux") else []  # elsewhere the advice means other things


def _malloc_trim() -> Any:
    """glibc's function that returns freed blocks; None where there is no such thing."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
