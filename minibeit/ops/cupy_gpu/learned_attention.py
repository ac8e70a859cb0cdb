"""Forward and backward of attention and of the projection before it, with weights that are learned.

Where the fused kernel serves, its backward needs no (N, N) block of an image either: three kernels compute scores
again, one for each sum that has another owner.  Otherwise scores are computed by cuBLAS for as many heads at a time
as SCORES_BYTES allows.  Both add the table's gradient up in a fixed order.  See `learned` and `ops/backward`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import e, log2
from typing import Any

import numpy as np

from ...params import Attention, Linear, table_rows
from .arrays import relative_position_index, to_host
from .attention import ATTEND_THREADS, HEAD, TILE, attend, attention, project_qkv, softmax, spread_bias, steps_of, suit
from .device import cupy
from .gemm import batched_product
from .kernels import ROWS_OF_A_BLOCK, THREADS, block_size, compute_dtype, kernel, or_null, storage_dtype, to_storage
from .learned import input_gradient, operand_and_sums, weight_gradient
from .prepare import DeviceAttention, DeviceLinear

__all__ = ["attention_backward", "attention_forward", "project_qkv_backward", "project_qkv_forward"]

Array = Any
SCORES_BYTES = 1 << 28  # of the scores that the backward computes at a time, where they are in memory
BLOCKS = 528  # that keep a large GPU busy: four for each of its 132 multiprocessors


# The projection -------------------------------------------------------------------------------------------------------


def project_qkv_forward(dtype: str, x: Array, p: Attention, num_heads: int) -> tuple[tuple[Array, ...], None]:
    """As in inference: one product for all three."""
    zeros = cupy.zeros(len(p.query.weight), p.query.weight.dtype)
    biases = [zeros if layer.bias is None else layer.bias for layer in (p.query, p.key, p.value)]
    qkv = DeviceLinear(to_storage(_joined_weight(p), dtype), cupy.concatenate(biases), dtype)
    return project_qkv(x, DeviceAttention(qkv, output=None), num_heads), None  # type: ignore[arg-type]


def project_qkv_backward(
    dtype: str, g: tuple[Array, ...], saved: None, x: Array, p: Attention, num_heads: int
) -> tuple[Any, ...]:
    """That of one layer of 3 D outputs, cut into three."""
    operand, sums = operand_and_sums(_side_by_side(g), dtype, sums=True)
    dw = weight_gradient(operand, x, dtype)
    db = None if sums is None else sums[0].astype(dw.dtype)
    D, grads = len(dw) // 3, []
    for i, layer in enumerate((p.query, p.key, p.value)):
        own = slice(i * D, (i + 1) * D)
        grads.append(Linear(dw[own], None if layer.bias is None or db is None else db[own]))
    query, key, value = grads
    dx = input_gradient(operand, _joined_weight(p), dtype).reshape(x.shape)
    return dx, Attention(query, key, value, output=None), None  # type: ignore[arg-type]


def _joined_weight(p: Attention) -> Array:  # -> (3 D, D)
    return cupy.concatenate([layer.weight for layer in (p.query, p.key, p.value)])


def _side_by_side(g: tuple[Array, ...]) -> Array:  # 3 x (B, H, N, d) -> (B N, 3 H d)
    """The rows of the three; no copy where they lie so already, as the fused backward leaves them."""
    B, H, N, d = g[0].shape
    row, item = H * d, g[0].itemsize
    lying = (N * 3 * row, d, 3 * row, 1)
    if all(
        part.strides == tuple(step * item for step in lying) and part.data.ptr == g[0].data.ptr + i * row * item
        for i, part in enumerate(g)
    ):
        return cupy.ndarray((B * N, 3 * row), g[0].dtype, g[0].data)
    return cupy.concatenate([part.transpose(0, 2, 1, 3).reshape(B * N, row) for part in g], 1)


# Attention ------------------------------------------------------------------------------------------------------------


def attention_forward(
    dtype: str, q: Array, k: Array, v: Array, bias: Any, return_probs: bool = False, keep: Array | None = None
) -> tuple[Any, Any]:
    """As in inference.  Of the fused kernel the result is kept, and log2 of each query's sum of powers."""
    q, k, v = (_operand(part, dtype) for part in (q, k, v))
    if return_probs or keep is not None or not suit(q, k, v):
        return attention(q, k, v, bias, return_probs, keep), None
    sizes = cupy.empty(q.shape[:3], compute_dtype(dtype))
    context = attend(q, k, v, bias, sizes)
    return context, (context, sizes)


def attention_backward(
    dtype: str,
    g: Any,
    saved: Any,
    q: Array,
    k: Array,
    v: Array,
    bias: Any | None,
    return_probs: bool = False,
    keep: Array | None = None,
) -> tuple[Any, ...]:
    """As `backward.attention_backward`."""
    q, k, v = (_operand(part, dtype) for part in (q, k, v))
    if saved is not None:
        return _fused(dtype, g, saved, q, k, v, bias)
    g, g_probs = g if return_probs else (g, None)
    return _by_scores(dtype, g, g_probs, q, k, v, bias, keep)


