"""Every op of the seam, defined in NumPy.  Fast backends have the same names and signatures and are tested against
these.  All keep the dtype of their input (float32 or float64) and change no argument.

Letters: B batch, N tokens, D width, H heads, d head size, K classes, R rows of the bias table, C channels, h x w map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from ..params import BATCH_NORM_EPS, Attention, BatchNorm, Conv, ConvBatchNorm, ConvTranspose, LayerNorm, Linear
from .activations import ACTIVATIONS, gelu
from .glue import add, dropout, first_token, mask_tokens, mean_patches, recompute, tokens_to_map

__all__ = [
    "adaptive_avg_pool",
    "add",
    "all_finite",
    "arange",
    "asarray",
    "attention",
    "bce_with_logits",
    "concatenate",
    "conv2d",
    "conv_bn_relu",
    "conv_bn_relu_resized",
    "conv_transpose",
    "conv_transpose_bn_gelu",
    "cross_entropy",
    "deferred",
    "dropout",
    "dump",
    "first_token",
    "layer_norm",
    "linear",
    "linear_activation",
    "linear_residual",
    "mask_tokens",
    "max_pool2x2",
    "mean_patches",
    "mse_loss",
    "num_threads",
    "prepare",
    "project_qkv",
    "recompute",
    "resize_bicubic",
    "resize_bilinear",
    "restore",
    "soft_cross_entropy",
    "stage",
    "to_host",
    "tokens_to_map",
    "zeros",
]

# Arrays -------------------------------------------------------------------------------------------------------------


def prepare(params: Any) -> Any:
    """The parameters as this backend wants them; here as they are.  Fast backends pack, join and fold once."""
    return params


def dump(params: Any) -> tuple[str, dict[str, np.ndarray]]:
    """(layout, {name: array}) of what `prepare` made, for a file.  Raises ValueError where it makes nothing."""
    raise ValueError("this backend prepares nothing that could be stored; use the backend 'numba'")


def restore(shapes: Any, layout: str, arrays: Mapping[str, np.ndarray]) -> Any:
    """What `prepare` would make of a model with these `shapes`, from what `dump` gave.  Raises ValueError."""
    raise ValueError(f"was prepared as '{layout}', which this backend cannot read; load the original checkpoint")


def num_threads(count: int | None) -> AbstractContextManager[Any]:
    """Context in which ops use `count` threads; here it does nothing, since NumPy follows its BLAS's settings."""
    return nullcontext()


def deferred(wanted: bool = True) -> AbstractContextManager[Any]:
    """Context in which, if `wanted`, only ops look into arrays, so that ops may run when it ends; here they do not."""
    return nullcontext()


def stage(x: Any, dtype: str) -> np.ndarray:
    """What a caller gave as an array of that dtype that can be checked where it is; `asarray` then takes it in."""
    return np.asarray(x, dtype=dtype)


def asarray(x: Any, dtype: str) -> np.ndarray:
    """`x` as an array of this backend with that dtype; not copied if it is one already."""
    return np.asarray(x, dtype=dtype)


def to_host(x: np.ndarray) -> np.ndarray:
    """`x` as a NumPy array in main memory."""
    return x


def arange(stop: int) -> np.ndarray:
    """The integers 0 to stop - 1 as int32."""
    return np.arange(stop, dtype=np.int32)


def zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array of zeros."""
    return np.zeros(shape, dtype)


def concatenate(arrays: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """The arrays one after another along `axis`; a first axis of size 1 is broadcast, unless it is `axis` itself."""
    if axis != 0:
        batch = max(array.shape[0] for array in arrays)
        arrays = [np.broadcast_to(array, (batch, *array.shape[1:])) for array in arrays]
    return np.concatenate(arrays, axis)


def all_finite(x: np.ndarray) -> bool:
    """Whether no element is NaN or infinite."""
    return bool(np.isfinite(x).all())


# The transformer ----------------------------------------------------------------------------------------------------


def layer_norm(x: np.ndarray, norm: LayerNorm, eps: float) -> np.ndarray:  # (..., D) -> (..., D)
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, var being the mean square deviation.

    Source: Ba et al. 2016.
    """
    centred = x - x.mean(-1, keepdims=True)
    var = np.square(centred).mean(-1, keepdims=True)
    return centred / np.sqrt(var + x.dtype.type(eps)) * norm.weight + norm.bias


