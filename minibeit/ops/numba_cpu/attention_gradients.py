"""Backward of attention, a task for each head of each image."""

from __future__ import annotations

from typing import Any

import numpy as np

from .gradient_arguments import ATTENTION_BACKWARD, QUERY_ROWS
from .machine_code import Kernel
from .memory import NOTHING, operand, result
from .operands import contiguous, rows, scalar
from .queue import run
from .target import LANES, MR

_attention_backward = Kernel(
    "minibeit.ops.numba_cpu.kernels.attention_gradients", "attention_backward", arguments=ATTENTION_BACKWARD
)


def attend_backward(
    g: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: Any | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:  # (B, N, D), 3 x (B, H, N, d) -> the same, (R, H)
    """(dq, dk, dv, dtable).  The table's gradient is summed over the images in their order, whoever made the parts."""
    B, H, N, d = q.shape
    joined, _, _ = result((B, N, 3 * H * d))
    dq, dk, dv = joined.reshape(B, N, 3, H, d).transpose(2, 0, 3, 1, 4)
    g_rows, _, g_bytes = rows(g)
    table, bins, layout, offsets = NOTHING, NOTHING, (0, 0, 0), 0
    parts = None
    if bias is not None:
        gh, gw = bias.grid
        offsets = (2 * gh - 1) * (2 * gw - 1)
        values = contiguous(bias.table)
        parts = result((B * H * (offsets + 2 * LANES),))[0].reshape(B, H, -1)
        table, bins, layout = operand(values), operand(parts), (values.strides[0], gh, gw)
    operands = ATTENTION_BACKWARD.operands(
        q=operand(q), k=operand(k), v=operand(v), g=g_rows, dq=operand(dq), dk=operand(dk), dv=operand(dv), bins=bins,
        scale=scalar(d**-0.5), table=table,
    )  # fmt: skip
    numbers = ATTENTION_BACKWARD.numbers(
        heads=H, count=N, size=d, image_bytes=q.strides[0], head_bytes=q.strides[1], row_bytes=q.strides[2],
        g_bytes=g_bytes, d_image_bytes=dq.strides[0], d_head_bytes=dq.strides[1], d_row_bytes=dq.strides[2],
        table_bytes=layout[0], grid_rows=layout[1], grid_columns=layout[2],
    )  # fmt: skip
    run(_attention_backward, B * H, operands, numbers, 4 * _scratch(N, d, offsets))
    return dq, dk, dv, None if parts is None else _table_gradient(parts, offsets)


def _scratch(N: int, d: int, offsets: int) -> int:
    """Numbers that a task needs beside its arguments."""
    tokens, width = (-(-size // LANES) * LANES for size in (N, d))
    panels = 2 * tokens * d + width * (N + 2 * QUERY_ROWS)
    scores = 2 * QUERY_ROWS * (tokens + 16) + 2 * tokens * (QUERY_ROWS + 16)
    return panels + scores + width * (2 * N + MR) + offsets + 2 * LANES


def _table_gradient(parts: np.ndarray, offsets: int) -> np.ndarray:  # (B, H, offsets + 2 LANES) -> (R, H)
    sums = parts.sum(0, dtype=np.float64).astype(np.float32)
    others = sums[:, offsets + LANES : offsets + LANES + 3]
    return np.concatenate([sums[:, :offsets][:, ::-1], others], 1).T
