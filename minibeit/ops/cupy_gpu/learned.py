"""Forward and backward of ops on weights that are learned: plain arrays in the dtype of model code, on the device.

A forward stores the operands of its products as the model's dtype says, when it needs them; arrays that pass from op to
op are those of model code.  Sums go in a fixed order.  Formulas: `ops/backward`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import numpy as np

from ...params import Attention, LayerNorm, Linear, table_rows
from ..backward.arrays import total
from . import losses, rows
from .arrays import relative_position_index, to_host
from .attention import attention, project_qkv
from .device import cupy
from .gemm import batched_product
from .kernels import ACTIVATIONS, compute_dtype, to_compute, to_storage
from .prepare import DeviceAttention, DeviceLinear, DeviceNorm

__all__ = [
    "attention_backward",
    "attention_forward",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "layer_norm_backward",
    "layer_norm_forward",
    "linear_activation_backward",
    "linear_activation_forward",
    "linear_backward",
    "linear_forward",
    "linear_residual_backward",
    "linear_residual_forward",
    "masked_patches_backward",
    "mean_patches_backward",
    "part_backward",
    "project_qkv_backward",
    "project_qkv_forward",
    "soft_cross_entropy_backward",
    "soft_cross_entropy_forward",
]

Array = Any
OF_DTYPE = (  # the names of those that take the model's dtype first
    "layer_norm_forward", "layer_norm_backward", "linear_forward", "linear_backward", "linear_activation_forward",
    "linear_activation_backward", "linear_residual_forward", "linear_residual_backward", "project_qkv_forward",
    "project_qkv_backward", "attention_forward", "attention_backward",
)  # fmt: skip
SCORES_BYTES = 1 << 28  # of float32 scores that the backward of attention computes at a time
_GELUS = ("gelu", "gelu_python")
_DERIVATIVES = """
extern "C" __global__ void times_gelu_derivative(const A* g, const A* x, A* y, long long count) {
  const long long i = blockIdx.x * 256ll + threadIdx.x;
  if (i >= count) return;
  const double z = x[i];
  y[i] = g[i] * A(normcdf(z) + z * exp(-0.5 * z * z) * 0.3989422804014327);
}
"""


# Rows -----------------------------------------------------------------------------------------------------------------


def layer_norm_forward(dtype: str, x: Array, norm: LayerNorm, eps: float) -> tuple[Array, None]:
    """The result is rounded to the model's dtype, as in inference."""
    return to_compute(rows.layer_norm(x, DeviceNorm(norm.weight, norm.bias, dtype), eps), dtype), None


def layer_norm_backward(dtype: str, g: Array, saved: None, x: Array, norm: LayerNorm, eps: float) -> tuple[Any, ...]:
    """In float64, as `backward.layer_norm_backward`."""
    centred = x.astype(np.float64)
    centred = centred - centred.mean(-1, keepdims=True)
    r = 1 / cupy.sqrt(cupy.square(centred).mean(-1, keepdims=True) + eps)
    h, a = centred * r, g * norm.weight.astype(np.float64)
    dx = r * (a - a.mean(-1, keepdims=True) - h * (a * h).mean(-1, keepdims=True))
    axes = tuple(range(g.ndim - 1))
    return dx.astype(x.dtype), LayerNorm((g * h).sum(axes).astype(x.dtype), total(g, axes)), None


def linear_forward(dtype: str, x: Array, layer: Any) -> tuple[Array, None]:
    """x W^T + b."""
    return rows.linear(x, _leaf(layer, dtype)), None


def linear_backward(dtype: str, g: Array, saved: None, x: Array, layer: Any) -> tuple[Any, ...]:
    """dx = g W,  dW = g^T x,  db = sum of g."""
    flat = g.reshape(-1, g.shape[-1])
    bias = None if layer.bias is None else total(flat, 0)
    dx, dw = _products(flat, x, layer.weight, dtype)
    return dx.reshape(x.shape), type(layer)(dw.reshape(layer.weight.shape), bias)


def linear_activation_forward(dtype: str, x: Array, layer: Linear, activation: str) -> tuple[Array, Array]:
    """(f(z), z) with z = x W^T + b."""
    z = rows.linear(x, _leaf(layer, dtype))
    y = z.copy()
    rows.bias_activation(y, DeviceLinear(layer.weight, None, dtype), ACTIVATIONS[activation], "A")
    return y, z


