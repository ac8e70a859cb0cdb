"""Prepared parameters as named arrays, to be written to a file, and back: views of the file, with nothing packed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ...params import flatten, unflatten
from ..low_precision import HOLLOW_MAKERS, LOW_DTYPES, lowered
from .low_arguments import bfloat16_route, int8_route
from .low_precision import PackedLow
from .memory import aligned_copy, is_aligned
from .pack import hollow
from .prepare import prepare
from .target import NR, TILE

_SLACK = 16 << 20  # bytes
VERSION = 2  # of what `prepare` makes; one more whenever its arrays change
LAYOUT = f"numba {VERSION}, {TILE.name}, panels of {NR} columns"
_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a weight


def _layout(dtype: str) -> str:
    routes = {"int8": (int8_route, bfloat16_route), "bfloat16": (bfloat16_route,)}.get(dtype, ())
    names = " and ".join(route().name for route in routes)
    return f"{LAYOUT}, {dtype} for {names}" if names else LAYOUT


def dump(params: Any) -> tuple[str, dict[str, np.ndarray]]:
    """(layout, {name: array}) of prepared parameters; a name is the path of attributes."""
    low = next(_low_layers(params), None)
    dtype = "float32" if low is None else "int8" if low.is_int8 else "bfloat16"
    return _layout(dtype), dict(_arrays(params, ""))


def restore(shapes: Any, layout: str, arrays: Mapping[str, np.ndarray]) -> Any:
    """The prepared parameters of a model with these `shapes`, around `arrays` as `dump` gave them.

    Raises ValueError for another layout than this machine's, a missing array, and one of another shape.
    """
    dtype = next((name for name in _BYTES if f", {name} for " in layout), "float32")
    if layout != _layout(dtype):
        expected = _layout(dtype)
        raise ValueError(
            f"was prepared as '{layout}', but this machine and version read '{expected}'; prepare it again"
        )
    named = flatten(shapes)
    _check_size(named, arrays, _BYTES[dtype])
    params = unflatten(shapes, {name: hollow(shape) for name, shape in named.items()})
    if dtype in LOW_DTYPES:
        params = lowered(params, dtype, HOLLOW_MAKERS[dtype])
    return _filled(prepare(params), "", arrays)


def _low_layers(node: Any) -> Iterator[PackedLow]:
    for _, child in _children(node):
        if isinstance(child, PackedLow):
            yield child
        elif not isinstance(child, np.ndarray):
            yield from _low_layers(child)


def _check_size(shapes: Mapping[str, tuple[int, ...]], arrays: Mapping[str, np.ndarray], itemsize: int) -> None:
    """Raises ValueError for shapes that the arrays come nowhere near filling, before panels are made for them.

    Packing never makes a matrix smaller, so all matrices together take no more than the arrays do; a small lack is
    left to the check of each array, which can name it.
    """
    needed = sum(itemsize * math.prod(shape) for shape in shapes.values() if len(shape) > 1)
    found = sum(array.nbytes for array in arrays.values())
    if needed > found + _SLACK:
        raise ValueError(
            f"holds {found:,} bytes, but the weights that its config describes take {needed:,}; "
            "was it prepared for another task or config?"
        )


def _arrays(node: Any, path: str) -> Iterator[tuple[str, np.ndarray]]:
    for name, child in _children(node):
        if isinstance(child, np.ndarray):
            yield path + name, child
        else:
            yield from _arrays(child, f"{path}{name}.")


def _filled(node: Any, path: str, arrays: Mapping[str, np.ndarray]) -> Any:
    """`node` with the arrays of that name in the place of its own, which only tell the shape."""
    parts = {}
    for name, child in _children(node):
        if isinstance(child, np.ndarray):
            parts[name] = _checked(path + name, child, arrays)
        else:
            parts[name] = _filled(child, f"{path}{name}.", arrays)
    if isinstance(node, tuple):
        return tuple(parts.get(str(i), child) for i, child in enumerate(node))
    return dataclasses.replace(node, **parts) if parts else node


def _children(node: Any) -> list[tuple[str, Any]]:
    """Arrays, and whatever may hold some."""
    if dataclasses.is_dataclass(node):
        children = [(f.name, getattr(node, f.name)) for f in dataclasses.fields(node) if f.init]
    elif isinstance(node, tuple):
        children = [(str(i), child) for i, child in enumerate(node)]
    else:
        return []
    return [(name, child) for name, child in children if isinstance(child, (np.ndarray, tuple)) or _is_node(child)]


def _is_node(child: Any) -> bool:
    return dataclasses.is_dataclass(child)


def _checked(name: str, expected: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    if name not in arrays:
        raise ValueError(f"lacks {name}; was it prepared for another task or config?")
    array = arrays[name]
    if array.shape != expected.shape or array.dtype != expected.dtype:
        raise ValueError(
            f"{name}: expected {expected.dtype} of shape {expected.shape}, found {array.dtype} of shape {array.shape}"
        )
    if is_aligned(array) and array.flags.c_contiguous:
        return array
    return aligned_copy(array)  # a file that another program wrote: vectors would straddle cache lines
