"""The seam: all arithmetic of the model goes through one namespace of coarse ops, one per backend.

`table.py` lists the ops and their properties; `reference/` defines each in NumPy; `numba_cpu/` and `cupy_gpu/` have
fast versions with the same names and signatures.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from .low_precision import LOW_DTYPES, lowered
from .table import ARITHMETIC, ARRAYS, TABLE, Ops, PositionBias, fast_backwards, names_of, served_by

__all__ = ["BACKENDS", "LOW_DTYPES", "Ops", "PositionBias", "default_backend", "get_ops", "host_dtype"]

BACKENDS = {"numpy": None, "numba": "numba_cpu", "cupy": "cupy_gpu"}
DEFAULT_BACKEND = "numba"
GPU_BACKENDS = ("cupy",)
DTYPES = ("float32", "float64")
HALF_DTYPES = ("float16", "bfloat16")  # on GPUs; bfloat16 also on CPUs


def default_backend() -> str:
    """The backend used when none is named: MINIBEIT_BACKEND if set, else "numba"."""
    return os.environ.get("MINIBEIT_BACKEND") or DEFAULT_BACKEND


class _Namespace(SimpleNamespace):
    """One backend's ops.  Copies and pickles hold only the arguments of `get_ops` and call it again."""

    __slots__ = ("choice",)  # in a slot, so that it is not among the ops

    def __init__(self, choice: tuple[Any, ...], **ops: Any) -> None:
        super().__init__(**ops)
        self.choice = choice

    def __reduce__(self) -> tuple[Any, ...]:
        return get_ops, self.choice

    def __getattr__(self, name: str) -> Any:
        """The fast `NAME_forward` and `NAME_backward` of fast ops: imported when a tape asks, not for inference."""
        op, _, half = name.rpartition("_")
        if half in ("forward", "backward") and self._has_halves(op):
            module = import_module(f".{BACKENDS[self.backend]}.halves", __package__)
            if hasattr(module, name):
                function = getattr(module, name)
                of_dtype = name in getattr(module, "OF_DTYPE", ())
                return functools.partial(function, self.choice[2]) if of_dtype else function
        raise AttributeError(f"the ops have no {name}")

    def _has_halves(self, op: str) -> bool:
        if op not in TABLE:  # a method of arrays
            return BACKENDS[self.backend] is not None
        return op in fast_backwards(self.backend) and self.origin[op] == self.backend


def get_ops(
    backend: str | None = None,
    only: Iterable[str] | None = None,
    dtype: str = "float32",
    device: int | None = None,
) -> Ops:
    """All ops of `backend` in one namespace; an op it lacks is served by its NumPy definition.

    With `only`, just the named fast ops are used, so that a difference can be traced to one of them.  `origin` of the
    result says which backend serves each op; a backend's own `NAME_backward` and `NAME_forward`, for a tape, are there
    too.  `dtype` is the model's, `device` the number of a GPU (None: the first).
    Raises ValueError for an unknown backend or op, or a dtype or device that the backend lacks, and ImportError or
    DeviceError if its library or its device is missing.
    """
    from . import reference

    backend = default_backend() if backend is None else backend
    check_choice(backend, dtype, device)
    only = None if only is None else tuple(only)
    low = backend not in GPU_BACKENDS and dtype in LOW_DTYPES
    called = {"attention": "attention_of_low_precision"} if low else {}
    ops: dict[str, Callable[..., Any]] = {name: getattr(reference, called.get(name, name)) for name in TABLE}
    origin = dict.fromkeys(TABLE, "numpy")
    module = BACKENDS[backend]
    if module is not None:
        fast = import_module(f".{module}", __package__)
        for name in _wanted(backend, only):
            ops[name], origin[name] = getattr(fast, called.get(name, name)), backend
        if backend in GPU_BACKENDS:
            ops = fast.on_device(ops, origin, dtype, device)
        else:
            ops = _beside_fast_ops(ops, origin, fast, keep_source=only is not None)
    if low:
        release = None if module is None else getattr(fast, "release_pages", None)
        ops = _of_low_precision(ops, dtype, release)
    return _Namespace((backend, only, dtype, device), backend=backend, origin=origin, **ops)