def _fused(
    dtype: str, g: Array, saved: tuple[Array, Array], q: Array, k: Array, v: Array, bias: Any
) -> tuple[Any, ...]:
    (context, sizes), (B, H, N, _) = saved, q.shape
    operand, dots = cupy.empty(g.shape, q.dtype), cupy.empty_like(sizes)
    count = B * N * H
    kernel("attend_dots", dtype)(
        (-(-count // ROWS_OF_A_BLOCK),), (32 * ROWS_OF_A_BLOCK,),
        (cupy.ascontiguousarray(g), context, operand, dots, count, N, H),
    )  # fmt: skip
    spread, stride = spread_bias(bias, H, N, dtype)
    numbers = N, H, *steps_of(q), stride, HEAD**-0.5 * log2(e)
    operands = q, k, v, operand, or_null(spread), sizes, dots
    made, blocks = cupy.empty((B, N, 3, H, HEAD), g.dtype), -(-N // TILE)
    launch = (B * H * blocks,), (ATTEND_THREADS,), (*operands, made, *numbers, HEAD**-0.5)
    kernel("attend_backward_queries", dtype)(*launch)
    kernel("attend_backward_keys", dtype)(*launch)
    d_bias = None
    if bias is not None:
        tiles = H * blocks * blocks
        pairs = cupy.empty((min(B, -(-BLOCKS // tiles)), H, N, stride), g.dtype)
        args = *operands, pairs, *numbers, B
        kernel("attend_backward_bias", dtype)((tiles, len(pairs)), (ATTEND_THREADS,), args)
        d_bias = _of_table(dtype, pairs, bias, N)
    return (*made.transpose(2, 0, 3, 1, 4), d_bias)


def _by_scores(
    dtype: str, g: Array | None, g_probs: Array | None, q: Array, k: Array, v: Array, bias: Any, keep: Array | None
) -> tuple[Any, ...]:
    B, H, N, d = q.shape
    pairs, stride, seen = B * H, -(-N // 8) * 8, compute_dtype(dtype)
    heads = cupy.zeros(q.shape, seen) if g is None else g.reshape(B, N, H, d).transpose(0, 2, 1, 3)
    q, k, v, heads = (cupy.ascontiguousarray(x).reshape(pairs, N, d) for x in (q, k, v, to_storage(heads, dtype)))
    keep, extra = (
        None if x is None else cupy.ascontiguousarray(x.astype(seen, copy=False)).reshape(pairs, N, N)
        for x in (keep, g_probs)
    )
    made = [cupy.empty((pairs, N, d), seen) for _ in range(3)]
    at_once = max(1, min(pairs, SCORES_BYTES // (N * stride * seen.itemsize)))
    work = cupy.empty((2, at_once, N, stride), seen)
    sums = None if bias is None else cupy.zeros((H, N, stride), seen)
    for first in range(0, pairs, at_once):
        here = slice(first, min(first + at_once, pairs))
        parts = [None if x is None else x[here] for x in (q, k, v, heads, keep, extra)]
        scores, d_scores = work[:, : here.stop - first]
        _of_heads(parts, bias, H, first, scores, d_scores, [x[here] for x in made], dtype)
        if sums is not None:
            size = N * stride
            args = d_scores, sums, len(d_scores), first, H, size
            kernel("add_scores", dtype)((-(-size // THREADS), H), (THREADS,), args)
    d_bias = None if sums is None else _of_table(dtype, sums[None], bias, N)
    return (*(x.reshape(B, H, N, d) for x in made), d_bias)


def _of_heads(
    parts: list[Any], bias: Any, H: int, first: int, scores: Array, d_scores: Array, made: list[Array], dtype: str
) -> None:
    """Fills `made` with the gradients of some heads' q, k and v, and d_scores (pairs, N, stride) with their scores'."""
    q, k, v, g, keep, extra = parts
    n, N, stride = d_scores.shape
    probs, scale = cupy.empty((n, N, N), d_scores.dtype), q.shape[2] ** -0.5
    batched_product(q, k, scores[:, :, :N], scale=scale)
    softmax(scores, N, bias, H, first, probs, keep, dtype)
    batched_product(scores.view(q.dtype)[:, :, :N], g, made[2], transposed=False, turned=True)
    batched_product(g, v, d_scores[:, :, :N])
    same = q.dtype == d_scores.dtype
    operand = d_scores if same else scores.view(q.dtype)  # the probabilities in there have been used
    args = d_scores, probs, or_null(keep), or_null(extra), 0 if same else operand, N, stride, operand.shape[2]
    kernel("softmax_backward", dtype)((n * N,), (block_size(N),), args)
    batched_product(operand[:, :, :N], k, made[0], scale=scale, transposed=False)
    batched_product(operand[:, :, :N], q, made[1], scale=scale, transposed=False, turned=True)


def _operand(x: Array, dtype: str) -> Array:
    """`x` as an operand of products, not copied where it is one: the fused kernel reads heads where they lie."""
    return x if x.dtype == storage_dtype(dtype) else to_storage(x, dtype)


def _of_table(dtype: str, pairs: Array, bias: Any, N: int) -> Any:
    """The gradient of a bias from that of every pair of tokens (parts, H, N, stride), to be added up."""
    places = _places(bias.grid, cupy.cuda.runtime.getDevice())
    R, most = places.shape
    parts, H, _, stride = pairs.shape
    table = cupy.empty((R, H), pairs.dtype)
    args = pairs, places, table, most, N, stride, H, parts
    kernel("table_backward", dtype)((R, H), (block_size(most),), args)
    return replace(bias, table=table)


@lru_cache(maxsize=4)
def _places(grid: tuple[int, int], device: int) -> Array:  # -> (R, most)
    """The pairs of tokens that read each row of the table, in order; behind them -1."""
    index = to_host(relative_position_index(grid)).reshape(-1)
    counts = np.bincount(index, minlength=table_rows(grid))
    made = np.full((len(counts), counts.max()), -1, np.int32)
    made[np.arange(counts.max()) < counts[:, None]] = np.argsort(index, kind="stable")
    return cupy.asarray(made)
