"""Backward of layer norm, the linear layers and attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ...params import Attention, Conv, LayerNorm, Linear
from .. import reference
from ..activations import ACTIVATIONS
from .activations import derivative
from .arrays import total

__all__ = [
    "attention_backward",
    "layer_norm_backward",
    "linear_activation_backward",
    "linear_activation_forward",
    "linear_backward",
    "linear_residual_backward",
    "project_qkv_backward",
]


def layer_norm_backward(
    g: np.ndarray, saved: None, x: np.ndarray, norm: LayerNorm, eps: float
) -> tuple[np.ndarray, LayerNorm, None]:  # (..., D)
    """With r = 1 / sqrt(var + eps), h = (x - mean) r and a = g weight, means taken over the last axis:

    dx = r (a - mean(a) - h mean(a h)),  dweight = sum of g h,  dbias = sum of g, over all rows.
    In float64: where a token's spread is small, the three terms of dx nearly cancel.
    """
    centred = x.astype(np.float64, copy=False)
    centred = centred - centred.mean(-1, keepdims=True)
    r = 1 / np.sqrt(np.square(centred).mean(-1, keepdims=True) + eps)
    h = centred * r
    a = g * norm.weight.astype(np.float64, copy=False)
    dx = r * (a - a.mean(-1, keepdims=True) - h * (a * h).mean(-1, keepdims=True))
    rows = tuple(range(g.ndim - 1))
    d_weight = (g * h).sum(rows).astype(x.dtype, copy=False)
    return dx.astype(x.dtype, copy=False), LayerNorm(d_weight, total(g, rows)), None


def linear_backward(
    g: np.ndarray, saved: None, x: np.ndarray, layer: Linear | Conv
) -> tuple[np.ndarray, Any]:  # (..., out) -> (..., in), the layer
    """dx = g W,  dW = g^T x,  db = sum of g; the rows of g and x being all tokens of the batch."""
    rows, inputs = _rows(g), _rows(x)
    weight = layer.weight.reshape(len(layer.weight), -1)
    dbias = None if layer.bias is None else total(rows, 0)
    return (rows @ weight).reshape(x.shape), type(layer)((rows.T @ inputs).reshape(layer.weight.shape), dbias)


def linear_activation_forward(
    x: np.ndarray, layer: Linear, activation: str
) -> tuple[np.ndarray, np.ndarray]:  # (..., in) -> (..., out), (..., out)
    """(f(z), z) with z = x W^T + b: keeping z spares the backward a product."""
    z = reference.linear(x, layer)
    return ACTIVATIONS[activation](z), z


def linear_activation_backward(
    g: np.ndarray, saved: np.ndarray, x: np.ndarray, layer: Linear, activation: str
) -> tuple[np.ndarray, Any, None]:
    """That of the linear layer for the cotangent g f'(z)."""
    return (*linear_backward(g * derivative(activation, saved), None, x, layer), None)


def linear_residual_backward(
    g: np.ndarray,
    saved: None,
    x: np.ndarray,
    layer: Linear,
    scale: np.ndarray | None,
    residual: np.ndarray,
    keep: np.ndarray | None = None,
) -> tuple[np.ndarray, Linear, np.ndarray | None, np.ndarray]:
    """With a = g keep, G = a^T x and s = sum of a:

    dx = (a scale) W,  dW = scale G,  db = scale s,  dscale = rowsum(G W) + b s,  dresidual = g.
    The last form of dscale needs no y = x W^T + b, so that nothing has to be kept for it.
    """
    a = g if keep is None else g * keep
    if scale is None:
        return (*linear_backward(a, None, x, layer), None, g)
    rows = _rows(a)
    G, s = rows.T @ _rows(x), total(rows, 0)
    dscale = total(G * layer.weight, 1) + (0 if layer.bias is None else layer.bias * s)
    dbias = None if layer.bias is None else scale * s
    dx = ((rows * scale) @ layer.weight).reshape(x.shape)
    return dx, Linear(scale[:, None] * G, dbias), dscale, g


def project_qkv_backward(
    g: tuple[np.ndarray, np.ndarray, np.ndarray], saved: None, x: np.ndarray, p: Attention, num_heads: int
) -> tuple[np.ndarray, Attention, None]:  # 3 x (B, H, N, d) -> (B, N, D)
    """The sum of the three linear layers' dx, and each layer's own gradient."""
    dx, grads = None, []
    for part, layer in zip(g, (p.query, p.key, p.value), strict=True):
        columns = part.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[1], -1)  # (B, N, D), heads concatenated
        more, grad = linear_backward(columns, None, x, layer)
        dx = more if dx is None else dx + more
        grads.append(grad)
    query, key, value = grads
    return dx, Attention(query, key, value, output=None), None  # type: ignore[arg-type, return-value]


def attention_backward(
    g: Any,
    saved: None,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: Any | None,
    return_probs: bool = False,
    keep: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any]:  # (B, N, D) -> 3 x (B, H, N, d), the bias
    """For each head, with P = softmax(S), S = q k^T / sqrt(d) + bias, and g the head's columns:

    dv = (P keep)^T g,  dP = (g v^T) keep,  dS = P (dP - rowsum(P dP)),  dq = dS k / sqrt(d),  dk = dS^T q / sqrt(d),
    dtable[r] = sum of dS over all images and all pairs of tokens whose row of the table is r.
    P is computed again from q and k, so that one (B, N, N) block is alive at a time and nothing is saved.
    """
    g, g_probs = g if return_probs else (g, None)
    B, H, N, d = q.shape
    g = np.zeros((B, N, H, d), q.dtype) if g is None else g.reshape(B, N, H, d)
    scale = q.dtype.type(d**-0.5)
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    dtable = None if bias is None else np.empty_like(bias.table)
    index = None if bias is None else reference.cached_index(bias.grid)
    for h in range(H):
        scores = (q[:, h] * scale) @ k[:, h].swapaxes(1, 2)  # (B, N, N)
        if bias is not None:
            scores += bias.table[:, h][index]
        probs = reference.softmax(scores)
        g_head = g[:, :, h]
        d_probs = g_head @ v[:, h].swapaxes(1, 2)
        dropped = probs
        if keep is not None:
            d_probs *= keep[:, h]
            dropped = probs * keep[:, h]
        if g_probs is not None:
            d_probs += g_probs[:, h]
        dv[:, h] = dropped.swapaxes(1, 2) @ g_head
        d_scores = probs * (d_probs - (d_probs * probs).sum(-1, keepdims=True))
        dq[:, h] = d_scores @ k[:, h] * scale
        dk[:, h] = d_scores.swapaxes(1, 2) @ q[:, h] * scale
        if dtable is not None and index is not None:
            pairs = d_scores.sum(0, dtype=np.float64)  # (N, N)
            dtable[:, h] = np.bincount(index.ravel(), pairs.ravel(), len(dtable))  # adds in the order of the pairs
    return dq, dk, dv, None if bias is None else replace(bias, table=dtable)


def _rows(x: np.ndarray) -> np.ndarray:  # (..., n) -> (rows, n)
    return x.reshape(-1, x.shape[-1])
