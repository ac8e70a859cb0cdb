"""Kernels as machine code: C functions of integers, compiled when first used, then kept on disk.

A kernel that is on disk runs without numba, whose import alone takes longer than a forward pass.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import threading
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llvmlite import binding as llvm

from ...files import atomic_write
from .target import cache_folder, target_machine

_lock = threading.RLock()
_announced = False
_DIGEST_BYTES = 32
ALL: list[Kernel] = []


class Kernel:
    """The function `name` of `module`, which takes `arity` integers, returns nothing and runs without the GIL.

    A task kernel is called as `name(arguments, task, thread)`; `arguments` is the address of int64 numbers.
    """

    def __init__(self, module: str, name: str, arity: int = 3) -> None:
        self.module, self.name, self.arity = module, name, arity
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
                file = cache_folder() / f"{self.name}-{self._stamp()}.o"
                code = _read(file)
                if code is None:
                    code = self._compile()
                    _write(file, code)
                self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
                self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
                self._engine.finalize_object()
                address = self._engine.get_function_address(self.name)
                self._call = ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * self.arity)(address)
                self._address = address
        return self._address

    @property
    def address(self) -> int:
        return self._address or self.load()

    def __call__(self, *arguments: int) -> None:
        if not self._address:
            self.load()
        self._call(*arguments)

    def _stamp(self) -> str:
        """A digest of the kernel's own file, which may lie elsewhere than the others."""
        spec = find_spec(self.module)
        assert spec is not None and spec.origin is not None
        return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:16]

    def _compile(self) -> bytes:
        global _announced
        if not _announced:
            _announced = True
            print("minibeit: compiling kernels for this CPU, once (some seconds) ...", file=sys.stderr, flush=True)
        from .kernels.compiler import compile_kernel

        return compile_kernel(getattr(import_module(self.module), self.name), self.name, self.arity)


def _read(file: Path) -> bytes | None:
    """The machine code of a file that is whole; None if there is none."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    code = content[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == content[:_DIGEST_BYTES] else None


def _write(file: Path, code: bytes) -> None:
    with suppress(OSError):  # nowhere to write: compiled anew in each process
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as out:
            out.write(hashlib.sha256(code).digest() + code)


def _known(module: str, name: str) -> Kernel:
    return next(kernel for kernel in ALL if (kernel.module, kernel.name) == (module, name))
