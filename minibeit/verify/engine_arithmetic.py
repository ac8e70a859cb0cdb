"""float32 as engines compute it: sums one after the other, source positions of a resize and the GELU in float32.

The NumPy reference adds the tokens' mean in float64 and places the sources of a resize in float64.  PyTorch and ONNX
Runtime do both in float32, which costs up to thirty times as much, and are right to.  A yardstick has to do as they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ops import reference
from ..ops.erf import erf
from ..ops.short_winograd import short_conv

if TYPE_CHECKING:
    from .float64_model import Call

GELUS = ("gelu", "gelu_python")
DRAWS = 16  # orders of summation that a result of few rows is measured with
FEW_ROWS = 8
MOST_ELEMENTS = 1 << 14  # of a result; more are no longer one draw


def mean_patches(x: np.ndarray) -> np.ndarray:  # (B, N, D) -> (B, D)
    """`reference.mean_patches`, added up token by token in float32."""
    return _in_order(x[:, 1:], 1) / x.dtype.type(x.shape[1] - 1)


def linear_activation(x: np.ndarray, layer: Any, activation: str) -> np.ndarray:  # (..., in) -> (..., out)
    """`reference.linear_activation`, the GELU as y times a rounded share (1 + erf(y / sqrt(2))) / 2.

    The reference avoids that sum, which loses all digits of a small share.
    """
    if activation not in GELUS:
        return reference.linear_activation(x, layer, activation)
    y = reference.linear(x, layer)
    return y * ((erf(y * y.dtype.type(0.5**0.5)) + y.dtype.type(1)) * y.dtype.type(0.5))


def bilinear_taps(old: int, new: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """`reference.bilinear_taps` with source positions in float32."""
    position = np.maximum(_positions(old, new), np.float32(0))
    first = position.astype(int)
    t = position - first.astype(np.float32)
    return [(np.minimum(first, old - 1), 1 - t), (np.minimum(first + 1, old - 1), t)]


def resize_bicubic(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:  # (B, C, h, w) -> (B, C, *size)
    """`reference.resize_bicubic` with source positions in float32."""
    return reference.interpolated(x, size, _bicubic_taps)


def resize_bilinear(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:  # (B, C, h, w) -> (B, C, *size)
    """`reference.resize_bilinear` with source positions in float32."""
    return reference.interpolated(x, size, bilinear_taps)


def draws(calls: list[Call]) -> Iterator[np.ndarray]:
    """Results of the same ops in float32, each added up one after the other in another random order.

    Nothing for results of many rows, whose root mean square is steady, and for ops without sums of this kind.  Equal
    rows, such as those of masked patches, are one.
    """
    steps = [call for call in calls if call.op in ORDERED]
    if not steps or len(steps) != len([call for call in calls if call.op not in EXACT]):
        return
    result = steps[-1].result
    if steps[0].op == "layer_norm" and len(steps) == 1 and result.ndim > 2:
        yield from _norms_of_equal_rows(*steps[0].args)
        return
    if result.ndim != 2 or result.shape[0] > FEW_ROWS or result.size > MOST_ELEMENTS:
        return
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        x = _single(steps[0].args[0])
        for call in steps:
            x = ORDERED[call.op](rng, x, *call.args[1:])
        yield x


def _norms_of_equal_rows(x: np.ndarray, norm: Any, eps: float) -> Iterator[np.ndarray]:
    rows = _single(x).reshape(-1, x.shape[-1])
    same = np.round(rows / max(float(np.abs(rows).max(initial=0)), 1e-30), 5)
    if len(np.unique(same[: 8 * FEW_ROWS], axis=0)) > FEW_ROWS:
        return
    _, first, place = np.unique(same, axis=0, return_index=True, return_inverse=True)
    if len(first) > FEW_ROWS or first.size * rows.shape[1] > MOST_ELEMENTS:
        return
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        yield _shuffled_norm(rng, rows[first], norm, eps)[place.reshape(-1)].reshape(x.shape)


# One op in one random order -----------------------------------------------------------------------------------------


def _shuffled_mean(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    order = np.concatenate([[0], 1 + rng.permutation(x.shape[1] - 1)])
    return mean_patches(x[:, order])


def _shuffled_norm(rng: np.random.Generator, x: np.ndarray, norm: Any, eps: float) -> np.ndarray:
    order, D = rng.permutation(x.shape[1]), np.float32(x.shape[1])
    centred = x - (_in_order(x[:, order], 1) / D)[:, None]
    var = _in_order(np.square(centred[:, order]), 1) / D
    return centred / np.sqrt(var + np.float32(eps))[:, None] * _single(norm.weight) + _single(norm.bias)


def _shuffled_linear(rng: np.random.Generator, x: np.ndarray, layer: Any) -> np.ndarray:
    order = rng.permutation(x.shape[1])
    weight = np.ascontiguousarray(_single(layer.weight).T[order])  # (in, out)
    y = np.stack([_in_order((weight * row[order, None])[None], 1)[0] for row in x])
    return y if layer.bias is None else y + _single(layer.bias)


ORDERED: dict[str, Callable[..., np.ndarray]] = {
    "mean_patches": _shuffled_mean,
    "layer_norm": _shuffled_norm,
    "linear": _shuffled_linear,
}
EXACT = ("to_dtype", "concatenate", "slice")


def in_another_order(ops: dict[str, Any], seed: int) -> dict[str, Any]:
    """The linear layers and attention of a model's ops, each adding up the terms of a product in a random order."""
    rng = np.random.default_rng(seed)

    def product(op: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def call(x: np.ndarray, layer: Any, *rest: Any, **options: Any) -> np.ndarray:
            order = rng.permutation(x.shape[-1])
            weight = layer.weight.reshape(len(layer.weight), -1)[:, order]
            return op(x[..., order], replace(layer, weight=np.ascontiguousarray(weight)), *rest, **options)

        return call

    def attention(q: np.ndarray, k: np.ndarray, *rest: Any, **options: Any) -> Any:
        order = rng.permutation(q.shape[-1])
        return ops["attention"](q[..., order], k[..., order], *rest, **options)

    products = ("linear", "linear_activation", "linear_residual")
    return {**{name: product(ops[name]) for name in products}, "attention": attention}


def _in_order(x: np.ndarray, axis: int) -> np.ndarray:
    """The sum along an axis, one term after the other."""
    return np.add.accumulate(x, axis=axis, dtype=x.dtype).take(-1, axis)


def _single(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32)


# Resizing -----------------------------------------------------------------------------------------------------------


def _positions(old: int, new: int) -> np.ndarray:
    scale = np.float32(old) / np.float32(new)
    return (np.arange(new, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)


def _bicubic_taps(old: int, new: int) -> list[tuple[np.ndarray, np.ndarray]]:
    A = np.float32(-0.75)
    position = _positions(old, new)
    first = np.floor(position)
    t = position - first
    taps = []
    for step in (-1, 0, 1, 2):
        s = np.abs(t - np.float32(step))
        near = ((A + 2) * s - (A + 3)) * s * s + 1
        far = ((A * s - 5 * A) * s + 8 * A) * s - 4 * A
        index = np.clip(first.astype(int) + step, 0, old - 1)
        taps.append((index, np.where((step == 0) | (step == 1), near, far)))
    return taps


# Attending ----------------------------------------------------------------------------------------------------------


def attended(calls: list[Call], probs: bool) -> Iterator[np.ndarray]:
    """Probabilities or contexts of small attention maps in float32, the scores added up in random orders.

    A few large probabilities make up such a map's rms, and an error of a score is multiplied by its exponential: one
    draw of NumPy's may be lucky.  The scores are scaled after the product and the softmax adds in float32, as in
    engines.  Nothing for large maps and other ops.
    """
    call = next((call for call in reversed(calls) if call.op == "attention"), None)
    if call is None or call.args[0].size * call.args[0].shape[2] > MOST_PRODUCTS:
        return
    q, k, v = map(_single, call.args[:3])
    bias, d = call.args[3], q.shape[3]
    added = 0 if bias is None else _single(bias.table).T[:, reference.relative_position_index(bias.grid)]
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        order = rng.permutation(d)
        scores = _in_order(q[:, :, :, None, order] * k[:, :, None, :, order], -1) * np.float32(d**-0.5) + added
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        p = powers / _in_order(powers, -1)[..., None]
        yield p if probs else (p @ v).transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)


# Convolving ---------------------------------------------------------------------------------------------------------

CONVOLUTIONS = ("conv2d", "relu_conv2d", "relu_conv2d_residual")
MOST_PRODUCTS = 1 << 18  # that are held to be added up in order; the rms of larger arrays is no longer one draw


def convolved(calls: list[Call]) -> np.ndarray | None:
    """What a tokenizer's convolution gives in float32 as engines may do it; None for other ops and sizes.

    3x3 behind a ReLU: by Winograd's method, which loses a few times as much as NumPy's sums, up to fourteen times on
    maps smaller than its tiles.  1x1 on small maps: channel after channel.
    """
    call = next((call for call in reversed(calls) if call.op in CONVOLUTIONS), None)
    if call is None:
        return None
    x, conv, *rest = call.args
    x, kernel = _single(x), conv.weight.shape[2]
    x = x if call.op == "conv2d" else np.maximum(x, 0)
    if kernel == 3 and call.op != "conv2d":
        y = short_conv(x, _single(conv.weight), lambda x: x)
    elif kernel == 1 and x.size * len(conv.weight) <= MOST_PRODUCTS:
        (B, C), out = x.shape[:2], len(conv.weight)
        products = x.reshape(B, C, 1, -1) * _single(conv.weight).reshape(out, C).T[:, :, None]  # (B, C, out, places)
        y = _in_order(products, 1).reshape(B, out, *x.shape[2:])
    else:
        return None
    if conv.bias is not None:
        y = y + _single(conv.bias)[:, None, None]
    return _single(rest[1]) + np.float32(rest[0]) * y if rest else y
