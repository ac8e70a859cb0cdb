"""Fused attention: scores, bias, softmax and weighted sum of one tile of query rows at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from .machine_code import Kernel
from .memory import NOTHING, operand, result
from .operands import contiguous, scalar
from .pool import get_num_threads
from .queue import run
from .target import LANES, MR, NR

_QUERY_ROWS = 384 // MR * MR  # query rows per task, at most; each task packs its head's keys and values anew
_TASKS_PER_THREAD = 8


_attention = Kernel("minibeit.ops.numba_cpu.kernels.attention", "attention")


def can_fuse(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: Any | None) -> bool:
    """Whether q, k, v lie alike in memory, as `project_qkv` leaves them, and the bias is laid out for a patch grid."""
    _, H, N, _ = q.shape
    alike = q.strides == k.strides == v.strides and q.strides[-1] == 4 and q.shape == k.shape == v.shape
    if bias is None:
        return alike
    gh, gw = bias.grid
    offsets = (2 * gh - 1) * (2 * gw - 1)
    return alike and gh * gw + 1 == N and bias.table.shape == (offsets + 3, H) and bias.table.dtype == np.float32


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: Any | None) -> np.ndarray:  # (B, H, N, d) -> (B, N, D)
    """softmax(q k^T / sqrt(d) + bias) v for every head; scores of MR query rows are alive at a time in each thread."""
    B, H, N, d = q.shape
    context, output, context_bytes = result((B, N, H * d))
    table, layout = NOTHING, (0, 0, 0)
    offsets = 0
    if bias is not None:
        values = contiguous(bias.table)
        table, layout = operand(values), (values.strides[0], *bias.grid)
        offsets = len(values)
    halves = get_num_threads() * _TASKS_PER_THREAD > B * H  # so that a thread that lost time is not waited for
    rows = min(_QUERY_ROWS, -(-N // (2 * MR)) * MR if halves else N)
    operands = operand(q), operand(k), operand(v), output, scalar(d**-0.5), table
    numbers = H, N, d, rows, *q.strides[:3], context_bytes, *layout
    up = -(-N // LANES) * LANES
    floats = up * d + -(-d // LANES) * LANES * N + MR * (up + 16 + NR + 1) + offsets + 2 * LANES + 64
    run(_attention, B * H * -(-N // rows), operands, numbers, 4 * floats + 128)
    return context
