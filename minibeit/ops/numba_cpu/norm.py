"""Layer norm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .inputs import address, constant, rows
from .machine_code import Kernel
from .memory import result
from .packed import Packed
from .pool import run

ROWS = 32  # rows per task
_SMALL = 1 << 16  # numbers; some microseconds


_layer_norm = Kernel("minibeit.ops.numba_cpu.kernels.norm", "layer_norm")


@dataclass(frozen=True)
class PackedNorm(Packed):
    """A layer norm's weight and bias (D,), contiguous, with their addresses."""

    weight: np.ndarray
    bias: np.ndarray
    source: Any = None  # the layer as it was, kept on request
    addresses: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "addresses", (self.weight.ctypes.data, self.bias.ctypes.data))


def layer_norm_rows(x: np.ndarray, norm: PackedNorm, eps: float) -> np.ndarray:  # (..., D)
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis of a float32 array."""
    x_rows, count, x_bytes = rows(x)
    y, y_address, y_bytes = result(x.shape)
    arguments = address(x_rows), x_bytes, count, x.shape[-1], *norm.addresses, y_address, y_bytes, constant(eps)
    run(_layer_norm, -(-count // ROWS), arguments, small=x.size < _SMALL)
    return y
