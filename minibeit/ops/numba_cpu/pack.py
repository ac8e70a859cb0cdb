"""Weights in column panels, the layout that the matrix product reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arguments import PACK
from .machine_code import Kernel
from .memory import NOTHING, Operand, aligned, constant_operand, operand
from .packed import Packed
from .queue import run
from .target import NR


@dataclass(frozen=True)
class PackedLinear(Packed):
    """A linear layer y = x W^T + b: W (out, in) as panels (ceil(out / NR), in, NR), the last one padded with zeros."""

    panels: np.ndarray
    bias: np.ndarray  # (panels * NR,), zeros where the layer has none or the panel is padding
    out: int
    source: Any = None  # the layer as it was, kept on request
    operands: tuple[Operand, Operand] = field(init=False, repr=False, compare=False)  # panels and bias

    def __post_init__(self) -> None:
        object.__setattr__(self, "operands", (constant_operand(self.panels), constant_operand(self.bias)))

    @property
    def steps(self) -> int:
        """Length of the sum: the layer's input width."""
        return self.panels.shape[1]

    def weight(self) -> np.ndarray:
        """W (out, in) as it was before packing."""
        return self.panels.transpose(0, 2, 1).reshape(-1, self.steps)[: self.out]


class Hollow(np.ndarray):
    """An array that only stands for its shape, and so do its views: what packs it makes the panels and leaves them.

    A type of its own, since any property of an array (such as strides of 0) may come from a file.
    """


def hollow(shape: tuple[int, ...]) -> Hollow:
    """A float32 array of any shape that takes four bytes."""
    return np.broadcast_to(np.float32(0), shape).view(Hollow)


_pack = Kernel("minibeit.ops.numba_cpu.kernels.pack", "pack", arguments=PACK)


def pack_matrix(matrix: np.ndarray, into: np.ndarray | None = None, scale: np.ndarray | None = None) -> np.ndarray:
    """Panels (ceil(out / NR), in, NR) of a float32 matrix (out, in) of any strides, its rows times `scale` (out,)."""
    out, steps = matrix.shape
    panels = -(-out // NR)
    if into is None:
        into = aligned((panels, steps, NR))
    if isinstance(matrix, Hollow):
        return into
    factors = NOTHING if scale is None else operand(scale)
    row_bytes, step_bytes = matrix.strides
    run(
        _pack,
        panels,
        PACK.operands(matrix=operand(matrix), panels=operand(into), scale=factors),
        PACK.numbers(row_bytes=row_bytes, out=out, steps=steps, step_bytes=step_bytes),
    )
    return into


def padded_bias(bias: np.ndarray | None, out: int) -> np.ndarray:
    """The bias with zeros up to a whole number of panels."""
    result = aligned((-(-out // NR) * NR,))
    result[out:] = 0
    result[:out] = 0 if bias is None else bias
    return result
