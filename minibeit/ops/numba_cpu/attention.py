"""Fused attention: scores, bias, softmax and weighted sum of one tile of query rows at a time."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from .arguments import ATTENTION
from .low_arguments import ATTENTION_BFLOAT16, bfloat16_route
from .machine_code import Kernel
from .memory import NOTHING, operand, result
from .operands import contiguous, scalar
from .pool import get_num_threads
from .queue import run
from .target import LANES, MR, NR

_QUERY_ROWS = 384 // MR * MR  # query rows per task, at most; each task packs its head's keys and values anew
_TASKS_PER_THREAD = 8


_attention = Kernel("minibeit.ops.numba_cpu.kernels.attention", "attention", arguments=ATTENTION)
_attention_bfloat16 = Kernel(
    "minibeit.ops.numba_cpu.kernels.attention_bfloat16", "attention_bfloat16", arguments=ATTENTION_BFLOAT16
)


def can_fuse(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: Any | None) -> bool:
    """Whether q, k, v lie alike in memory, as `project_qkv` leaves them, and the bias is laid out for a patch grid."""
    _, H, N, _ = q.shape
    alike = q.strides == k.strides == v.strides and q.strides[-1] == 4 and q.shape == k.shape == v.shape
    if bias is None:
        return alike
    gh, gw = bias.grid
    offsets = (2 * gh - 1) * (2 * gw - 1)
    return alike and gh * gw + 1 == N and bias.table.shape == (offsets + 3, H) and bias.table.dtype == np.float32


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: Any | None, bfloat16: bool = False
) -> np.ndarray:  # (B, H, N, d) -> (B, N, D)
    """softmax(q k^T / sqrt(d) + bias) v for every head; scores of MR query rows are alive at a time in each thread.

    With `bfloat16` what is multiplied is rounded to it, on a CPU that multiplies such numbers.
    """
    B, H, N, d = q.shape
    context, output, context_bytes = result((B, N, H * d))
    table, offsets, layout = NOTHING, 0, (0, 0, 0)
    if bias is not None:
        values = contiguous(bias.table)
        table, offsets, layout = operand(values), len(values), (values.strides[0], *bias.grid)
    operands = ATTENTION.operands(
        q=operand(q), k=operand(k), v=operand(v), context=output, scale=scalar(d**-0.5), table=table
    )
    tasks, numbers, scratch = _work(q.shape, q.strides[:3], context_bytes, offsets, layout, get_num_threads())
    short = bfloat16 and bfloat16_route().name == "vdpbf16ps"
    run(_attention_bfloat16 if short else _attention, tasks, operands, numbers, scratch)
    return context


@lru_cache(maxsize=64)
def _work(
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int],
    context_bytes: int,
    offsets: int,
    layout: tuple[int, int, int],
    threads: int,
) -> tuple[int, tuple[int, ...], int]:
    """(tasks, the kernel's numbers, bytes of scratch memory), the same from block to block and image to image."""
    B, H, N, d = shape
    halves = threads * _TASKS_PER_THREAD > B * H  # so that a thread that lost time is not waited for
    query_rows = min(_QUERY_ROWS, -(-N // (2 * MR)) * MR if halves else N)
    (image_bytes, head_bytes, row_bytes), (table_bytes, grid_rows, grid_columns) = strides, layout
    numbers = ATTENTION.numbers(
        heads=H, count=N, size=d, query_rows=query_rows, image_bytes=image_bytes, head_bytes=head_bytes,
        row_bytes=row_bytes, context_bytes=context_bytes, table_bytes=table_bytes, grid_rows=grid_rows,
        grid_columns=grid_columns,
    )  # fmt: skip
    up = -(-N // LANES) * LANES
    wide = -(-d // LANES) * LANES
    floats = up * wide + wide * N + MR * (up + 16 + NR + 1) + offsets + 3 * LANES + 64 + wide
    return B * H * -(-N // query_rows), numbers, 4 * floats + 128
