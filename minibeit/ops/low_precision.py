"""Linear layers in 8-bit integers and in bfloat16: what is rounded, and how.  Every backend rounds like this.

int8: a weight is an integer of -127 ... 127 times a factor of its output channel, an input an integer of 0 ... 255 from
a zero point on times a factor of its token, found from the token itself.  Products are sums of integers, and exact:

    y = (sum_k (u_k - z) w_k) * (factor of the token * factor of the channel) + bias

bfloat16: weights and inputs are rounded to the nearest bfloat16, to even ones of two; sums are float32.

Which layers: those of the blocks, the head of masked modelling, and in the segmentation head whatever is a product at
the size of its map: transposed and 1x1 convolutions, and the parts of 3x3 ones that read maps to be enlarged (see
`LowConv`).  float32 stay
- layer norms, softmax, activations and the residual stream, whose errors would add up from block to block;
- in int8 the products of attention, 4 % of all at 224 pixels and 26 % at 640, are bfloat16: softmax raises an error of
  the scores to a factor of the result, and a token's largest score would take the levels of all others;
- the patch embedding and the layers that make the outputs, 1 %: an error of the first goes through every block, one of
  the last stands in the result as it is (masked modelling's, with 8192 outputs, is 7 % and only picks the largest);
- 3x3 convolutions of maps of full size go by Winograd's algorithm, which saves three products in four, as int8 would;
  for int8 its products are bfloat16, whose error it raises to that of an int8 layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoint.formats.lazy_tensors import bfloat16_to_float32, float32_to_bfloat16
from ..params import (
    Attention,
    BatchNorm,
    Block,
    ConvBatchNorm,
    ConvTranspose,
    FeaturePyramid,
    LayerNorm,
    Linear,
    MaskedImageModeling,
    UperHead,
)  # fmt: skip
from .folding import fold

LOW_DTYPES = ("int8", "bfloat16")
LARGEST_WEIGHT, LEVELS = 127, 255
SMALLEST_RANGE = np.float32(1e-30)  # of a token; a smaller one is all zeros
LONGEST_SUM = (2**31 - 1) // (LEVELS * LARGEST_WEIGHT)  # products, so that no int32 overflows
SPREAD = 4.0  # standard deviations: what a normalised channel hardly exceeds


@dataclass(frozen=True)
class Int8Linear:
    """x W^T + b with W = weight * scale[:, None]."""

    weight: Any  # (out, in) int8
    scale: Any  # (out,) float32
    bias: Any | None  # (out,) float32


@dataclass(frozen=True)
class BFloat16Linear:
    """x W^T + b with W in bfloat16, as the upper 16 bits of float32."""

    weight: Any  # (out, in) uint16
    bias: Any | None  # (out,) float32


@dataclass(frozen=True)
class LowDeconv:
    """A 2x2 transposed convolution, the batch norm behind it folded in: a layer for each corner of the squares."""

    corners: tuple[Any, ...]  # upper left, upper right, lower left, lower right


@dataclass(frozen=True)
class FullPart:
    """The part of a 3x3 convolution that reads a map of full size, in float32."""

    weight: Any  # (out, in, 3, 3)
    scale: Any  # (out,), of the batch norm


@dataclass(frozen=True)
class ShortPart(FullPart):
    """The same with products of bfloat16 in Winograd's algorithm (see `short_winograd`)."""


@dataclass(frozen=True)
class LowConv:
    """A 3x3 convolution of maps of several sizes, the batch norm behind it folded in, and its ReLU.

    A convolution is a sum over nine taps of shifted 1x1 products, and enlarging acts on each channel alone, so small
    maps are multiplied at their own size: their part is one layer (9 * out, in), tap after tap.
    """

    parts: tuple[Any, ...]  # for each map: FullPart, ShortPart, or a layer of low precision
    bias: Any  # (out,)


LOW = (Int8Linear, BFloat16Linear)
Spans = tuple[Any, Any]  # of a block: the largest magnitudes of the channels after either norm, (D,) each


