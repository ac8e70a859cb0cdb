"""minibeit's CuPy backend on the stand-in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from .fake_cupy import pretend

FRESH = ("minibeit.ops.cupy_gpu", "minibeit.train.device", "minibeit.train.nccl")  # what imports cupy


@contextmanager
def cupy_backend(**settings: Any) -> Iterator[ModuleType]:
    """The stand-in for `cupy`, with the backend imported anew; settings as of `pretend`."""
    with pretend(fresh=FRESH, **settings) as cupy:
        yield cupy


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