def _wanted(backend: str, only: Iterable[str] | None) -> set[str]:
    """The names of the fast ops to use.  Raises ValueError for one that the backend does not have."""
    there = set(served_by(backend))
    wanted = there if only is None else set(only)
    unknown = wanted - there
    if unknown:
        raise ValueError(f"only: backend {backend} has no op named {', '.join(sorted(unknown))}")
    return wanted


def _beside_fast_ops(
    ops: dict[str, Callable[..., Any]], origin: dict[str, str], fast: Any, keep_source: bool
) -> dict[str, Callable[..., Any]]:
    """`ops`, the NumPy ones wrapped to work beside queued kernels and, with `keep_source`, with packed weights."""
    if keep_source:
        ops["prepare"] = functools.partial(fast.prepare, keep_source=True)
    for name in names_of(ARITHMETIC, ARRAYS):
        if origin[name] == "numpy":
            op = fast.synchronous(ops[name])
            ops[name] = _with_unpacked_weights(op) if keep_source else op
    return ops


def _of_low_precision(
    ops: dict[str, Callable[..., Any]], dtype: str, release: Callable[[Any], None] | None
) -> dict[str, Callable[..., Any]]:
    """`ops` that prepare weights in `dtype`; all arrays are float32, whatever a model calls its dtype."""
    prepare, stage, asarray = (ops[name] for name in ("prepare", "stage", "asarray"))

    def array_op(op: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(op)(lambda x, wanted: op(x, "float32" if wanted in LOW_DTYPES else wanted))

    return {
        **ops,
        "prepare": functools.wraps(prepare)(lambda params: prepare(lowered(params, dtype, done=release))),
        "stage": array_op(stage),
        "asarray": array_op(asarray),
    }


def check_choice(backend: str, dtype: str, device: int | None) -> None:
    """Raises ValueError for an unknown backend, or one without this dtype or without devices."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    on_gpu = backend in GPU_BACKENDS
    known = (*DTYPES, *(HALF_DTYPES if on_gpu else LOW_DTYPES))
    if dtype not in known and dtype in (*HALF_DTYPES, *LOW_DTYPES):
        place = "GPUs (backend='cupy')" if dtype in HALF_DTYPES else "CPUs (backend='numba')"
        raise ValueError(f"dtype: {dtype} is for {place}, backend {backend} has {', '.join(known)}")
    if dtype not in known:
        raise ValueError(f"dtype: expected {' or '.join(map(repr, known))}, found {dtype!r}")
    if not on_gpu and device is not None:
        raise ValueError(f"device: backend {backend} runs on the CPU and has no devices, found {device!r}")


def dtype_of_file(stored: Any, backend: str | None) -> str:
    """The dtype that `dtype="auto"` stands for: that of the file on a GPU, float32 elsewhere."""
    on_gpu = (default_backend() if backend is None else backend) in GPU_BACKENDS
    return str(stored) if on_gpu and stored in HALF_DTYPES else "float32"


def host_dtype(dtype: str) -> str:
    """The NumPy dtype of a model's weights as read and of its outputs: float32 for half and low precision."""
    return "float32" if dtype in (*HALF_DTYPES, *LOW_DTYPES) else dtype


def tf32_allowed() -> bool:
    """Whether a GPU may round the operands of float32 products to TF32: MINIBEIT_TF32=1."""
    return os.environ.get("MINIBEIT_TF32") == "1"


def _with_unpacked_weights(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op`, called with the unpacked weights that a packed leaf keeps in `.source`."""

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        plain = {name: getattr(arg, "source", arg) for name, arg in kwargs.items()}
        return op(*(getattr(arg, "source", arg) for arg in args), **plain)

    return call
