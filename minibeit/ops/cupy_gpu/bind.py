"""Binds the ops to one model's device and dtype; some may be NumPy's, to trace a difference to an op."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ...params import BatchNorm
from ..table import ARITHMETIC, ARRAYS, names_of
from . import arrays
from .device import cupy, open_device, session
from .prepare import prepare


def on_device(
    table: dict[str, Callable[..., Any]], origin: dict[str, str], dtype: str, device: int | None
) -> dict[str, Callable[..., Any]]:
    """`table` for models of `dtype` on that GPU; its NumPy ops work on copies in main memory.

    Raises what `device.open_device` does.
    """
    number = open_device(device)
    on_cpu = {name for name in names_of(ARITHMETIC) if origin[name] == "numpy"}
    placing = names_of(ARRAYS)  # ops that only place or move arrays always run on the device

    def prepare_there(params: Any) -> Any:
        with session(number, dtype):
            prepared = prepare(params, bool(on_cpu), dtype)
            cupy.cuda.get_current_stream().synchronize()  # ops outside a session may be called on any stream
            return prepared

    bound = {name: on_host(op) if name in on_cpu else op for name, op in table.items()}
    bound.update({name: getattr(arrays, name) for name in placing})
    bound.update(prepare=prepare_there, num_threads=lambda count: session(number, dtype))
    bound.update(on_host=on_host, finite_on_host=arrays.finite_on_host)
    for name in (*placing, "prepare", "num_threads"):
        origin[name] = "cupy"
    return bound


def on_host(op: Callable[..., Any]) -> Callable[..., Any]:
    """A NumPy op made to take device arrays, and prepared leaves that kept their `.source`."""

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        down = _down_but_running if kwargs.get("statistics") is not None else _down
        return _up(op(*map(down, args), **{name: down(value) for name, value in kwargs.items()}))

    return call


def _down_but_running(x: Any) -> Any:
    """`_down`, but a batch norm keeps its own running statistics, by which those of a batch are known later."""
    if isinstance(x, BatchNorm):
        return dataclasses.replace(x, weight=_down(x.weight), bias=_down(x.bias))
    return _down(x, _down_but_running)


def _down(x: Any, inner: Callable[[Any], Any] | None = None) -> Any:
    """`x` (an array, a leaf, a position bias, or a sequence of these) copied to main memory; `inner` copies parts."""
    inner = inner or _down
    if isinstance(x, cupy.ndarray):
        return arrays.to_host(x)
    if isinstance(x, (list, tuple)):
        return type(x)(map(inner, x))
    if hasattr(x, "source"):
        return x.source
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return dataclasses.replace(x, **{f.name: inner(getattr(x, f.name)) for f in dataclasses.fields(x)})
    return x


def _up(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)(map(_up, x))
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return dataclasses.replace(x, **{f.name: _up(getattr(x, f.name)) for f in dataclasses.fields(x)})
    return arrays.asarray(x, x.dtype.name) if isinstance(x, (np.ndarray, np.generic)) else x