# Rounding -----------------------------------------------------------------------------------------------------------


def quantise_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # (out, in) -> int8 (out, in), (out,)
    """Integers and the factor of every row, its largest element by 127.  A row of zeros has the factor 0."""
    scale = np.abs(weight).max(1) / np.float32(LARGEST_WEIGHT)
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = np.rint(weight / scale[:, None])
    return np.where(scale[:, None] > 0, levels, 0).astype(np.int8), scale.astype(np.float32)


def quantise_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # (n, in) -> (n, in), (n,), (n,)
    """(levels uint8, factor float32, zero point int32) of every row, with x = (level - zero point) * factor.

    The levels span the row's range, widened to contain 0: a token has outliers on one side more often than on both.
    All in float32, rounded to even: factor = range / 255, zero point = rint(-low * (255 / range)), level =
    rint(x * (255 / range)) + zero point.  A row with NaN or infinity has the factor NaN.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = np.minimum(x.min(1), np.float32(0)), np.maximum(x.max(1), np.float32(0))
        span = high - low
        some = span > SMALLEST_RANGE
        inverse = np.where(some, np.float32(LEVELS) / np.where(some, span, np.float32(1)), np.float32(0))
        finite = np.isfinite(x).all(1)
        zero = np.rint(np.where(finite, -low * inverse, 0)).astype(np.int32)
        nearest = np.rint(np.where(finite[:, None], x * inverse[:, None], 0)).astype(np.int32)
        factor = np.where(some, span / np.float32(LEVELS), np.float32(0))
    return (
        np.clip(nearest + zero[:, None], 0, LEVELS).astype(np.uint8),
        np.where(finite, factor, np.float32(np.nan)).astype(np.float32),
        zero,
    )


def integer_products(
    levels: np.ndarray, zero: np.ndarray, weight: np.ndarray
) -> np.ndarray:  # (n, in), (n,), (out, in) -> (n, out) int32
    """sum_k (levels - zero) * weight, exactly; by way of float64, which holds such sums and multiplies faster."""
    centred = levels.astype(np.float64) - zero[:, None]
    return (centred @ weight.T.astype(np.float64)).astype(np.int32)


def rounded(x: np.ndarray) -> np.ndarray:  # (...) -> (...)
    """The nearest numbers that are bfloat16, in the dtype of x."""
    return bfloat16_to_float32(float32_to_bfloat16(x)).astype(x.dtype, copy=False)


def low_linear(x: np.ndarray, layer: Int8Linear | BFloat16Linear) -> np.ndarray:  # (..., in) -> (..., out)
    """The layer as this module's docstring defines it, in float32."""
    rows = np.ascontiguousarray(x.reshape(-1, x.shape[-1]), np.float32)
    if isinstance(layer, Int8Linear):
        levels, factor, zero = quantise_rows(rows)
        y = integer_products(levels, zero, layer.weight).astype(np.float32)
        y *= factor[:, None] * layer.scale
    else:
        y = bfloat16_to_float32(float32_to_bfloat16(rows)) @ bfloat16_to_float32(layer.weight).T
    if layer.bias is not None:
        y += layer.bias
    return y.reshape(*x.shape[:-1], -1).astype(x.dtype, copy=False)


def make_int8(layer: Linear, factor: np.ndarray | None = None) -> Int8Linear:
    """The layer in int8, its outputs times `factor` (out,) before the bias.

    Raises ValueError for a sum so long that it could overflow.
    """
    if layer.weight.shape[1] > LONGEST_SUM:
        raise ValueError(f"int8: a sum of {layer.weight.shape[1]:,} products may overflow, at most {LONGEST_SUM:,} fit")
    weight, scale = quantise_weight(np.asarray(layer.weight, np.float32))
    return Int8Linear(weight, scale if factor is None else scale * factor, layer.bias)


