"""What packed layers have in common: they cross to another process as arrays, never as addresses."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .memory import aligned_copy
from .target import LANES, NR, TILE

_FOR = f"{TILE.name}, panels of {NR} columns, {LANES} lanes"


class Packed:
    """Base of the packed layers: pickling and copying make new arrays, whose addresses are asked for anew."""

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]
        return remade, (type(self), _FOR, fields)


def remade(kind: type, made_for: str, fields: dict[str, Any]) -> Any:
    """A packed layer of arrays that begin where the kernels want them.  Raises ValueError on another kind of CPU."""
    if made_for != _FOR:
        raise ValueError(f"packed weights are for '{made_for}', this machine reads '{_FOR}'; send the model instead")
    return kind(**{name: _aligned(value) for name, value in fields.items()})


def _aligned(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_aligned, value))
    return aligned_copy(value) if isinstance(value, np.ndarray) else value
