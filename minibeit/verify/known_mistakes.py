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
from ..params import LayerNorm
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


def faults(x: Any, layer: Any) -> Iterator[tuple[str, Any, Any]]:
    """(what is wrong, the input, the layer) of a product with a faulty layer, or in lower precision."""
    for text, faulty in layers(layer):
        yield text, x, faulty
    yield from rounded(x, layer)


def _linear(x: Any, layer: Any) -> Iterator[Guess]:
    for text, inputs, faulty in faults(x, layer):
        yield text, reference.linear(inputs, faulty)


def _linear_activation(x: Any, layer: Any, activation: str) -> Iterator[Guess]:
    y = reference.linear(x, layer)
    for name, function in ACTIVATIONS.items():
        if name != activation:
            what = "no activation" if name == "linear" else f"activation {name}"
            with np.errstate(all="ignore"):
                yield f"{what} instead of {activation}", function(y)
    for text, inputs, faulty in faults(x, layer):
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
    for text, inputs, faulty in faults(x, layer):
        yield text, reference.linear_residual(inputs, faulty, scale, residual)


OPS: dict[str, Callable[..., Iterator[Guess]]] = {
    "layer_norm": _layer_norm,
    "linear": _linear,
    "linear_activation": _linear_activation,
    "linear_residual": _linear_residual,
}