def linear(x: np.ndarray, layer: Linear | Conv) -> np.ndarray:  # (..., in) -> (..., out)
    """x W^T + b.  A patch convolution is a linear layer on flattened patches, so its 4-D weight is flattened."""
    weight = layer.weight.reshape(layer.weight.shape[0], -1)  # (out, in)
    y = x.reshape(-1, x.shape[-1]) @ weight.T  # one product for the whole batch
    if layer.bias is not None:
        y += layer.bias
    return y.reshape(*x.shape[:-1], -1)


def linear_activation(x: np.ndarray, layer: Linear, activation: str) -> np.ndarray:  # (..., in) -> (..., out)
    """f(x W^T + b), f being named as in a config's `hidden_act`."""
    return ACTIVATIONS[activation](linear(x, layer))


def linear_residual(
    x: np.ndarray, layer: Linear, scale: np.ndarray | None, residual: np.ndarray, keep: np.ndarray | None = None
) -> np.ndarray:  # (..., in) -> (..., out)
    """residual + keep * scale * (x W^T + b), the end of both halves of a block.

    scale (out,) is the layer scale, if any; `keep` the factors of dropout and stochastic depth, which may be broadcast.
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
    """exp(x) / sum exp(x) over the last axis, after subtracting the largest so that exp cannot overflow.

    In float64: NumPy's float32 exp is off by up to 1.5 rounding steps, twice as much as other libraries'.
    """
    e = np.exp(x - x.max(-1, keepdims=True), dtype=np.float64)
    e /= e.sum(-1, keepdims=True)
    return e.astype(x.dtype, copy=False)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: Any | None,
    return_probs: bool = False,
    keep: np.ndarray | None = None,
) -> Any:  # 3 x (B, H, N, d) -> (B, N, D)
    """softmax(q k^T / sqrt(d) + bias) v for every head; the heads side by side are the D columns of the result.

    `bias` is a `PositionBias` (bias[h, a, b] = table[index[a, b], h]) or None; it is added after the scaling.
    `keep` (B, H, N, N) multiplies the probabilities (dropout).  With `return_probs` the result is (context, probs),
    probs (B, H, N, N) before `keep`.  Goes head by head: one (B, N, N) block of scores is alive at a time.
    Source: BEiT section 3.1; Raffel et al. 2020 for the additive bias.
    """
    B, H, N, d = q.shape
    context = np.empty((B, N, H, d), q.dtype)
    all_probs = np.empty((B, H, N, N), q.dtype) if return_probs else None
    for h in range(H):
        scores = (q[:, h] * q.dtype.type(d**-0.5)) @ k[:, h].swapaxes(1, 2)  # (B, N, N)
        if bias is not None:
            scores += bias.table[:, h][bias.index]
        probs = softmax(scores)
        if all_probs is not None:
            all_probs[:, h] = probs
        if keep is not None:
            probs *= keep[:, h]
        context[:, :, h] = probs @ v[:, h]
    context = context.reshape(B, N, H * d)
    return context if all_probs is None else (context, all_probs)


# Maps: (B, C, h, w) -------------------------------------------------------------------------------------------------


def conv2d(x: np.ndarray, conv: Conv) -> np.ndarray:  # (B, C, h, w) -> (B, out, h, w)
    """Convolution of odd kernel k, stride 1, zero padding k // 2: the sum over kernel taps of shifted 1x1 products."""
    out, C, kh, kw = conv.weight.shape
    B, _, h, w = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2))) if kh * kw > 1 else x
    y = np.zeros((B, out, h * w), x.dtype)
    for i in range(kh):
        for j in range(kw):
            y += conv.weight[:, :, i, j] @ padded[:, :, i : i + h, j : j + w].reshape(B, C, h * w)
    if conv.bias is not None:
        y += conv.bias[:, None]
    return y.reshape(B, out, h, w)


