"""3x3 convolution by Winograd's F(4x4, 3x3): 36 products of tiles in place of 144.

Output tiles of 4x4 come from input tiles of 6x6:  Y = A^T [ (G g G^T) * (B^T d B) ] A, where * multiplies number by
number; summed over input channels that is one matrix product for each of the 36 places.  Points 0, +-NEAR, +-FAR and
infinity.  Source: Lavin and Gray 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .gemm import PLAIN, panel_group, run_products
from .machine_code import Kernel
from .memory import NOTHING, aligned, constant_operand, operand, result
from .pack import Hollow, padded_bias
from .packed import Packed
from .queue import run
from .target import LANES, MR, NR, STEPS

POINTS = 36
# Of all fractions of 16 these gave the smallest peaks: over 256 channels errors of 0.7e-6 relative RMS and peaks of
# 2.8e-6; the usual 1 and 2 give 1.6e-6 and 1.5e-5.  All that the transforms of maps multiply by is exact in float32.
NEAR, FAR = 11 / 16, 3 / 2
_CHUNK = 144 // MR * MR  # tiles in work at a time: 36 * 144 * 768 floats are 16 MB
_VECTOR = 4 * LANES


@dataclass(frozen=True)
class PackedWinograd(Packed):
    """A 3x3 convolution's transformed weights, (36, ceil(out / NR), in, NR)."""

    panels: np.ndarray
    out: int
    source: Any = None

    @property
    def channels(self) -> int:
        return self.panels.shape[2]


_transform_input = Kernel("minibeit.ops.numba_cpu.kernels.winograd", "transform_input")
_transform_output = Kernel("minibeit.ops.numba_cpu.kernels.winograd", "transform_output")
_transform_weight = Kernel("minibeit.ops.numba_cpu.kernels.winograd", "transform_weight")


def pack_winograd(weight: np.ndarray, scale: np.ndarray) -> PackedWinograd:
    """Transformed weights of a convolution (out, in, 3, 3) whose outputs are multiplied by `scale` (out,)."""
    out, channels = weight.shape[:2]
    panels = aligned((POINTS, -(-out // NR), channels, NR))
    if isinstance(weight, Hollow):
        return PackedWinograd(panels, out)
    if weight.strides[2:] != (12, 4):
        weight = np.ascontiguousarray(weight)
    operands = operand(weight), operand(scale), operand(panels)
    run(_transform_weight, panels.shape[1], operands, (*weight.strides[:2], out, channels), 6 * 3 * 4)
    return PackedWinograd(panels, out)


def convolve(x: np.ndarray, layer: PackedWinograd, bias: np.ndarray | None, relu: bool, y: np.ndarray) -> None:
    """y = f(conv(x) + bias), or f(y + conv(x)) without `bias`; x (B, h, w, C), y (B, h, w, out), f ReLU or nothing."""
    B, h, w, C = x.shape
    total = B * -(-h // 4) * -(-w // 4)
    chunk = min(_CHUNK, total)
    v, tiles_in, _ = result((POINTS, chunk, C))
    m, tiles_out, _ = result((POINTS, chunk, layer.out))
    panels, zeros = constant_operand(layer.panels), constant_operand(padded_bias(None, layer.out))
    source, target, addend = operand(x), operand(y), NOTHING if bias is None else constant_operand(bias)
    group = panel_group(layer.panels.shape[1], POINTS)
    for first in range(0, total, chunk):
        tiles = min(chunk, total - first)
        run(_transform_input, tiles, (source, tiles_in), (
            x.strides[2], x.strides[1], x.strides[0], h, w, C, v.strides[1], v.strides[0], first,
        ), (POINTS + 6) * _VECTOR)  # fmt: skip
        run_products(
            POINTS, (tiles_in, panels, zeros, tiles_out), (v.strides[1], tiles, C, layer.out), (m.strides[1], PLAIN, 0),
            (1, 1, group, MR, 0, v.strides[0], 2 * m.strides[0], m.strides[0], C * NR * 4, STEPS, 0),
        )  # fmt: skip
        run(_transform_output, tiles, (tiles_out, target, addend), (
            m.strides[1], m.strides[0], layer.out, y.strides[2], y.strides[1], y.strides[0], h, w, int(relu), first,
        ), 30 * _VECTOR)  # fmt: skip
