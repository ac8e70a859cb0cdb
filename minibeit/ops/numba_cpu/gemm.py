"""Matrix products x W^T with packed weights; bias, activation, layer scale and residual are applied to the hot tile."""

from __future__ import annotations

import numpy as np

from .machine_code import Kernel
from .memory import padded, rows
from .pack import PackedLinear
from .pool import run
from .target import MR, NR

PLAIN, GELU, RELU, RESIDUAL = 0, 1, 2, 3  # what follows + bias
ROW_BLOCK = 17 * MR  # rows that one task keeps in the second-level cache
TILE_BYTES = MR * NR * 4
_TASKS = 64
_SMALL = 1 << 20  # multiplications; some ten microseconds


_product = Kernel("minibeit.ops.numba_cpu.kernels.gemm", "product")


def product(
    x: np.ndarray,
    layer: PackedLinear,
    mode: int = PLAIN,
    scale: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:  # (..., in) -> (..., out)
    """f(x W^T + b) in float32, f being `mode`: nothing, GELU, ReLU, or residual + scale * ( ).

    The result's rows may lie further apart than their length (see `memory.padded`).
    """
    x_rows, count, x_bytes = rows(x)
    y = padded((*x.shape[:-1], layer.out))
    y_bytes = rows(y)[2]
    if scale is not None:
        scale = np.ascontiguousarray(scale, np.float32)
    residual_address = residual_bytes = 0
    if residual is not None:
        residual, _, residual_bytes = rows(residual)
        residual_address = residual.ctypes.data
    by_panel, group, block = task_layout(count, layer.panels.shape[0])
    run_products(
        1, (x_rows.ctypes.data, x_bytes, count, layer.steps, *layer.addresses, layer.out),
        (y.ctypes.data, y_bytes, mode, 0 if scale is None else scale.ctypes.data, residual_address, residual_bytes),
        (by_panel, group, block, block * y_bytes, 0, 0, 0),
    )  # fmt: skip
    return y


def run_products(number: int, inputs: tuple[int, ...], outputs: tuple[int, ...], layout: tuple[int, ...]) -> None:
    """Runs `number` products; see `kernels/gemm.py` for the arguments, in its order."""
    count, out, group, block = inputs[2], inputs[6], layout[1], layout[2]
    panels = -(-out // NR)
    tasks = number * -(-count // block) * -(-panels // group)
    small = number * count * inputs[3] * out < _SMALL
    run(_product, tasks, (*inputs, *outputs, *layout), TILE_BYTES, small)


def task_layout(count: int, panels: int) -> tuple[int, int, int]:
    """(by panel?, panels per task, rows per task) for a product of `count` rows.

    Some 64 tasks or more where there is work for them, so that a thread that lost time is not waited for.  Few rows go
    panel by panel, so that a weight comes from memory once; many go block by block, so that a block of rows stays in
    the second-level cache while the panels pass.  Blocks are of equal height, so that none is a narrow rest.
    """
    tiles = -(-count // MR)
    few = count < 1.5 * ROW_BLOCK
    blocks = min(-(-_TASKS // panels), max(1, tiles // 4)) if few else round(count / ROW_BLOCK)
    block = -(-tiles // blocks) * MR
    return int(few), 1 if few else panel_group(panels, -(-count // block)), block


def panel_group(panels: int, blocks: int) -> int:
    """Panels per task for `blocks` blocks of rows."""
    return max(1, min(8, panels * blocks // _TASKS))
