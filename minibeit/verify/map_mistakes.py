"""Common mistakes in ops on maps (B, C, h, w): convolutions, resizing, pooling, and a tokenizer's choice of tokens.

As in `known_mistakes`, each function yields (what would be wrong, what the op would then give).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..ops import reference
from ..ops.activations import ACTIVATIONS
from ..params import ConvBatchNorm, ConvTranspose
from .float64_model import conv2d
from .known_mistakes import ROUNDED, Guess, layers
from .low_precision import half, int8

SAME_GAIN = 1e-3  # of the gain lies between two that count as one

Convolve = Callable[[Any, Any], Any]

# Convolutions -------------------------------------------------------------------------------------------------------


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


def _with(layer: Any, weight: np.ndarray) -> Any:
    return replace(layer, weight=weight)


def _convolution(x: Any, layer: Any, convolve: Convolve, ahead: Callable[[Any], Any] = lambda y: y) -> Iterator[Guess]:
    """Faults of a convolution's weights, bias and borders; ahead(y) is what the op makes of its result."""
    for text, weight in _kernels(layer.weight, True):
        yield text, ahead(convolve(x, _with(layer, weight)))
    for text, faulty in layers(layer):
        yield text, ahead(convolve(x, faulty))
    low = _with(layer, int8(layer.weight, 0))
    yield "the weights are rounded to 8 bits, a scale for each output", ahead(convolve(x, low))
    yield "the input is rounded to 8 bits, one scale for all", ahead(convolve(int8(x), layer))
    for dtype in ROUNDED:
        yield f"the input is rounded to {dtype}", ahead(convolve(half(x, dtype), layer))
        low = _with(layer, half(layer.weight, dtype))
        yield f"weights and input are rounded to {dtype}", ahead(convolve(half(x, dtype), low))
    kernel = layer.weight.shape[2]
    for text, y in _padded(x, kernel, lambda wide: convolve(wide, layer)):
        yield text, ahead(y)
    for dy, dx, where in ((1, 0, "below"), (0, 1, "on the right"), (1, 1, "below and on the right")) * (kernel > 1):
        shifted = np.roll(np.pad(x, ((0, 0), (0, 0), (0, kernel), (0, kernel))), (-dy, -dx), (2, 3))
        y = convolve(shifted, layer)[:, :, : x.shape[2], : x.shape[3]]
        yield f"the map is padded by one more {where}, and by one less on the other side", ahead(y)


def _conv(x: Any, layer: Any) -> Iterator[Guess]:
    yield "a ReLU stands before the convolution, where there is none", reference.relu_conv2d(x, layer)
    yield "a ReLU stands after the convolution, where there is none", np.maximum(conv2d(x, layer), 0)
    yield from _convolution(x, layer, conv2d)


def _relu_conv(x: Any, layer: Any) -> Iterator[Guess]:
    yield from _misplaced(x, layer, lambda y: y)
    yield from _convolution(x, layer, reference.relu_conv2d)


def _relu_conv_residual(x: Any, layer: Any, gain: float, residual: Any) -> Iterator[Guess]:
    path = reference.relu_conv2d(x, layer)
    yield "the gain is applied to the identity as well", gain * (residual + path)
    yield "the gain is applied to the identity, not to the path", gain * residual + path
    yield "the identity is missing", gain * path
    clipped = np.maximum(residual, 0)
    yield "the identity went through the ReLU as well (an in-place ReLU)", clipped + gain * path
    yield "a ReLU stands after the addition, where there is none", np.maximum(residual + gain * path, 0)
    if layer.bias is not None:
        bias = layer.bias[:, None, None]
        yield "the bias is added after the gain", residual + gain * (path - bias) + bias
    yield from _misplaced(x, layer, lambda y: residual + gain * y)
    yield from _convolution(x, layer, reference.relu_conv2d, lambda y: residual + gain * y)


def another_gain(found: np.ndarray, x: Any, layer: Any, gain: float, residual: Any) -> Iterator[Guess]:
    """The gain of the path that comes nearest to `found`, which `relu_conv2d_residual` of the rest should be."""
    path = reference.relu_conv2d(x, layer)
    fitted = float(np.vdot(path, found - residual) / max(np.vdot(path, path), 1e-300))
    known = (
        (1.0, "the gain 1 / (number of blocks)^2 is missing"),
        (gain**0.5, "the gain is 1 / (number of blocks), not its square"),
        (gain**0.25, "the gain is 1 / sqrt(number of blocks), not 1 / (number of blocks)^2"),
        (gain * gain, "the gain is applied twice"),
        (-gain, "the path is subtracted"),
        (0.0, "the path is missing"),
    )
    other = f"the gain is {fitted:.4g} instead of {gain:.4g}"
    yield (
        next((text for factor, text in known if abs(fitted - factor) <= SAME_GAIN * gain), other),
        (residual + fitted * path),
    )


