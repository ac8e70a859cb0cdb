"""Attention: in one kernel for heads of 64 numbers in half precision, as all published models have them.

Else scores by cuBLAS, softmax with the position bias by one kernel in place, the context by cuBLAS.
"""

from __future__ import annotations

from functools import cache, lru_cache
from math import e, log2
from typing import Any

from .arrays import relative_position_index
from .device import cupy
from .gemm import batched_product, product
from .kernels import PLAIN, along_rows, block_size, compute_dtype, kernel, model_dtype, or_null, to_storage
from .prepare import DeviceAttention
from .rows import bias_activation

Array = Any
SCORES_BYTES = 32 << 20  # of the scores in work at a time: what the second-level cache of a large GPU holds
HEAD, TILE, ATTEND_THREADS = 64, 64, 128  # of the one kernel: numbers of a head, queries and threads of a block
SCORES_OF_A_THREAD = 8  # that softmax keeps in registers


def project_qkv(
    x: Array, p: DeviceAttention, num_heads: int
) -> tuple[Array, Array, Array]:  # (B, N, D) -> 3 x (B, H, N, d)
    """See `reference.project_qkv`: one product, then one kernel that adds the bias and parts the heads.

    The one kernel for attention reads heads where the product left them: then they are views.
    """
    dtype = p.qkv.dtype
    x = to_storage(x, dtype)
    B, N, D = x.shape
    d = len(p.qkv.weight) // (3 * num_heads)
    joined = cupy.empty((B, N, 3, num_heads, d), x.dtype)
    rows = joined.reshape(B * N, 3 * num_heads * d)
    product(x.reshape(-1, D), p.qkv.weight, rows)
    if x.itemsize == 2 and d == HEAD and _can_attend(cupy.cuda.runtime.getDevice()):
        bias_activation(rows, p.qkv, PLAIN, "T")
        parts = joined.transpose(2, 0, 3, 1, 4)
    else:
        parts = cupy.empty((3, B, num_heads, N, d), x.dtype)
        args = (joined, p.qkv.bias, parts, B, N, num_heads, d)
        along_rows("split_heads", dtype, B * N, 3 * num_heads * d, *args, unit=d)
    return parts[0], parts[1], parts[2]


def attention(
    q: Array, k: Array, v: Array, bias: Any | None, return_probs: bool = False, keep: Array | None = None
) -> Any:  # 3 x (B, H, N, d) -> (B, N, D)
    """See `reference.attention`.  Scores and softmax are float32 also where q, k and v are float16 or bfloat16, and so
    are the probabilities that are given back; those that multiply v are rounded.
    """
    if not return_probs and keep is None and _suit(q, k, v):
        return _attend(q, k, v, bias)
    return _by_scores(q, k, v, bias, return_probs, keep)


def _suit(q: Array, k: Array, v: Array) -> bool:
    """Whether the one kernel can read them: halves, eight at a time, at the same places of each."""
    return (
        q.itemsize == 2
        and q.shape[3] == HEAD
        and q.strides == k.strides == v.strides
        and q.strides[3] == 2
        and not any(step % 16 for step in q.strides[:3])
        and not any(x.data.ptr % 16 for x in (q, k, v))
        and _can_attend(cupy.cuda.runtime.getDevice())
    )


@cache
def _can_attend(device: int) -> bool:
    """Whether a device multiplies bfloat16 matrices by one instruction: from compute capability 8.0 on."""
    return int(cupy.cuda.Device(device).compute_capability) >= 80


def _attend(q: Array, k: Array, v: Array, bias: Any | None) -> Array:  # 3 x (B, H, N, 64) -> (B, N, D)
    """Attention without scores in memory.

    The bias is looked up once for all images, as (H, N, N), and divided by the scale that will multiply its sum with
    the scores.
    """
    B, H, N, _ = q.shape
    dtype = model_dtype(q)
    spread, stride = None, -(-N // 8) * 8
    if bias is not None:
        table, index, row, head = _bias_arrays(bias, dtype)
        spread = cupy.empty((H, N, stride), compute_dtype(dtype))
        kernel("spread_bias", dtype)(
            (H * N,), (block_size(N),), (table, row, head, index, spread, N, stride, HEAD**0.5)
        )
    context = cupy.empty((B, N, H * HEAD), q.dtype)
    steps = (step // 2 for step in q.strides[:3])
    kernel("attend", dtype)(
        (B * H * -(-N // TILE),), (ATTEND_THREADS,),
        (q, k, v, or_null(spread), context, N, H, *steps, stride, HEAD**-0.5 * log2(e)),
    )  # fmt: skip
    return context


def _by_scores(
    q: Array, k: Array, v: Array, bias: Any | None, return_probs: bool, keep: Array | None
) -> Any:  # 3 x (B, H, N, d) -> (B, N, D)
    """Attention by two products, as many (image, head) pairs at a time as SCORES_BYTES allow."""
    B, H, N, d = q.shape
    dtype, pairs = model_dtype(q), B * H
    seen = compute_dtype(dtype)
    q, k, v = (cupy.ascontiguousarray(x).reshape(pairs, N, d) for x in (q, k, v))
    stride = -(-N // 8) * 8  # cuBLAS's fast kernels want rows that begin at multiples of 16 bytes
    at_once = max(1, min(pairs, SCORES_BYTES // (N * stride * seen.itemsize)))
    scores = cupy.empty((at_once, N, stride), seen)
    by_head = cupy.empty((pairs, N, d), q.dtype)
    probs = cupy.empty((B, H, N, N), seen) if return_probs else None
    factors = None if keep is None else cupy.ascontiguousarray(cupy.asarray(keep, seen))
    for first in range(0, pairs, at_once):
        here = slice(first, min(first + at_once, pairs))
        part = scores[: here.stop - first]
        batched_product(q[here], k[here], part[:, :, :N], scale=d**-0.5)
        _softmax(part, N, bias, H, first, probs, factors, dtype)
        batched_product(part.view(q.dtype)[:, :, :N], v[here], by_head[here], transposed=False)
    context = cupy.empty((B, N, H * d), q.dtype)
    along_rows("merge_heads", dtype, B * N, H * d, by_head, context, N, H, d, unit=d)
    return context if probs is None else (context, probs)


def _softmax(
    scores: Array, N: int, bias: Any | None, H: int, first: int, probs: Array | None, keep: Array | None, dtype: str
) -> None:
    """Turns scores (pairs, N, stride) into probabilities, which begin where each row begins."""
    table, index, row, head = (0, 0, 0, 0) if bias is None else _bias_arrays(bias, dtype)
    kernel("softmax", dtype)(
        (len(scores) * N,), (block_size(-(-N // SCORES_OF_A_THREAD)),),
        (scores, N, scores.shape[2], table, row, head, index, H, first, or_null(probs), or_null(keep)),
    )  # fmt: skip


def _bias_arrays(bias: Any, dtype: str) -> tuple[Array, Array, int, int]:
    """A position bias as kernels read it: the table, the index, and the steps from row to row and from head to head."""
    table, index = cupy.asarray(bias.table, compute_dtype(dtype)), _index(bias.grid, cupy.cuda.runtime.getDevice())
    row, head = (step // table.itemsize for step in table.strides)
    return table, index, row, head


@lru_cache(maxsize=4)
def _index(grid: tuple[int, int], device: int) -> Array:
    """`relative_position_index`, kept for the last few grids."""
    return relative_position_index(grid)