def linear_activation_backward(
    dtype: str, g: Array, saved: Array, x: Array, layer: Linear, activation: str
) -> tuple[Any, ...]:
    """That of the linear layer for g f'(z); NumPy computes f' of what is no GELU by erf."""
    if activation in _GELUS:
        y, g = cupy.empty_like(saved), cupy.ascontiguousarray(g)
        _derivatives(g.dtype.name, cupy.cuda.runtime.getDevice())((-(-g.size // 256),), (256,), (g, saved, y, g.size))
    else:
        from ..backward.activations import derivative

        y = g * cupy.asarray(derivative(activation, to_host(saved)))
    return (*linear_backward(dtype, y, None, x, layer), None)


def linear_residual_forward(
    dtype: str, x: Array, layer: Linear, scale: Array | None, residual: Array, keep: Array | None = None
) -> tuple[Array, None]:
    """residual + scale (x W^T + b) keep."""
    return rows.linear_residual(x, _leaf(layer, dtype), scale, residual, keep), None


def linear_residual_backward(
    dtype: str,
    g: Array,
    saved: None,
    x: Array,
    layer: Linear,
    scale: Array | None,
    residual: Array,
    keep: Array | None = None,
) -> tuple[Any, ...]:
    """As `backward.linear_residual_backward`, whose dscale needs no branch kept."""
    a = g if keep is None else g * keep
    if scale is None:
        return (*linear_backward(dtype, a, None, x, layer), None, g)
    flat = a.reshape(-1, a.shape[-1])
    sums = total(flat, 0)
    dx, _ = _products(flat * scale, x, layer.weight, dtype, weights=False)
    _, G = _products(flat, x, layer.weight, dtype, inputs=False)
    dscale = total(G * layer.weight, 1) + (0 if layer.bias is None else layer.bias * sums)
    bias = None if layer.bias is None else scale * sums
    return dx.reshape(x.shape), Linear(scale[:, None] * G, bias), dscale, g


def _leaf(layer: Any, dtype: str) -> DeviceLinear:
    weight = to_storage(layer.weight.reshape(len(layer.weight), -1), dtype)
    return DeviceLinear(weight, None if layer.bias is None else cupy.ascontiguousarray(layer.bias), dtype)


def _products(
    g: Array, x: Array, weight: Array, dtype: str, inputs: bool = True, weights: bool = True
) -> tuple[Array, Array]:  # (n, out), (..., in), (out, ...) -> (n, in), (out, in)
    """(g W, g^T x), either of which may be left out."""
    x2, seen = to_storage(x.reshape(-1, x.shape[-1]), dtype), compute_dtype(dtype)
    g2, w = to_storage(g, dtype), to_storage(weight.reshape(len(weight), -1), dtype)
    dx = dw = None
    if inputs:
        dx = cupy.empty((len(g2), w.shape[1]), seen)
        batched_product(g2[None], w[None], dx[None], transposed=False)
    if weights:
        dw = cupy.empty((g2.shape[1], x2.shape[1]), seen)
        batched_product(cupy.ascontiguousarray(g2.T)[None], x2[None], dw[None], transposed=False)
    return dx, dw


@cache
def _derivatives(dtype: str, device: int) -> Any:
    type_ = {"float32": "float", "float64": "double"}[dtype]
    code = f"typedef {type_} A;\n{_DERIVATIVES}"
    return cupy.RawModule(code=code, options=("--std=c++17",)).get_function("times_gelu_derivative")


# Attention ------------------------------------------------------------------------------------------------------------


def project_qkv_forward(dtype: str, x: Array, p: Attention, num_heads: int) -> tuple[tuple[Array, ...], None]:
    """One product for all three."""
    weight, bias = _joined(p)
    qkv = DeviceLinear(to_storage(weight, dtype), bias, dtype)
    parts = project_qkv(x, DeviceAttention(qkv, output=None), num_heads)  # type: ignore[arg-type]
    return tuple(to_compute(part, dtype) for part in parts), None


def project_qkv_backward(
    dtype: str, g: tuple[Array, ...], saved: None, x: Array, p: Attention, num_heads: int
) -> tuple[Any, ...]:
    """That of one layer of 3 D outputs, cut into three."""
    B, N, D = x.shape
    columns = cupy.concatenate([part.transpose(0, 2, 1, 3).reshape(B * N, D) for part in g], 1)
    dx, dw = _products(columns, x, _joined(p)[0], dtype)
    db = total(columns, 0)
    grads = []
    for i, layer in enumerate((p.query, p.key, p.value)):
        own = slice(i * D, (i + 1) * D)
        grads.append(Linear(dw[own], None if layer.bias is None else db[own]))
    query, key, value = grads
    return dx.reshape(x.shape), Attention(query, key, value, output=None), None  # type: ignore[arg-type]


def _joined(p: Attention) -> tuple[Array, Array]:
    layers = p.query, p.key, p.value
    zeros = cupy.zeros(len(p.query.weight), p.query.weight.dtype)
    biases = [zeros if layer.bias is None else layer.bias for layer in layers]
    return cupy.concatenate([layer.weight for layer in layers]), cupy.concatenate(biases)


def attention_forward(
    dtype: str, q: Array, k: Array, v: Array, bias: Any, return_probs: bool = False, keep: Array | None = None
) -> tuple[Any, None]:
    """As in inference; nothing is kept."""
    q, k, v = (to_storage(part, dtype) for part in (q, k, v))
    made = attention(q, k, v, bias, return_probs, keep)
    return ((to_compute(made[0], dtype), made[1]) if return_probs else to_compute(made, dtype)), None


def attention_backward(
    dtype: str,
    g: Any,
    saved: None,
    q: Array,
    k: Array,
    v: Array,
    bias: Any | None,
    return_probs: bool = False,
    keep: Array | None = None,
) -> tuple[Any, ...]:
    """As `backward.attention_backward`, for as many images at a time as SCORES_BYTES allows."""
    g, g_probs = g if return_probs else (g, None)
    B, H, N, d = q.shape
    heads = cupy.zeros_like(q) if g is None else g.reshape(B, N, H, d).transpose(0, 2, 1, 3)
    made = [cupy.empty(q.shape, q.dtype) for _ in range(3)]
    spread = 0 if bias is None else bias.table.T[:, _index(bias.grid, cupy.cuda.runtime.getDevice())]
    pairs = cupy.zeros((H, N, N), np.float64)
    at_once = max(1, SCORES_BYTES // (H * N * N * q.itemsize))
    for first in range(0, B, at_once):
        here = slice(first, first + at_once)
        factors, extra = (None if x is None else x[here] for x in (keep, g_probs))
        parts = q[here], k[here], v[here], heads[here]
        *found, d_scores = _attention_gradients(*parts, spread, factors, extra, dtype)
        for whole, part in zip(made, found):
            whole[here] = part
        pairs += d_scores.sum(0, dtype=np.float64)
    d_bias = None if bias is None else replace(bias, table=_by_table_row(pairs, bias))
    return (*made, d_bias)


def _attention_gradients(
    q: Array, k: Array, v: Array, g: Array, spread: Any, keep: Array | None, g_probs: Array | None, dtype: str
) -> tuple[Array, ...]:  # (b, H, N, d) -> the same three times, (b, H, N, N)
    scale = q.shape[-1] ** -0.5
    scores = _each(q, k, dtype, turned=True) * q.dtype.type(scale) + spread
    scores = cupy.exp(scores - scores.max(-1, keepdims=True))
    probs = scores / scores.sum(-1, keepdims=True)
    d_probs, dropped = _each(g, v, dtype, turned=True), probs
    if keep is not None:
        d_probs, dropped = d_probs * keep, probs * keep
    if g_probs is not None:
        d_probs = d_probs + g_probs
    d_scores = probs * (d_probs - (d_probs * probs).sum(-1, keepdims=True))
    dv = _each(dropped.swapaxes(2, 3), g, dtype)
    dq = _each(d_scores, k, dtype) * q.dtype.type(scale)
    dk = _each(d_scores.swapaxes(2, 3), q, dtype) * q.dtype.type(scale)
    return dq, dk, dv, d_scores


def _each(x: Array, y: Array, dtype: str, turned: bool = False) -> Array:
    """x y, or x y^T if `turned`, for each image and head."""
    a, b = (to_storage(part.reshape(-1, *part.shape[2:]), dtype) for part in (x, y))
    made = cupy.empty((*x.shape[:3], y.shape[2] if turned else y.shape[3]), compute_dtype(dtype))
    batched_product(a, b, made.reshape(-1, *made.shape[2:]), transposed=turned)
    return made


def _by_table_row(pairs: Array, bias: Any) -> Array:  # (H, N, N) -> (R, H)
    """The sum over all pairs of tokens that read a row of the table, added in the order of the pairs."""
    H = len(pairs)
    order = _pairs_of_rows(bias.grid, cupy.cuda.runtime.getDevice())  # (R, most)
    flat = cupy.concatenate([pairs.reshape(H, -1), cupy.zeros((H, 1), pairs.dtype)], 1)
    sums = [flat[h][order].sum(1) for h in range(H)]
    return cupy.stack(sums, 1).astype(bias.table.dtype)


@lru_cache(maxsize=4)
def _index(grid: tuple[int, int], device: int) -> Array:  # -> (N, N)
    return relative_position_index(grid)


@lru_cache(maxsize=4)
def _pairs_of_rows(grid: tuple[int, int], device: int) -> Array:  # -> (R, most) int64
    """The pairs of tokens that read each row of the table; behind them the number after the last pair."""
    index = to_host(_index(grid, device)).reshape(-1)
    counts = np.bincount(index, minlength=table_rows(grid))
    order = np.argsort(index, kind="stable")
    made = np.full((len(counts), counts.max()), index.size, np.int64)
    made[np.arange(counts.max()) < counts[:, None]] = order
    return cupy.asarray(made)


# Losses and arrays ----------------------------------------------------------------------------------------------------


def cross_entropy_forward(logits: Array, labels: Any, ignore_index: int, smoothing: float = 0.0) -> tuple[Array, None]:
    """See `reference.cross_entropy`; nothing is kept."""
    return losses.cross_entropy(logits, labels, ignore_index, smoothing), None


def soft_cross_entropy_forward(logits: Array, target: Any) -> tuple[Array, None]:
    """See `reference.soft_cross_entropy`; nothing is kept."""
    return losses.soft_cross_entropy(logits, target), None


def cross_entropy_backward(
    g: Array, saved: None, logits: Array, labels: Any, ignore_index: int, smoothing: float = 0.0
) -> tuple[Any, ...]:
    """dlogits = g (softmax(logits) - target) / (number of counted labels), 0 in ignored rows."""
    labels, K = np.asarray(to_host(labels)), logits.shape[1]
    counted = labels != ignore_index
    d = _softmax(logits) - logits.dtype.type(smoothing / K)
    place = cupy.arange(len(labels)), cupy.asarray(np.where(counted, labels, 0).astype(np.int64))
    d[place] = d[place] - logits.dtype.type(1 - smoothing)
    shares = cupy.asarray((counted / max(int(counted.sum()), 1)).astype(logits.dtype))
    return d * (shares[:, None] * g), None, None


def soft_cross_entropy_backward(g: Array, saved: None, logits: Array, target: Any) -> tuple[Any, ...]:
    """dlogits = g (softmax(logits) sum(target) - target) / n."""
    target = cupy.asarray(target, logits.dtype)
    d = _softmax(logits) * target.sum(1, keepdims=True) - target
    return d * (g / logits.dtype.type(len(logits))), None


def _softmax(x: Array) -> Array:
    powers = cupy.exp(x - x.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def mean_patches_backward(g: Array, saved: None, x: Array) -> tuple[Any, ...]:
    """As `backward.mean_patches_backward`."""
    dx = cupy.zeros_like(x)
    dx[:, 1:] = (g / g.dtype.type(x.shape[1] - 1))[:, None]
    return (dx,)


def part_backward(g: Array, saved: None, x: Array, index: Any) -> tuple[Any, ...]:
    """As `backward.part_backward`."""
    dx = cupy.zeros_like(x)
    dx[index] = g
    return dx, None


masked_patches_backward = part_backward