def make_bfloat16(layer: Linear, factor: np.ndarray | None = None) -> BFloat16Linear:
    """The same in bfloat16."""
    weight = layer.weight if factor is None else layer.weight * factor[:, None]
    return BFloat16Linear(float32_to_bfloat16(weight), layer.bias)


def hollow_int8(layer: Linear, factor: Any = None) -> Int8Linear:
    """An `Int8Linear` that only stands for its shapes."""
    return Int8Linear(layer.weight, layer.weight[:, 0], layer.bias)


def hollow_bfloat16(layer: Linear, factor: Any = None) -> BFloat16Linear:
    """The same for bfloat16."""
    return BFloat16Linear(layer.weight, layer.bias)


Maker = Callable[..., Any]  # (layer, factor) -> a layer of low precision
MAKERS: dict[str, Maker] = {"int8": make_int8, "bfloat16": make_bfloat16}
HOLLOW_MAKERS: dict[str, Maker] = {"int8": hollow_int8, "bfloat16": hollow_bfloat16}


# A tree of parameters -----------------------------------------------------------------------------------------------


def lowered(
    params: Any,
    dtype: str,
    maker: Maker | None = None,
    spans: Sequence[Spans] | None = None,
    done: Callable[[np.ndarray], None] | None = None,
) -> Any:
    """The tree of parameters with its layers of low precision (see above) made by `maker`, by default that of `dtype`.

    For int8, scales are migrated first (`migrated`), by the `spans` of every block if they were measured.  What is of
    low precision already stays.  `done` is called with every matrix that was rounded and is not needed again.
    """
    chosen = MAKERS[dtype] if maker is None else maker
    measured = iter(spans or ())

    release = done or (lambda matrix: None)

    def make(layer: Linear, factor: np.ndarray | None = None) -> Any:
        made = chosen(layer, factor)
        release(layer.weight)
        return made

    def low(layer: Any) -> Any:
        return make(layer) if isinstance(layer, Linear) else layer

    def walk(node: Any) -> Any:
        if isinstance(node, Block):
            block = migrated(node, next(measured, None)) if dtype == "int8" and maker is None else node
            a = block.attention
            attention = Attention(low(a.query), low(a.key), low(a.value), low(a.output))
            made = dataclasses.replace(block, attention=attention, fc1=low(block.fc1), fc2=low(block.fc2))
            if block is not node:  # its matrices were copies
                for layer in (node.attention.query, node.attention.key, node.attention.value, node.fc1):
                    release(layer.weight)
            return made
        if isinstance(node, MaskedImageModeling):
            return dataclasses.replace(node, beit=walk(node.beit), lm_head=low(node.lm_head))
        if isinstance(node, FeaturePyramid):
            return _low_pyramid(node, make)
        if isinstance(node, UperHead):
            return _low_head(node, make, ShortPart if dtype == "int8" else FullPart)
        if isinstance(node, tuple):
            return tuple(map(walk, node))
        if dataclasses.is_dataclass(node):
            children = {f.name: walk(getattr(node, f.name)) for f in dataclasses.fields(node)}
            return dataclasses.replace(node, **children)  # type: ignore[type-var]
        return node

    return walk(params)


