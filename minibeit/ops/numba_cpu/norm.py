"""Layer norm."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from .arguments import LAYER_NORM, ROWS
from .gradient_arguments import LAYER_NORM_BACKWARD
from .machine_code import Kernel
from .memory import Operand, constant_operand, operand, result
from .operands import contiguous, rows, scalar
from .packed import Packed
from .queue import run

_SMALL = 1 << 16  # elements; some microseconds


_layer_norm = Kernel("minibeit.ops.numba_cpu.kernels.norm", "layer_norm", arguments=LAYER_NORM)
_layer_norm_backward = Kernel(
    "minibeit.ops.numba_cpu.kernels.norm_gradients", "layer_norm_backward", arguments=LAYER_NORM_BACKWARD
)


@dataclass(frozen=True)
class PackedNorm(Packed):
    """A layer norm's weight and bias (D,), contiguous."""

    weight: np.ndarray
    bias: np.ndarray
    source: Any = None  # the layer as it was, kept on request
    operands: tuple[Operand, Operand] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "operands", (constant_operand(self.weight), constant_operand(self.bias)))


def layer_norm_rows(x: np.ndarray, norm: PackedNorm, eps: float) -> np.ndarray:  # (..., D)
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis of a float32 array."""
    x_rows, count, x_bytes = rows(x)
    y, output, y_bytes = result(x.shape)
    weight, bias = norm.operands
    operands = LAYER_NORM.operands(x=x_rows, weight=weight, bias=bias, y=output, eps=scalar(eps))
    numbers = _numbers(x_bytes, count, x.shape[-1], y_bytes)
    run(_layer_norm, -(-count // ROWS), operands, numbers, small=x.size < _SMALL)
    return y


@lru_cache(maxsize=64)
def _numbers(x_bytes: int, count: int, width: int, y_bytes: int) -> tuple[int, ...]:
    """The kernel's numbers, the same from block to block and image to image."""
    return LAYER_NORM.numbers(x_bytes=x_bytes, count=count, width=width, y_bytes=y_bytes)


def norm_gradients(
    g: np.ndarray, x: np.ndarray, weight: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # (..., D) -> (..., D), (D,), (D,)
    """(dx, dweight, dbias); the parts that tasks have of the two sums are added in their order."""
    (g_rows, count, g_bytes), (x_rows, _, x_bytes) = rows(g), rows(x)
    D, tasks = x.shape[-1], -(-count // ROWS)
    dx, output, dx_bytes = result(x.shape)
    parts = result((tasks * 2 * D,))[0].reshape(tasks, 2, D)
    operands = LAYER_NORM_BACKWARD.operands(
        g=g_rows, x=x_rows, weight=operand(contiguous(weight)), dx=output, parts=operand(parts), eps=scalar(eps)
    )
    numbers = LAYER_NORM_BACKWARD.numbers(g_bytes=g_bytes, x_bytes=x_bytes, dx_bytes=dx_bytes, count=count, width=D)
    run(_layer_norm_backward, tasks, operands, numbers, small=x.size < _SMALL)
    d_weight, d_bias = parts.sum(0, dtype=np.float64).astype(np.float32)
    return dx, d_weight, d_bias
