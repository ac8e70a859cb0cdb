"""The ops of the transformer."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ...params import Attention, Conv, LayerNorm, Linear
from ..activations import ACTIVATIONS
from ..low_precision import LOW, low_linear, rounded
from ..table import PositionBias
from .arrays import relative_position_index


def mask_tokens(
    x: np.ndarray, mask: np.ndarray, mask_token: np.ndarray
) -> np.ndarray:  # (B, P, D), (B, P), (1, 1, D) -> (B, P, D)
    """The patch tokens, with those that the boolean mask marks replaced by the mask token.

    Source: BEiT section 2.3.
    """
    w = mask[:, :, None].astype(x.dtype)
    return x * (1 - w) + mask_token * w


def add(x: np.ndarray, y: np.ndarray) -> np.ndarray:  # (...), (...) -> (...)
    """x + y, broadcast."""
    return x + y


def dropout(x: np.ndarray, keep: np.ndarray) -> np.ndarray:  # (...), (...) -> (...)
    """x * keep; `keep` holds 0 for what is dropped and 1 / (1 - rate) elsewhere.  Source: Srivastava et al. 2014."""
    return x * keep


def layer_norm(x: np.ndarray, norm: LayerNorm, eps: float) -> np.ndarray:  # (..., D) -> (..., D)
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis; var divides by D.

    Source: Ba et al. 2016.
    """
    centred = x - x.mean(-1, keepdims=True)
    var = np.square(centred).mean(-1, keepdims=True)
    return centred / np.sqrt(var + x.dtype.type(eps)) * norm.weight + norm.bias


def linear(x: np.ndarray, layer: Linear | Conv) -> np.ndarray:  # (..., in) -> (..., out)
    """x W^T + b.  The patch convolution is a linear layer on flattened patches; its 4-D weight is flattened too.

    A layer of low precision: see `low_precision`.
    """
    if isinstance(layer, LOW):
        return low_linear(x, layer)
    weight = layer.weight.reshape(layer.weight.shape[0], -1)  # (out, in)
    y = x.reshape(-1, x.shape[-1]) @ weight.T  # one product for the whole batch
    if layer.bias is not None:
        y += layer.bias
    return y.reshape(*x.shape[:-1], -1)


def linear_activation(x: np.ndarray, layer: Linear, activation: str) -> np.ndarray:  # (..., in) -> (..., out)
    """f(x W^T + b), with f named as in a config's `hidden_act`."""
    return ACTIVATIONS[activation](linear(x, layer))


def linear_residual(
    x: np.ndarray,
    layer: Linear,
    scale: np.ndarray | None,
    residual: np.ndarray,
    keep: np.ndarray | None = None,
) -> np.ndarray:  # (..., in) -> (..., out)
    """residual + keep * scale * (x W^T + b), the last step of both halves of a block.

    `scale` (out,) is the layer scale, if any; `keep` holds the factors of dropout and stochastic depth in training and
    broadcasts to the result.
    """
    y = linear(x, layer)
    if scale is not None:
        y *= scale
    if keep is not None:
        y *= keep
    y += residual
    return y


def project_qkv(
    x: np.ndarray, p: Attention, num_heads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # (B, N, D) -> 3 x (B, H, N, d)
    """Queries, keys and values of every head.  Keys have no bias."""
    B, N, _ = x.shape
    q, k, v = (
        linear(x, layer).reshape(B, N, num_heads, -1).transpose(0, 2, 1, 3) for layer in (p.query, p.key, p.value)
    )
    return q, k, v


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum exp(x) over the last axis, after subtracting the maximum so that exp cannot overflow.

    Computed in float64: NumPy's float32 exp is off by up to 1.5 rounding steps, twice as much as other libraries'.
    """
    e = np.exp(x - x.max(-1, keepdims=True), dtype=np.float64)
    e /= e.sum(-1, keepdims=True)
    return e.astype(x.dtype, copy=False)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: PositionBias | None,
    return_probs: bool = False,
    keep: np.ndarray | None = None,
) -> Any:  # 3 x (B, H, N, d) -> (B, N, D)
    """softmax(q k^T / sqrt(d) + bias) v for every head, concatenated along the last axis.

    bias[h, a, b] = table[index[a, b], h], with the index of `relative_position_index`, is added after the scaling.
    `keep` (B, H, N, N) multiplies the probabilities (dropout).  With `return_probs` the result is (context, probs),
    probs (B, H, N, N) before `keep`.  Computed head by head, so only one (B, N, N) array of scores exists at a time.
    Source: BEiT appendix A; Raffel et al. 2020 for the additive bias.
    """
    table, index = (None, None) if bias is None else (bias.table, cached_index(bias.grid))
    return attend(q, k, v, table, index, return_probs, keep)


def attention_of_low_precision(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: PositionBias | None,
    return_probs: bool = False,
    keep: np.ndarray | None = None,
) -> Any:  # 3 x (B, H, N, d) -> (B, N, D)
    """`attention` in the dtypes of `low_precision`: queries, scaled keys, values and exponentials are rounded to
    bfloat16 before they are multiplied; sums, bias, maxima and the softmax's denominator are float32.

    Probabilities that are returned, or multiplied by `keep`, are not rounded.
    """
    if return_probs or keep is not None:
        return attention(q, k, v, bias, return_probs, keep)
    B, H, N, d = q.shape
    context = np.empty((B, N, H, d), q.dtype)
    for h in range(H):
        scaled = rounded(k[:, h] * q.dtype.type(d**-0.5))
        scores = rounded(q[:, h]) @ scaled.swapaxes(1, 2)  # (B, N, N)
        if bias is not None:
            scores += bias.table[:, h][cached_index(bias.grid)]
        e = np.exp(scores - scores.max(-1, keepdims=True))
        context[:, :, h] = rounded(e) @ rounded(v[:, h]) / e.sum(-1, keepdims=True)
    return context.reshape(B, N, H * d)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    table: np.ndarray | None,
    index: np.ndarray | None,
    return_probs: bool = False,
    keep: np.ndarray | None = None,
) -> Any:  # 3 x (B, H, N, d), (R, H), (N, N) -> (B, N, D)
    """`attention` with the bias table[index[a, b], h] for an arbitrary index."""
    B, H, N, d = q.shape
    context = np.empty((B, N, H, d), q.dtype)
    all_probs = np.empty((B, H, N, N), q.dtype) if return_probs else None
    for h in range(H):
        scores = (q[:, h] * q.dtype.type(d**-0.5)) @ k[:, h].swapaxes(1, 2)  # (B, N, N)
        if table is not None:
            scores += table[:, h][index]
        probs = softmax(scores)
        if all_probs is not None:
            all_probs[:, h] = probs
        if keep is not None:
            probs *= keep[:, h]
        context[:, :, h] = probs @ v[:, h]
    context = context.reshape(B, N, H * d)
    return context if all_probs is None else (context, all_probs)


@lru_cache(maxsize=4)
def cached_index(grid: tuple[int, int]) -> np.ndarray:  # -> (N, N) int32
    """`relative_position_index`, kept for the last few grids; read-only."""
    index = relative_position_index(grid)
    index.setflags(write=False)  # every caller gets the same array
    return index


def mean_patches(x: np.ndarray) -> np.ndarray:  # (B, N, D) -> (B, D)
    """The mean over the patch tokens, without CLS; in float64, since a float32 sum over tokens would lose two bits."""
    return x[:, 1:].mean(1, dtype=np.float64).astype(x.dtype, copy=False)
