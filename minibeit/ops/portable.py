"""Parameters of low precision as named arrays that every CPU reads: integers or bfloat16, factors, the rest float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..params import flatten, unflatten
from .low_precision import HOLLOW_MAKERS, LOW, LOW_DTYPES, Spans, lowered

_LAYOUTS = {dtype: f"{dtype} 1, any CPU" for dtype in LOW_DTYPES}


def dump_portable(params: Any, dtype: str, spans: Sequence[Spans] | None = None) -> tuple[str, dict[str, np.ndarray]]:
    """(layout, {name: array}) of plain parameters in a dtype of low precision; a name is the path of attributes.

    `spans` are as for `lowered`.  For int8, `.scale` stands beside `.weight`: the factor of every output channel.
    """
    return _LAYOUTS[dtype], flatten(lowered(params, dtype, spans=spans))


def is_portable(layout: str) -> bool:
    """Whether arrays of that layout are for every CPU."""
    return layout in _LAYOUTS.values()


def restore_portable(shapes: Any, layout: str, arrays: Mapping[str, np.ndarray]) -> Any:
    """The parameters of a model with these `shapes` from what `dump_portable` returned, to be prepared by a backend.

    Raises ValueError for a missing array, and one of another shape or dtype.
    """
    (dtype,) = (name for name, known in _LAYOUTS.items() if known == layout)
    hollow = {name: np.broadcast_to(np.float32(0), shape) for name, shape in flatten(shapes).items()}
    template = lowered(unflatten(shapes, hollow), dtype, HOLLOW_MAKERS[dtype])
    for name, expected in flatten(template).items():
        _check(name, expected.shape, _dtype_of(name, dtype, template), arrays)
    return unflatten(template, arrays)


def _dtype_of(name: str, dtype: str, template: Any) -> str:
    """The NumPy dtype of an array: that of low precision for the weight of such a layer, else float32."""
    *path, last = name.split(".")
    node = template
    for part in path:
        node = node[int(part)] if isinstance(node, tuple) else getattr(node, part)
    if last != "weight" or not isinstance(node, LOW):
        return "float32"
    return "int8" if dtype == "int8" else "uint16"


def _check(name: str, shape: tuple[int, ...], dtype: str, arrays: Mapping[str, np.ndarray]) -> None:
    if name not in arrays:
        raise ValueError(f"lacks {name}; was it made for another task or config?")
    array = arrays[name]
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype} of shape {shape}, found {array.dtype} of shape {array.shape}")