def _misplaced(x: Any, layer: Any, ahead: Callable[[Any], Any]) -> Iterator[Guess]:
    """Faults of the ReLU before a convolution; ahead(y) is what the op makes of the convolution's result."""
    yield "the ReLU before the convolution is missing", ahead(conv2d(x, layer))
    after = np.maximum(conv2d(x, layer), 0)
    yield "the ReLU stands after the convolution instead of before it", ahead(after)
    yield "there is a ReLU after the convolution as well", ahead(np.maximum(reference.relu_conv2d(x, layer), 0))
    for name in ("gelu", "quick_gelu", "silu"):
        yield f"activation {name} instead of a ReLU", ahead(conv2d(ACTIVATIONS[name](x), layer))
    yield "a leaky ReLU (0.01) instead of a ReLU", ahead(conv2d(np.where(x > 0, x, 0.01 * x), layer))


def _one_hot(ids: Any, layer: Any) -> Iterator[Guess]:
    V = layer.weight.shape[1]
    for text, other in (
        ("tokens are counted from 1", ids + 1),
        ("tokens are one too small", ids - 1),
        ("rows and columns of the tokens are swapped", ids.swapaxes(1, 2).reshape(ids.shape)),
    ):
        yield text, reference.conv2d_one_hot(other % V, layer)
    if layer.bias is not None:
        yield "the bias is missing", reference.conv2d_one_hot(ids, replace(layer, bias=None))
        yield "the bias is added twice", reference.conv2d_one_hot(ids, replace(layer, bias=2 * layer.bias))
    reordered = np.ascontiguousarray(layer.weight.swapaxes(0, 1)).reshape(layer.weight.shape)
    yield (
        "the weight is read in the wrong order (in, out) for (out, in)",
        reference.conv2d_one_hot(ids, _with(layer, reordered)),
    )
    yield (
        "a ReLU stands after the convolution, where there is none",
        np.maximum(reference.conv2d_one_hot(ids, layer), 0),
    )


# With a batch norm ---------------------------------------------------------------------------------------------------


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


# Pooling, resizing, tokens -------------------------------------------------------------------------------------------


def _max_pool2x2(x: Any) -> Iterator[Guess]:
    (B, C), h, w = x.shape[:2], x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    squares = x[:, :, :h, :w].reshape(B, C, h // 2, 2, w // 2, 2)
    yield "average instead of maximum", squares.mean((3, 5))
    yield "the first pixel of every square instead of the largest", squares[:, :, :, 0, :, 0]
    wide = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    window = np.max([wide[:, :, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)], 0)
    yield "a window of 3x3 pixels instead of 2x2", window
    yield "a ReLU stands before the pooling, where there is none", np.maximum(reference.max_pool2x2(x), 0)
    small = reference.resize_bilinear(x, (x.shape[2] // 2, x.shape[3] // 2))
    yield "bilinear resizing instead of the maximum", small


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


def _upsample2x2(x: Any) -> Iterator[Guess]:
    size = (2 * x.shape[2], 2 * x.shape[3])
    for text, other in _resizers("nearest"):
        yield f"enlarged {text} instead of repeating pixels", other(x, size)
    tiled = np.tile(x, (1, 1, 2, 2))
    yield "the whole map is repeated instead of every pixel", tiled
    holes = np.zeros((*x.shape[:2], *size))
    holes[:, :, ::2, ::2] = x
    yield "the new pixels are zeros instead of copies", holes


def _argmax(logits: Any) -> Iterator[Guess]:
    best = logits.argmax(1)
    yield "tokens are counted from 1", best + 1
    yield "the smallest logit instead of the largest", logits.argmin(1)
    if best.shape[1] > 1 and best.shape[2] > 1:
        yield "rows and columns of the tokens are swapped", best.swapaxes(1, 2).reshape(best.shape)
    last = logits.shape[1] - 1 - logits[:, ::-1].argmax(1)
    yield "of equal logits the last instead of the first", last


OPS: dict[str, Callable[..., Iterator[Guess]]] = {
    "conv2d": _conv,
    "relu_conv2d": _relu_conv,
    "relu_conv2d_residual": _relu_conv_residual,
    "conv2d_one_hot": _one_hot,
    "conv_bn_relu": _conv_bn_relu,
    "conv_bn_relu_resized": _conv_bn_relu_resized,
    "conv_transpose": _conv_transpose,
    "conv_transpose_bn_gelu": _conv_transpose_bn_gelu,
    "max_pool2x2": _max_pool2x2,
    "upsample2x2": _upsample2x2,
    "argmax_channels": _argmax,
    "adaptive_avg_pool": _adaptive_avg_pool,
    "resize_bilinear": resize("bilinear"),
    "resize_bicubic": resize("bicubic"),
}
