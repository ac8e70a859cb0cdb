"""minibeit's CuPy backend on the stand-in, and its ops with NumPy arrays on both ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from .fake_cupy import pretend

STAY_ON_HOST = {"prepare", "to_host"}  # their arguments are what they are


@contextmanager
def cupy_backend(**settings: Any) -> Iterator[ModuleType]:
    """The stand-in for `cupy`, with the backend imported anew; settings as of `pretend`."""
    with pretend(fresh=("minibeit.ops.cupy_gpu",), **settings) as cupy:
        yield cupy


class HostOps:
    """The ops of the CuPy backend for a dtype: arguments are uploaded, results downloaded."""

    backend = "cupy"

    def __init__(self, cupy: ModuleType, dtype: str) -> None:
        from minibeit.ops import get_ops

        self._cupy, self._ops = cupy, get_ops("cupy", dtype=dtype)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(self._ops, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._down(op(*map(self._up, args), **{key: self._up(value) for key, value in kwargs.items()}))

        return op if name in STAY_ON_HOST else call

    def _up(self, x: Any) -> Any:
        if isinstance(x, np.ndarray):
            return self._cupy.asarray(x)
        if isinstance(x, list):
            return [self._up(part) for part in x]
        if type(x).__name__ == "PositionBias":
            return dataclasses.replace(x, table=self._up(x.table), index=self._up(x.index))
        return x

    def _down(self, x: Any) -> Any:
        return tuple(map(self._down, x)) if isinstance(x, tuple) else self._ops.to_host(x)


def outputs(model: Any, arrays: dict[str, Any], **options: Any) -> dict[str, np.ndarray]:
    """{name: array} of everything that a call returns; hidden states and the like one by one."""
    named = {}
    result = model(**arrays, **options)
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if isinstance(value, tuple):
            named.update({f"{field.name}.{i}": np.asarray(part) for i, part in enumerate(value)})
        elif value is not None:
            named[field.name] = np.asarray(value)
    return named
