"""The seam: all arithmetic of the model goes through one namespace of coarse ops, one per backend.

`reference.py` defines every op in NumPy.  `numba_cpu/` and `cupy_gpu/` have ops of the same names and signatures.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

BACKENDS = {"numpy": None, "numba": "numba_cpu", "cupy": "cupy_gpu"}
DEFAULT_BACKEND = "numba"
GPU_BACKENDS = ("cupy",)
DTYPES = ("float32", "float64")
HALF_DTYPES = ("float16", "bfloat16")  # of GPUs only
NO_ARITHMETIC = {  # ops that only make, move, check or store arrays
    "all_finite",
    "arange",
    "asarray",
    "deferred",
    "dump",
    "num_threads",
    "prepare",
    "recompute",
    "restore",
    "stage",
    "to_host",
    "zeros",
}


def default_backend() -> str:
    """The backend used when none is named: MINIBEIT_BACKEND if set, else "numba"."""
    return os.environ.get("MINIBEIT_BACKEND") or DEFAULT_BACKEND


def get_ops(
    backend: str | None = None,
    only: Iterable[str] | None = None,
    dtype: str = "float32",
    device: int | None = None,
) -> SimpleNamespace:
    """All ops of `backend` in one namespace; an op it lacks is served by its NumPy definition.

    `only` switches on just the named fast ops, so that a difference can be traced to one of them.  `origin` of the
    result says which code serves each op.  `dtype` is that of the model the ops are for, `device` the number of a GPU
    (None: the first).  Raises ValueError for an unknown backend or op and for what a backend does not have, ImportError
    or DeviceError where its library or its device is missing.
    """
    from . import reference

    backend = default_backend() if backend is None else backend
    check_choice(backend, dtype, device)
    table = {name: getattr(reference, name) for name in reference.__all__}
    origin = dict.fromkeys(table, "numpy")
    module = BACKENDS[backend]
    if module is not None:
        fast = import_module(f".{module}", __package__)
        wanted = set(fast.__all__ if only is None else only)
        unknown = wanted - set(fast.__all__)
        if unknown:
            raise ValueError(f"only: backend {backend} has no op named {', '.join(sorted(unknown))}")
        for name in wanted:
            table[name], origin[name] = getattr(fast, name), backend
        if backend in GPU_BACKENDS:
            return SimpleNamespace(backend=backend, origin=origin, **fast.on_device(table, origin, dtype, device))
        if only is not None:  # NumPy ops get the weights as they were before packing
            table["prepare"] = functools.partial(fast.prepare, keep_source=True)
        for name in table:
            if origin[name] == "numpy" and name not in ("prepare", "recompute"):
                op = fast.settled(table[name])
                table[name] = op if only is None else _on_sources(op)
    return SimpleNamespace(backend=backend, origin=origin, **table)


def check_choice(backend: str, dtype: str, device: int | None) -> None:
    """Raises ValueError for a backend that does not exist, or that lacks this dtype or devices to choose from."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    on_gpu = backend in GPU_BACKENDS
    if not on_gpu and dtype in HALF_DTYPES:
        raise ValueError(f"dtype: {dtype} is for GPUs (backend='cupy'), backend {backend} has {' and '.join(DTYPES)}")
    if dtype not in (*DTYPES, *HALF_DTYPES):
        names = " or ".join(map(repr, (*DTYPES, *HALF_DTYPES) if on_gpu else DTYPES))
        raise ValueError(f"dtype: expected {names}, found {dtype!r}")
    if not on_gpu and device is not None:
        raise ValueError(f"device: backend {backend} runs on the CPU and has no devices, found {device!r}")


def host_dtype(dtype: str) -> str:
    """The dtype in which a model's weights are read and its outputs given back: NumPy has no bfloat16."""
    return "float32" if dtype in HALF_DTYPES else dtype


def tf32_allowed() -> bool:
    """Whether a GPU may round the operands of float32 products to TF32: MINIBEIT_TF32=1."""
    return os.environ.get("MINIBEIT_TF32") == "1"


def _on_sources(op: Any) -> Any:
    """`op`, given the unpacked weights that a packed leaf keeps in `.source`."""

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*(getattr(arg, "source", arg) for arg in args), **kwargs)

    return call
