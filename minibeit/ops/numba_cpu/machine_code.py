"""Kernels as machine code: C functions of integers, compiled when first used, then kept on disk.

A kernel that is on disk runs without numba, whose import alone takes longer than a forward pass.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging as logging  # its handlers before a fork run after those of here, so none holds its lock while one waits
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llvmlite import binding as llvm

from . import cache
from .arguments import SCHED_YIELD, TICK_COUNT, Arguments
from .target import target_machine

_lock = threading.RLock()  # one thread loads or compiles
_compiled = 0  # kernels, by this process
_FORK_WAITS = 60.0  # seconds for a kernel that is being loaded or compiled
ALL: list[Kernel] = []


class Kernel:
    """The function `name` of `module`, which takes `arity` integers, returns nothing and runs without the GIL.

    A task kernel is called as `name(args, task, thread)`; `args` is the address of the int64 numbers
    that `arguments` names.
    """

    def __init__(self, module: str, name: str, arity: int = 3, arguments: Arguments | None = None) -> None:
        self.module, self.name, self.arity, self.arguments = module, name, arity, arguments
        self._address = 0
        self._engine: Any = None  # owns the machine code
        self._call: Any = None
        ALL.append(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _known, (self.module, self.name)  # machine code stays in its process

    def load(self) -> int:
        """The address of the machine code: in memory, from disk, or compiled now."""
        with _lock:
            if not self._address:
                if sys.platform == "win32":
                    _name_functions_of_windows()
                engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
                engine.add_object_file(llvm.ObjectFileRef.from_data(self._code()))
                engine.finalize_object()
                address = engine.get_function_address(self.name)
                self._engine, self._call = engine, ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * self.arity)(address)
                self._address = address  # last: from here other threads call it
        return self._address

    @property
    def address(self) -> int:
        return self._address or self.load()

    def __call__(self, *arguments: int) -> None:
        if not self._address:
            self.load()
        self._call(*arguments)

    def _code(self) -> bytes:
        file = f"{self.name}-{self._stamp()}.o"
        code = cache.read(file)
        if code is None:
            with cache.alone():
                code = cache.read(file)  # another process may have compiled it meanwhile
                if code is None:
                    code = self._compile()
                    cache.write(file, code)
        return code

    def _stamp(self) -> str:
        """A digest of the kernel's own file, which may lie elsewhere than the others."""
        spec = find_spec(self.module)
        assert spec is not None and spec.origin is not None
        return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:16]

    def _compile(self) -> bytes:
        global _compiled
        _compiled += 1
        if _compiled == 1:
            place = cache.folder()
            kept = "once in each process" if place is None else f"once, to be kept in {str(place)!r}"
            cache.notice(f"minibeit: compiling kernels for this CPU, {kept} (some seconds) ...")
        with _progress(f"kernel {_compiled} of at most {len(ALL)}: {self.name}"):
            from .kernels.compiler import compile_kernel

            return compile_kernel(getattr(import_module(self.module), self.name), self.name, self.arity)


def _name_functions_of_windows() -> None:
    """Tells LLVM where kernels find what they call; elsewhere it finds the C library by itself.

    SwitchToThread takes nothing and returns an int, as sched_yield does.
    """
    system = ctypes.windll.kernel32  # type: ignore[attr-defined, unused-ignore]
    for name, function in ((SCHED_YIELD, system.SwitchToThread), (TICK_COUNT, system.GetTickCount64)):
        llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)


@contextmanager
def _progress(text: str) -> Iterator[None]:
    """Shows a line while the block runs, on a terminal."""
    shown = sys.stderr is not None and sys.stderr.isatty()
    if shown:
        cache.notice(text, end="\r")
    try:
        yield
    finally:
        if shown:
            cache.notice(" " * len(text), end="\r")


def _before_fork() -> None:
    """Lets a load or compilation end: locks of numba, LLVM and the import system would stay closed in the child."""
    _lock.acquire(timeout=_FORK_WAITS)


def _after_fork_in_parent() -> None:
    with suppress(RuntimeError):  # waited in vain
        _lock.release()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def _known(module: str, name: str) -> Kernel:
    return next(kernel for kernel in ALL if (kernel.module, kernel.name) == (module, name))
