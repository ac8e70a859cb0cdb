"""Attention: one fused kernel for half precision and heads of size 64, which all published models have.

Otherwise cuBLAS computes the scores, one kernel applies bias and softmax in place, and cuBLAS computes the context.
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
SCORES_BYTES = 32 << 20  # of scores computed at a time: they fit the second-level cache of a large GPU
HEAD, TILE, ATTEND_THREADS = 64, 64, 128  # of the fused kernel: head size, queries per block, threads per block
SCORES_OF_A_THREAD = 8  # scores per thread that softmax keeps in registers


def project_qkv(
    x: Array, p: DeviceAttention, num_heads: int
) -> tuple[Array, Array, Array]:  # (B, N, D) -> 3 x (B, H, N, d)
    """See `reference.project_qkv`: one product, then one kernel that adds the bias and splits the heads.

    For the fused attention kernel, which reads the heads in place, the results are views of the product.
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
    """See `reference.attention`.  For float16 and bfloat16 q, k and v, scores, softmax and the returned probabilities
    are still float32; the probabilities that multiply v are rounded.
    """
    if not return_probs and keep is None and suit(q, k, v):
        return attend(q, k, v, bias)
    return _by_scores(q, k, v, bias, return_probs, keep)


def suit(q: Array, k: Array, v: Array) -> bool:
    """Whether the fused kernel can read them: 16-bit elements, aligned for loads of eight, with equal strides."""
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
    """Whether a device has instructions for products of bfloat16 matrices: from compute capability 8.0 on."""
    return int(cupy.cuda.Device(device).compute_capability) >= 80


def attend(
    q: Array, k: Array, v: Array, bias: Any | None, sizes: Array | None = None
) -> Array:  # 3 x (B, H, N, 64) -> (B, N, D)
    """Attention without scores in device memory; `sizes` (B, H, N) receives what `learned_attention` needs."""
    B, H, N, _ = q.shape
    spread, stride = spread_bias(bias, H, N, model_dtype(q))
    context = cupy.empty((B, N, H * HEAD), q.dtype)
    kernel("attend", model_dtype(q))(
        (B * H * -(-N // TILE),), (ATTEND_THREADS,),
        (q, k, v, or_null(spread), context, or_null(sizes), N, H, *steps_of(q), stride, HEAD**-0.5 * log2(e)),
    )  # fmt: skip
    return context


def spread_bias(bias: Any | None, H: int, N: int, dtype: str) -> tuple[Array | None, int]:
    """(the bias of all pairs of tokens (H, N, stride), stride).

    It is divided by the scale, by which the fused kernels multiply the sum of scores and bias.
    """
    stride = -(-N // 8) * 8
    if bias is None:
        return None, stride
    table, index, row, head = _bias_arrays(bias, dtype)
    spread = cupy.empty((H, N, stride), compute_dtype(dtype))
    kernel("spread_bias", dtype)((H * N,), (block_size(N),), (table, row, head, index, spread, N, stride, HEAD**0.5))
    return spread, stride


def steps_of(q: Array) -> tuple[int, ...]:
    """Elements from one image, head and token to the next, in an array of 16-bit elements."""
    return tuple(step // 2 for step in q.strides[:3])


def _by_scores(
    q: Array, k: Array, v: Array, bias: Any | None, return_probs: bool, keep: Array | None
) -> Any:  # 3 x (B, H, N, d) -> (B, N, D)
    """Attention as two products, for as many (image, head) pairs at a time as SCORES_BYTES allows."""
    B, H, N, d = q.shape
    dtype, pairs = model_dtype(q), B * H
    seen = compute_dtype(dtype)
    q, k, v = (cupy.ascontiguousarray(x).reshape(pairs, N, d) for x in (q, k, v))
    stride = -(-N // 8) * 8  # cuBLAS's fast kernels need rows aligned to 16 bytes
    at_once = max(1, min(pairs, SCORES_BYTES // (N * stride * seen.itemsize)))
    scores = cupy.empty((at_once, N, stride), seen)
    by_head = cupy.empty((pairs, N, d), q.dtype)
    probs = cupy.empty((pairs, N, N), seen) if return_probs else None
    factors = None if keep is None else cupy.ascontiguousarray(cupy.asarray(keep, seen)).reshape(pairs, N, N)
    for first in range(0, pairs, at_once):
        here = slice(first, min(first + at_once, pairs))
        part = scores[: here.stop - first]
        batched_product(q[here], k[here], part[:, :, :N], scale=d**-0.5)
        own, kept = (None if x is None else x[here] for x in (probs, factors))
        softmax(part, N, bias, H, first, own, kept, dtype)
        batched_product(part.view(q.dtype)[:, :, :N], v[here], by_head[here], transposed=False)
    context = cupy.empty((B, N, H * d), q.dtype)
    along_rows("merge_heads", dtype, B * N, H * d, by_head, context, N, H, d, unit=d)
    return context if probs is None else (context, probs.reshape(B, H, N, N))


def softmax(
    scores: Array, N: int, bias: Any | None, H: int, first: int, probs: Array | None, keep: Array | None, dtype: str
) -> None:
    """Replaces scores (pairs, N, stride), from pair `first` on, by probabilities, from the start of each row.

    `probs` (pairs, N, N) receives them before they are multiplied by `keep`, of the same shape.
    """
    table, index, row, head = (0, 0, 0, 0) if bias is None else _bias_arrays(bias, dtype)
    kernel("softmax", dtype)(
        (len(scores) * N,), (block_size(-(-N // SCORES_OF_A_THREAD)),),
        (scores, N, scores.shape[2], table, row, head, index, H, first, or_null(probs), or_null(keep)),
    )  # fmt: skip


def _bias_arrays(bias: Any, dtype: str) -> tuple[Array, Array, int, int]:
    """A position bias as kernels read it: the table, the index, and the table's strides along rows and heads."""
    table, index = cupy.asarray(bias.table, compute_dtype(dtype)), _index(bias.grid, cupy.cuda.runtime.getDevice())
    row, head = (step // table.itemsize for step in table.strides)
    return table, index, row, head


@lru_cache(maxsize=4)
def _index(grid: tuple[int, int], device: int) -> Array:
    """`relative_position_index`, cached for the last few grids."""
    return relative_position_index(grid)
