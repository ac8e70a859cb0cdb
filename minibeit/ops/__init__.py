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

BACKENDS = {"numpy": None, "numba": "numba_cpu"}
DEFAULT_BACKEND = "numba"


def default_backend() -> str:
    """The backend used when none is named: MINIBEIT_BACKEND if set, else "numba"."""
    return os.environ.get("MINIBEIT_BACKEND") or DEFAULT_BACKEND


def get_ops(backend: str | None = None, only: Iterable[str] | None = None) -> SimpleNamespace:
    """All ops of `backend` in one namespace; an op it lacks is served by its NumPy definition.

    `only` switches on just the named fast ops, so that a difference can be traced to one of them.  `origin` of the
    result says which code serves each op.  Raises ValueError for an unknown backend or op.
    """
    from . import reference

    backend = default_backend() if backend is None else backend
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
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
        if only is not None:  # NumPy ops get the weights as they were before packing
            table["prepare"] = functools.partial(fast.prepare, keep_source=True)
            for name in table:
                if origin[name] == "numpy" and name != "prepare":
                    table[name] = _on_sources(table[name])
    return SimpleNamespace(backend=backend, origin=origin, **table)


def _on_sources(op: Any) -> Any:
    """`op`, given the unpacked weights that a packed leaf keeps in `.source`."""

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*(getattr(arg, "source", arg) for arg in args), **kwargs)

    return call