def batch_norm(x: np.ndarray, bn: BatchNorm) -> np.ndarray:  # (B, C, h, w) -> (B, C, h, w)
    """(x - running_mean) / sqrt(running_var + 1e-5) * weight + bias per channel (inference form)."""
    scale = bn.weight / np.sqrt(bn.running_var + x.dtype.type(BATCH_NORM_EPS))
    y = x - bn.running_mean[:, None, None]
    y *= scale[:, None, None]
    y += bn.bias[:, None, None]
    return y


def conv_bn_relu(x: np.ndarray, layer: ConvBatchNorm) -> np.ndarray:  # (B, C, h, w) -> (B, out, h, w)
    """max(0, batch norm(conv(x)))."""
    y = batch_norm(conv2d(x, layer.conv), layer.bn)
    return np.maximum(y, 0, out=y)


def conv_bn_relu_resized(
    maps: Sequence[np.ndarray], layer: ConvBatchNorm, size: tuple[int, int]
) -> np.ndarray:  # k x (B, Ci, hi, wi) -> (B, out, h, w)
    """`conv_bn_relu` of the concatenation of `maps`, each resized bilinearly to `size`.

    One op, because convolution and resizing commute: a fast backend convolves the small maps before enlarging them.
    """
    return conv_bn_relu(concatenate([resize_bilinear(x, size) for x in maps], axis=1), layer)


def conv_transpose(x: np.ndarray, deconv: ConvTranspose) -> np.ndarray:  # (B, C, h, w) -> (B, out, 2h, 2w)
    """Transposed convolution, kernel 2, stride 2: every pixel becomes a 2x2 square of its own."""
    B, C, h, w = x.shape
    out = deconv.weight.shape[1]
    y = deconv.weight.reshape(C, -1).T @ x.reshape(B, C, h * w)  # (B, out * 4, h w)
    y = y.reshape(B, out, 2, 2, h, w).transpose(0, 1, 4, 2, 5, 3)  # (B, out, h, 2, w, 2)
    return y.reshape(B, out, 2 * h, 2 * w) + deconv.bias[:, None, None]


def conv_transpose_bn_gelu(
    x: np.ndarray, deconv: ConvTranspose, bn: BatchNorm
) -> np.ndarray:  # (B, C, h, w) -> (B, out, 2h, 2w)
    """gelu(batch norm(conv_transpose(x)))."""
    return gelu(batch_norm(conv_transpose(x, deconv), bn))


