"""Common mistakes, op by op: each function yields (what would be wrong, what the op would then give).

They are called with the float64 arguments of the op whose result is off; the one whose prediction matches the result
of the implementation under test is the diagnosis.  Parameters come as canonical leaves, arrays as float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..ops import reference
from ..ops.activations import ACTIVATIONS
from ..params import Conv, ConvBatchNorm, ConvTranspose, LayerNorm
from .float64_model import conv2d
from .low_precision import half, int8

Guess = tuple[str, Any]
EPSILONS = (1e-12, 1e-6, 1e-5, 1e-3, 0.0)
ROUNDED = {"bfloat16": "the weights are rounded to bfloat16", "float16": "the weights are rounded to float16"}


def _layer_norm(x: Any, norm: LayerNorm, eps: float) -> Iterator[Guess]:
    for other in EPSILONS:
        if other != eps:
            yield f"epsilon {other:g} instead of {eps:g}", reference.layer_norm(x, norm, other)
    zero, one = np.zeros_like(norm.bias), np.ones_like(norm.weight)
    yield "the bias is missing", reference.layer_norm(x, replace(norm, bias=zero), eps)
    yield "the weight is missing", reference.layer_norm(x, replace(norm, weight=one), eps)
    yield "weight and bias are swapped", reference.layer_norm(x, LayerNorm(norm.bias, norm.weight), eps)
    D = x.shape[-1]
    centred = x - x.mean(-1, keepdims=True)
    if D > 1:
        var = np.square(centred).sum(-1, keepdims=True) / (D - 1)
        yield "the variance is divided by D - 1 instead of D", centred / np.sqrt(var + eps) * norm.weight + norm.bias
    root = np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)
    yield "the mean is not subtracted (an RMS norm)", x / root * norm.weight + norm.bias
    spread = np.sqrt(np.square(centred).mean(-1, keepdims=True))
    for other in EPSILONS[:3]:
        yield (
            f"epsilon {other:g} is added to the standard deviation, not to the variance",
            centred / (spread + other) * norm.weight + norm.bias,
        )
    yield "the norm is missing", x
    for dtype, text in ROUNDED.items():
        yield text, reference.layer_norm(x, LayerNorm(half(norm.weight, dtype), half(norm.bias, dtype)), eps)
        yield f"the input is rounded to {dtype}", reference.layer_norm(half(x, dtype), norm, eps)


def layers(layer: Any) -> Iterator[tuple[str, Any]]:
    """(what is wrong, the layer with that fault) of a linear layer or a patch convolution."""
    weight = layer.weight
    if layer.bias is not None:
        yield "the bias is missing", replace(layer, bias=None)
        yield "the bias is added twice", replace(layer, bias=2 * layer.bias)
    if weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
        yield "the weight is transposed", replace(layer, weight=np.ascontiguousarray(weight.T))
    if weight.ndim == 2:
        reordered = np.ascontiguousarray(weight.T).reshape(weight.shape)
        yield "the weight is read in the wrong order (in, out) for (out, in)", replace(layer, weight=reordered)
    if weight.ndim == 4:
        yield "the colour channels are reversed (BGR for RGB)", replace(layer, weight=weight[:, ::-1])
        for order in itertools.permutations((1, 2, 3)):
            if order != (1, 2, 3):
                axes = "".join("oihw"[i] for i in (0, *order))
                moved = weight.transpose(0, *order).reshape(weight.shape)
                yield f"the weight is laid out {axes} instead of oihw", replace(layer, weight=moved)


def rounded(x: Any, layer: Any) -> Iterator[tuple[str, Any, Any]]:
    """(what is rounded, the input, the layer) of a product in lower precision."""
    for dtype, text in ROUNDED.items():
        low = replace(layer, weight=half(layer.weight, dtype))
        yield text, x, low
        yield f"the input is rounded to {dtype}", half(x, dtype), layer
        yield f"weights and input are rounded to {dtype}", half(x, dtype), low
    tokens = int8(x.reshape(-1, x.shape[-1]), 0).reshape(x.shape)
    inputs = (("a scale for each token", tokens), ("one scale for all", int8(x)))
    weights = (("a scale for each output", int8(layer.weight, 0)), ("one scale for all", int8(layer.weight)))
    for how, values in inputs:
        yield f"the input is rounded to 8 bits, {how}", values, layer
    for how, weight in weights:
        low = replace(layer, weight=weight)
        yield f"the weights are rounded to 8 bits, {how}", x, low
        for other, values in inputs:
            yield f"weights ({how}) and input ({other}) are rounded to 8 bits", values, low


def _linear(x: Any, layer: Any) -> Iterator[Guess]:
    for text, faulty in layers(layer):
        yield text, reference.linear(x, faulty)
    for text, inputs, faulty in rounded(x, layer):
        yield text, reference.linear(inputs, faulty)


def _linear_activation(x: Any, layer: Any, activation: str) -> Iterator[Guess]:
    y = reference.linear(x, layer)
    for name, function in ACTIVATIONS.items():
        if name != activation:
            what = "no activation" if name == "linear" else f"activation {name}"
            with np.errstate(all="ignore"):
                yield f"{what} instead of {activation}", function(y)
    for text, faulty in layers(layer):
        yield text, reference.linear_activation(x, faulty, activation)
    for text, inputs, faulty in rounded(x, layer):
        yield text, reference.linear_activation(inputs, faulty, activation)


def _linear_residual(x: Any, layer: Any, scale: Any, residual: Any, keep: Any = None) -> Iterator[Guess]:
    y = reference.linear(x, layer)
    scaled = y if scale is None else y * scale
    if scale is not None:
        yield "the layer scale is missing", residual + y
        yield "the layer scale is applied twice", residual + scaled * scale
        yield "the layer scale is applied to the residual as well", (residual + y) * scale
        if layer.bias is not None:
            yield "the bias is added after the layer scale", residual + (y - layer.bias) * scale + layer.bias
    yield "the residual is missing", scaled
    yield "the residual is added twice", 2 * residual + scaled
    yield "the branch is missing", residual
    for text, faulty in layers(layer):
        yield text, reference.linear_residual(x, faulty, scale, residual)
    for text, inputs, faulty in rounded(x, layer):
        yield text, reference.linear_residual(inputs, faulty, scale, residual)


# Maps ---------------------------------------------------------------------------------------------------------------


def _kernels(weight: np.ndarray, swap: bool) -> Iterator[tuple[str, np.ndarray]]:
    if weight.shape[2] > 1:
        yield "the kernel is flipped (a true convolution)", weight[:, :, ::-1, ::-1]
        yield "the kernel's height and width are swapped", weight.swapaxes(2, 3)
    if swap and weight.shape[0] == weight.shape[1]:
        yield "input and output channels of the kernel are swapped", weight.swapaxes(0, 1)
    for dtype, text in ROUNDED.items():
        yield text, half(weight, dtype)


def _padded(x: Any, k: int, compute: Callable[[Any], Any]) -> Iterator[Guess]:
    """A convolution of kernel size k whose borders see something else than zeros."""
    r = k // 2
    if not r or min(x.shape[2:]) <= r:
        return
    modes: tuple[tuple[Any, str], ...] = (
        ("reflect", "mirrored"), ("edge", "repeated"), ("wrap", "continued on the other side")
    )  # fmt: skip
    for mode, what in modes:
        wide = np.pad(x, ((0, 0), (0, 0), (r, r), (r, r)), mode)
        yield f"borders are {what} instead of padded with zeros", compute(wide)[:, :, r:-r, r:-r]


def _conv(x: Any, layer: Conv) -> Iterator[Guess]:
    for text, weight in _kernels(layer.weight, True):
        yield text, conv2d(x, replace(layer, weight=weight))
    if layer.bias is not None:
        yield "the bias is missing", conv2d(x, replace(layer, bias=None))
    yield from _padded(x, layer.weight.shape[2], lambda wide: conv2d(wide, layer))


def _after_conv(y: Any, layer: ConvBatchNorm) -> Iterator[Guess]:
    """Faults behind the convolution, whose result is y."""
    bn = layer.bn

    def normalised(eps: float = reference.BATCH_NORM_EPS, **changes: Any) -> np.ndarray:
        b = replace(bn, **changes)
        z = (y - b.running_mean[:, None, None]) * (b.weight / np.sqrt(b.running_var + eps))[:, None, None]
        return z + b.bias[:, None, None]

    for eps in (1e-3, 1e-6, 1e-12):
        yield f"batch norm epsilon {eps:g} instead of 1e-05", np.maximum(normalised(eps), 0)
    yield "the ReLU is missing", normalised()
    yield "the batch norm is missing", np.maximum(y, 0)
    yield "GELU instead of ReLU", ACTIVATIONS["gelu"](normalised())
    yield "the batch norm's bias is missing", np.maximum(normalised(bias=np.zeros_like(bn.bias)), 0)
    yield "the batch norm's weight is missing", np.maximum(normalised(weight=np.ones_like(bn.weight)), 0)
    zero = np.zeros_like(bn.running_mean)
    yield "the running mean is not subtracted", np.maximum(normalised(running_mean=zero), 0)
    yield "the variance is taken for a standard deviation", np.maximum(normalised(running_var=bn.running_var**2), 0)
    mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3))
    batch = np.maximum(normalised(running_mean=mean, running_var=var), 0)
    yield "the batch norm uses the batch's own statistics (training mode)", batch


def _conv_bn_relu(x: Any, layer: ConvBatchNorm) -> Iterator[Guess]:
    yield from _after_conv(conv2d(x, layer.conv), layer)
    for text, weight in _kernels(layer.conv.weight, True):
        yield text, reference.conv_bn_relu(x, replace(layer, conv=replace(layer.conv, weight=weight)))
    yield from _padded(x, layer.conv.weight.shape[2], lambda wide: reference.conv_bn_relu(wide, layer))


def _conv_bn_relu_resized(maps: Any, layer: ConvBatchNorm, size: tuple[int, int]) -> Iterator[Guess]:
    for text, resize in _resizers("bilinear"):
        joined = np.concatenate([resize(x, size) for x in maps], 1)
        yield f"maps are resized {text}", reference.conv_bn_relu(joined, layer)
    resized = [reference.resize_bilinear(x, size) for x in maps]
    yield "the maps are joined in reverse order", reference.conv_bn_relu(np.concatenate(resized[::-1], 1), layer)
    moved = np.concatenate([*resized[1:], resized[0]], 1)
    yield "the first map is joined last", reference.conv_bn_relu(moved, layer)
    yield from _conv_bn_relu(np.concatenate(resized, 1), layer)


def _conv_transpose(x: Any, deconv: ConvTranspose) -> Iterator[Guess]:
    for text, weight in _kernels(deconv.weight, True):
        yield text, reference.conv_transpose(x, replace(deconv, weight=weight))
    yield "the bias is missing", reference.conv_transpose(x, replace(deconv, bias=np.zeros_like(deconv.bias)))


def _conv_transpose_bn_gelu(x: Any, deconv: ConvTranspose, bn: Any) -> Iterator[Guess]:
    y = reference.batch_norm(reference.conv_transpose(x, deconv), bn)
    for name in ("gelu_pytorch_tanh", "quick_gelu", "relu", "linear"):
        what = "no activation" if name == "linear" else f"activation {name}"
        yield f"{what} instead of gelu", ACTIVATIONS[name](y)
    yield "the batch norm is missing", ACTIVATIONS["gelu"](reference.conv_transpose(x, deconv))
    for eps in (1e-3, 1e-6, 1e-12):
        moved = replace(bn, running_var=bn.running_var + (eps - reference.BATCH_NORM_EPS))
        yield (
            f"batch norm epsilon {eps:g} instead of 1e-05",
            reference.conv_transpose_bn_gelu(x, deconv, moved),
        )
    for text, weight in _kernels(deconv.weight, True):
        yield text, reference.conv_transpose_bn_gelu(x, replace(deconv, weight=weight), bn)


def _max_pool2x2(x: Any) -> Iterator[Guess]:
    B, C, h, w = x.shape
    squares = x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(B, C, h // 2, 2, w // 2, 2)
    yield "average instead of maximum", squares.mean((3, 5))
    yield "the first pixel of every square instead of the largest", squares[:, :, :, 0, :, 0]


def _adaptive_avg_pool(x: Any, size: int) -> Iterator[Guess]:
    B, C, h, w = x.shape
    if h >= size and w >= size:
        rows, columns = (np.arange(size + 1) * n // size for n in (h, w))
        cells = np.empty((B, C, size, size))
        for i, j in itertools.product(range(size), repeat=2):
            cells[:, :, i, j] = x[:, :, rows[i] : rows[i + 1], columns[j] : columns[j + 1]].mean((2, 3))
        yield "the cells do not overlap: they must end at ceil((i + 1) n / size)", cells
    yield "bilinear resizing instead of means", reference.resize_bilinear(x, (size, size))


def resize(kind: str) -> Callable[..., Iterator[Guess]]:
    """Guesses for a resize op of that kind."""

    def guesses(x: Any, size: tuple[int, int]) -> Iterator[Guess]:
        for text, other in _resizers(kind):
            yield f"resized {text}", other(x, size)
        if kind == "bilinear":  # in UPerNet the result is added to a lateral map
            yield "the coarser level is not added", np.zeros((*x.shape[:2], *size))

    return guesses


def _resizers(kind: str) -> Iterator[tuple[str, Any]]:
    yield "with align_corners=True", lambda x, size: _separable(x, size, _aligned)
    yield "to the nearest pixel", lambda x, size: _separable(x, size, _nearest)
    if kind == "bilinear":
        yield "by bicubic interpolation", reference.resize_bicubic
    else:
        yield "by bilinear interpolation", reference.resize_bilinear
        yield "by bicubic interpolation with A = -0.5", lambda x, size: _separable(x, size, _pillow)


def _separable(x: np.ndarray, size: tuple[int, int], matrix: Any) -> np.ndarray:
    return matrix(x.shape[2], size[0]) @ x @ matrix(x.shape[3], size[1]).T


def _aligned(old: int, new: int) -> np.ndarray:
    position = np.arange(new) * ((old - 1) / max(new - 1, 1))
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(old)))


def _nearest(old: int, new: int) -> np.ndarray:
    return (np.arange(new) * old // new)[:, None] == np.arange(old)


def _pillow(old: int, new: int) -> np.ndarray:
    position = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    s = np.abs(position[:, None] - np.arange(old))
    near, far = (1.5 * s - 2.5) * s * s + 1, ((-0.5 * s + 2.5) * s - 4) * s + 2
    taps = np.where(s <= 1, near, np.where(s < 2, far, 0))
    return taps / taps.sum(1, keepdims=True)


OPS: dict[str, Callable[..., Iterator[Guess]]] = {
    "layer_norm": _layer_norm,
    "linear": _linear,
    "linear_activation": _linear_activation,
    "linear_residual": _linear_residual,
    "conv2d": _conv,
    "conv_bn_relu": _conv_bn_relu,
    "conv_bn_relu_resized": _conv_bn_relu_resized,
    "conv_transpose": _conv_transpose,
    "conv_transpose_bn_gelu": _conv_transpose_bn_gelu,
    "max_pool2x2": _max_pool2x2,
    "adaptive_avg_pool": _adaptive_avg_pool,
    "resize_bilinear": resize("bilinear"),
    "resize_bicubic": resize("bicubic"),
}
