"""Compiled kernels: C callbacks of one signature, kept on disk, compiled when first used."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from numba import types
from numba.core import config
from numba.core.ccallback import CFunc

from .target import cache_folder

_lock = threading.RLock()
_announced = False
ALL: list[Kernel] = []


def _announce() -> None:
    global _announced
    if not _announced:
        _announced = True
        print("minibeit: compiling kernels for this CPU, once (some seconds) ...", file=sys.stderr, flush=True)


class _AnnouncedCFunc(CFunc):
    def _compile_uncached(self):
        _announce()
        return super()._compile_uncached()  # type: ignore[misc]


class Kernel:
    """A function of integers that runs as machine code without the GIL; exceptions and allocations are not for it."""

    def __init__(self, function: Callable[..., object], arity: int, returns: types.Type = types.void) -> None:
        self._function = function
        self._signature = ((types.intp,) * arity, returns)
        self._compiled: CFunc | None = None
        self.__doc__ = function.__doc__
        ALL.append(self)

    def load(self) -> CFunc:
        """The compiled function: from memory, from disk, or made now."""
        with _lock:
            if self._compiled is None:
                options = {"error_model": "numpy", "fastmath": {"contract"}}
                compiled = _AnnouncedCFunc(self._function, self._signature, locals={}, options=options)
                before = config.CACHE_DIR
                config.CACHE_DIR = str(cache_folder())  # numba offers no other way to choose the folder
                try:
                    compiled.enable_caching()
                except (RuntimeError, OSError):
                    pass  # nowhere to write: compiled anew in each process
                finally:
                    config.CACHE_DIR = before
                compiled.compile()
                self._compiled = compiled
        return self._compiled

    @property
    def address(self) -> int:
        return (self._compiled or self.load()).address  # type: ignore[return-value]  # known once it is compiled

    def __call__(self, *arguments: int) -> object:
        return (self._compiled or self.load()).ctypes(*arguments)


def task_kernel(function: Callable[[int, int, int], None]) -> Kernel:
    """A kernel `function(arguments, task, thread)`; `arguments` is the address of int64 values (see `argument`)."""
    return Kernel(function, 3)