def max_pool2x2(x: np.ndarray) -> np.ndarray:  # (B, C, h, w) -> (B, C, h // 2, w // 2)
    """The largest of every 2x2 square; an odd last row or column is left out."""
    B, C, h, w = x.shape
    return x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(B, C, h // 2, 2, w // 2, 2).max((3, 5))


def adaptive_avg_pool(x: np.ndarray, size: int) -> np.ndarray:  # (B, C, h, w) -> (B, C, size, size)
    """Means over size x size cells; cell i of n spans floor(i n / size) to ceil((i + 1) n / size), so cells overlap."""
    B, C, h, w = x.shape
    y = np.empty((B, C, size, size), x.dtype)
    for i in range(size):
        for j in range(size):
            rows = slice(i * h // size, -(-(i + 1) * h // size))
            columns = slice(j * w // size, -(-(j + 1) * w // size))
            y[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return y


def resize_bilinear(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:  # (B, C, h, w) -> (B, C, *size)
    """Bilinear interpolation, pixel centres at half integers (align_corners=False), no antialiasing.

    Source position of target i: max(0, (i + 1/2) old / new - 1/2).
    """
    return _resize(x, size, _bilinear_taps)


def resize_bicubic(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:  # (B, C, h, w) -> (B, C, *size)
    """Bicubic convolution with A = -0.75, align_corners=False, no antialiasing, edges repeated.

    Source: Keys 1981; A as in PyTorch's interpolate.
    """
    return _resize(x, size, _bicubic_taps)


def _resize(x: np.ndarray, size: tuple[int, int], taps: Any) -> np.ndarray:
    """Interpolates rows, then columns: each target is a weighted sum of the sources that `taps` names."""
    for axis, new in ((2, size[0]), (3, size[1])):
        old = x.shape[axis]
        if old == new:
            continue
        shape = [1, 1, 1, 1]
        shape[axis] = new
        parts = (np.take(x, index, axis) * weight.astype(x.dtype).reshape(shape) for index, weight in taps(old, new))
        y = next(parts)
        for part in parts:
            y += part
        x = y
    return x


def _bilinear_taps(old: int, new: int) -> list[tuple[np.ndarray, np.ndarray]]:
    position = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    first = position.astype(int)
    t = position - first
    return [(first, 1 - t), (np.minimum(first + 1, old - 1), t)]


def _bicubic_taps(old: int, new: int) -> list[tuple[np.ndarray, np.ndarray]]:
    A = -0.75
    position = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(position).astype(int)
    taps = []
    for step in (-1, 0, 1, 2):
        s = np.abs(position - first - step)  # distance to the source
        near = ((A + 2) * s - (A + 3)) * s * s + 1
        far = ((A * s - 5 * A) * s + 8 * A) * s - 4 * A
        taps.append((np.clip(first + step, 0, old - 1), np.where(s <= 1, near, far)))
    return taps


# Losses -------------------------------------------------------------------------------------------------------------


def cross_entropy(
    logits: np.ndarray, labels: np.ndarray, ignore_index: int, smoothing: float = 0.0
) -> np.ndarray:  # (n, K), (n,) -> ()
    """Mean of -log softmax(logits)[label] over the labels that are not `ignore_index`; NaN if there are none.

    With `smoothing` s the target of a row is 1 - s for its label plus s / K for every class.

    Raises ValueError for a label outside 0 to K - 1.
    """
    K = logits.shape[1]
    counted = labels != ignore_index
    logits, labels = logits[counted], labels[counted]
    if labels.size and not (labels.min() >= 0 and labels.max() < K):
        wrong = labels[(labels < 0) | (labels >= K)][0]
        raise ValueError(f"labels: expected class numbers 0 to {K - 1} (or {ignore_index} to ignore), found {wrong}")
    if not labels.size:
        return np.array(np.nan, logits.dtype)
    shifted = logits - logits.max(1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(1))
    own = shifted[np.arange(len(labels)), labels]
    if smoothing:
        own = (1 - logits.dtype.type(smoothing)) * own + logits.dtype.type(smoothing) * shifted.mean(1)
    return (log_sums - own).mean()


def soft_cross_entropy(logits: np.ndarray, target: np.ndarray) -> np.ndarray:  # (n, K), (n, K) -> ()
    """Mean over rows of -sum target log softmax(logits); a row's targets need not be 0 and 1 (mixup, cutmix)."""
    shifted = logits - logits.max(1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(1, keepdims=True))
    return (target.astype(logits.dtype) * (log_sums - shifted)).sum(1).mean()


def mse_loss(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:  # (...), (...) -> ()
    """Mean of (prediction - target)^2."""
    return np.square(prediction - target.astype(prediction.dtype)).mean()


def bce_with_logits(logits: np.ndarray, target: np.ndarray) -> np.ndarray:  # (...), (...) -> ()
    """Mean binary cross-entropy of sigmoid(logits) against targets in [0, 1], in a form that cannot overflow."""
    target = target.astype(logits.dtype)
    return (np.maximum(logits, 0) - logits * target + np.log1p(np.exp(-np.abs(logits)))).mean()
