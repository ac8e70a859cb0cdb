"""Attention: scores by cuBLAS, softmax with the position bias by one kernel in place, the context by cuBLAS."""

from __future__ import annotations

from typing import Any

from .device import cupy
from .gemm import batched_product, product
from .kernels import MODEL_DTYPE, along_rows, block_size, kernel, operand, or_null, seen_dtype
from .prepare import DeviceAttention

Array = Any
SCORES_BYTES = 32 << 20  # of the scores in work at a time: what the second-level cache of a large GPU holds


def project_qkv(
    x: Array, p: DeviceAttention, num_heads: int
) -> tuple[Array, Array, Array]:  # (B, N, D) -> 3 x (B, H, N, d)
    """See `reference.project_qkv`: one product, then one kernel that adds the bias and parts the heads."""
    dtype = p.qkv.dtype
    x = operand(x, dtype)
    B, N, D = x.shape
    d = len(p.qkv.weight) // (3 * num_heads)
    joined = cupy.empty((B * N, 3 * num_heads * d), x.dtype)
    product(x.reshape(-1, D), p.qkv.weight, joined)
    parts = cupy.empty((3, B, num_heads, N, d), x.dtype)
    along_rows("split_heads", dtype, B * N, 3 * num_heads * d, joined, p.qkv.bias, parts, B, N, num_heads, d, unit=d)
    return parts[0], parts[1], parts[2]


def attention(
    q: Array, k: Array, v: Array, bias: Any | None, return_probs: bool = False, keep: Array | None = None
) -> Any:  # 3 x (B, H, N, d) -> (B, N, D)
    """See `reference.attention`.

    Goes by as many (image, head) pairs as SCORES_BYTES allow.  Scores and softmax are float32 also where q, k and v
    are float16 or bfloat16, and so are the probabilities that are given back.
    """
    B, H, N, d = q.shape
    dtype, pairs = MODEL_DTYPE[q.dtype.name], B * H
    seen = seen_dtype(dtype)
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
    table, index, row, head = 0, 0, 0, 0
    if bias is not None:
        table, index = cupy.asarray(bias.table, scores.dtype), cupy.ascontiguousarray(bias.index)
        row, head = (step // table.itemsize for step in table.strides)
    kernel("softmax", dtype)(
        (len(scores) * N,), (block_size(-(-N // 4)),),
        (scores, N, scores.shape[2], table, row, head, index, H, first, or_null(probs), or_null(keep)),
    )  # fmt: skip