def _low_pyramid(p: FeaturePyramid, make: Maker) -> FeaturePyramid:
    def deconv(layer: Any, bn: BatchNorm | None = None) -> Any:
        if not isinstance(layer, ConvTranspose):
            return layer
        scale, bias = (None, layer.bias) if bn is None else _folded(bn, layer.bias)
        matrices = [layer.weight[:, :, corner // 2, corner % 2].T for corner in range(4)]
        return LowDeconv(tuple(make(Linear(matrix, bias), scale) for matrix in matrices))

    first = deconv(p.deconv1, p.bn)
    return dataclasses.replace(p, deconv1=first, deconv2=deconv(p.deconv2), deconv3=deconv(p.deconv3))


def _low_head(p: UperHead, make: Maker, whole: type[FullPart]) -> UperHead:
    def conv_1x1(layer: Any) -> Any:
        if not isinstance(layer, ConvBatchNorm):
            return layer
        scale, bias = _folded(layer.bn, layer.conv.bias)
        return make(Linear(layer.conv.weight[:, :, 0, 0], bias), scale)

    def conv_3x3(layer: Any, full: int) -> Any:
        if not isinstance(layer, ConvBatchNorm):
            return layer
        (scale, bias), weight = _folded(layer.bn, layer.conv.bias), layer.conv.weight
        out, channels = weight.shape[:2]
        shares = [weight[:, first : first + out] for first in range(0, channels, out)]
        taps = [share.transpose(2, 3, 0, 1).reshape(9 * out, -1) for share in shares[full:]]
        small = [make(Linear(matrix, None), np.tile(scale, 9)) for matrix in taps]
        return LowConv((*(whole(share, scale) for share in shares[:full]), *small), bias)

    return dataclasses.replace(
        p,
        psp_bottleneck=conv_3x3(p.psp_bottleneck, 0),
        lateral_convs=tuple(map(conv_1x1, p.lateral_convs)),
        fpn_convs=tuple(conv_3x3(layer, 1) for layer in p.fpn_convs),
        fpn_bottleneck=conv_3x3(p.fpn_bottleneck, 1),
    )


def _folded(bn: BatchNorm, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    scale, shift = fold(bn, bias)
    return scale.astype(np.float32), shift.astype(np.float32)


# Outlier channels ---------------------------------------------------------------------------------------------------


def migrated(block: Block, spans: Spans | None = None) -> Block:
    """The same block, computing the same in float32, with channels of its normalised inputs brought to like ranges.

    One channel of large numbers would take the 256 levels of a token for itself.  The layer norm's weight and bias of
    a channel are divided by a factor and the columns that read the channel multiplied by it.  Factors are powers of
    two, so that nothing is rounded: float32 results stay the same to the bit.  `spans` are the largest magnitudes
    of the channels after either norm (D,), measured on images; without them they are guessed from the norm's weight
    and bias.  Source: Xiao et al. 2023 (SmoothQuant) for migrating, with the exponent 1/2.
    """
    a, (first, second) = block.attention, spans or (None, None)
    if not all(isinstance(layer, Linear) for layer in (a.query, a.key, a.value, block.fc1)):
        return block
    norm1, (query, key, value) = _migrate(block.norm1, (a.query, a.key, a.value), first)
    norm2, (fc1,) = _migrate(block.norm2, (block.fc1,), second)
    attention = Attention(query, key, value, a.output)
    return dataclasses.replace(block, norm1=norm1, attention=attention, norm2=norm2, fc1=fc1)


def _migrate(
    norm: LayerNorm, layers: tuple[Linear, ...], span: np.ndarray | None
) -> tuple[LayerNorm, tuple[Linear, ...]]:
    if span is None:
        span = np.abs(norm.bias) + SPREAD * np.abs(norm.weight)
    heaviest = np.max([np.abs(layer.weight).max(0) for layer in layers], axis=0)
    factors = migration_factors(span, heaviest)
    if (factors == 1).all():
        return norm, layers
    scaled = tuple(Linear(layer.weight * factors, layer.bias) for layer in layers)
    return LayerNorm(norm.weight / factors, norm.bias / factors), scaled


def migration_factors(span: np.ndarray, heaviest: np.ndarray) -> np.ndarray:  # (D,), (D,) -> (D,)
    """Powers of two near sqrt(span / heaviest), relative to their median, at least 1/256 and at most 65536.

    `span` are the channels' largest magnitudes, `heaviest` those of the weights that read them.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.sqrt(np.float64(span) / np.float64(heaviest))
    usable = np.isfinite(wanted) & (wanted > 0)
    if not usable.any():
        return np.ones(len(span), np.float32)
    exponents = np.rint(np.log2(np.where(usable, wanted / np.median(wanted[usable]), 1)))
    return np.exp2(np.clip(exponents, -8, 16)).astype(np.float32)
