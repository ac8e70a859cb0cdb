"""`prepare`: the parameters as the kernels read them, made once when a model is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...params import (
    Attention,
    BatchNorm,
    Conv,
    ConvBatchNorm,
    ConvTranspose,
    Embeddings,
    FcnHead,
    FeaturePyramid,
    LayerNorm,
    Linear,
    ReluConv,
    UperHead,
)  # fmt: skip
from ..folding import fold
from ..low_precision import LOW, FullPart, LowConv, LowDeconv, ShortPart
from .convs import pack_conv
from .low_precision import PackedLow, pack_low, pack_low_deconv
from .maps import PackedConv, PackedDeconv
from .memory import aligned, aligned_copy, release_pages
from .norm import PackedNorm
from .pack import PackedLinear, pack_matrix, padded_bias
from .packed import Packed
from .spread import PackedLowTaps, PackedTaps, pack_low_taps, pack_taps
from .target import LANES, NR
from .winograd import PackedShortWinograd, PackedWinograd, pack_short_winograd, pack_winograd


@dataclass(frozen=True)
class PackedAttention(Packed):
    """Query, key and value as one layer of 3 D outputs, beside the output projection."""

    qkv: PackedLinear | PackedLow
    output: Any
    source: Attention | None = None


def prepare(params: Any, keep_source: bool = False) -> Any:
    """Packs the weights of a parameter tree; a leaf that is not float32 stays as it is and is served by NumPy.

    `keep_source` keeps the leaves as they were in `.source`, for NumPy ops that are to run beside fast ones.
    """
    if isinstance(params, Embeddings):
        return dataclasses.replace(params, patch=pack_linear([params.patch], keep_source))
    if isinstance(params, Attention):
        return _pack_attention(params, keep_source)
    if isinstance(params, Linear):
        return pack_linear([params], keep_source)
    if isinstance(params, LOW):
        return pack_low([params], keep_source)
    if isinstance(params, LowDeconv):
        return pack_low_deconv(params, keep_source)
    if isinstance(params, LowConv):
        return _pack_low_conv(params, keep_source)
    if isinstance(params, LayerNorm):
        return _pack_norm(params, keep_source)
    if isinstance(params, FeaturePyramid):
        return _pack_pyramid(params, keep_source)
    if isinstance(params, UperHead):
        return _pack_head(params, keep_source)
    if isinstance(params, (FcnHead, ConvBatchNorm)):
        return params  # runs in training only, on NumPy
    if isinstance(params, (Conv, ReluConv)):
        return pack_map_conv(params, keep_source)
    if isinstance(params, tuple):
        return tuple(prepare(child, keep_source) for child in params)
    if dataclasses.is_dataclass(params):
        fields = {f.name: prepare(getattr(params, f.name), keep_source) for f in dataclasses.fields(params)}
        return dataclasses.replace(params, **fields)  # type: ignore[type-var]
    return params


def is_float32(*arrays: Any) -> bool:
    """Whether every array that is there is a float32 NumPy array."""
    for a in arrays:  # noqa: SIM110  (a generator takes twice as long, and this is asked before every kernel)
        if not (a is None or (isinstance(a, np.ndarray) and a.dtype == np.float32)):
            return False
    return True


def pack_linear(layers: Sequence[Linear | Conv], keep_source: bool) -> Any:
    """One packed layer whose outputs are those of `layers` one after another; the layer itself if it is not float32."""
    if not is_float32(*(array for layer in layers for array in (layer.weight, layer.bias))):
        return layers[0]
    matrices = [layer.weight.reshape(layer.weight.shape[0], -1) for layer in layers]
    out, steps = sum(len(m) for m in matrices), matrices[0].shape[1]
    if any(len(m) % NR for m in matrices[:-1]):
        matrices = [np.concatenate(matrices)]  # a panel would span two layers
    panels = aligned((-(-out // NR), steps, NR))
    first = 0
    for matrix in matrices:
        count = -(-len(matrix) // NR)
        pack_matrix(matrix, panels[first : first + count])
        first += count
        release_pages(matrix)
    biases = [np.zeros(layer.weight.shape[0], np.float32) if layer.bias is None else layer.bias for layer in layers]
    return PackedLinear(panels, padded_bias(np.concatenate(biases), out), out, layers[0] if keep_source else None)


def _pack_attention(p: Attention, keep_source: bool) -> Any:
    parts = (p.query, p.key, p.value)
    if all(isinstance(layer, LOW) for layer in parts):
        return PackedAttention(pack_low(parts), prepare(p.output, keep_source), p if keep_source else None)
    if not is_float32(*(array for layer in parts for array in (layer.weight, layer.bias))):
        return p
    return PackedAttention(pack_linear(parts, False), pack_linear([p.output], keep_source), p if keep_source else None)


def _pack_norm(norm: LayerNorm, keep_source: bool) -> Any:
    if not is_float32(norm.weight, norm.bias):
        return norm
    weight, bias = (aligned_copy(a) for a in (norm.weight, norm.bias))
    return PackedNorm(weight, bias, norm if keep_source else None)


def pack_map_conv(layer: Conv | ReluConv, keep_source: bool) -> Any:
    """A convolution of maps, packed; one of even kernel or that is not float32 stays as it is.

    Winograd's form, which is less accurate, is kept for those after a ReLU, which have an error budget for it.
    """
    kh, kw = layer.weight.shape[2:]
    if not is_float32(layer.weight, layer.bias) or kh % 2 == 0 or kw % 2 == 0:
        return layer
    return pack_conv(layer, keep_source, winograd=isinstance(layer, ReluConv))


# Convolutions -------------------------------------------------------------------------------------------------------


def _pack_pyramid(p: FeaturePyramid, keep_source: bool) -> FeaturePyramid:
    return FeaturePyramid(
        deconv1=pack_deconv(p.deconv1, p.bn, keep_source),
        bn=p.bn,  # already in deconv1
        deconv2=pack_deconv(p.deconv2, None, keep_source),
        deconv3=pack_deconv(p.deconv3, None, keep_source),
    )


def _pack_head(p: UperHead, keep_source: bool) -> UperHead:
    """1x1 convolutions as linear layers; 3x3 ones by Winograd for maps of full size, by taps for enlarged ones."""
    return UperHead(
        psp_modules=tuple(_pack_conv_1x1(layer, keep_source) for layer in p.psp_modules),
        psp_bottleneck=pack_conv_3x3(p.psp_bottleneck, keep_source, full_size_parts=0),
        lateral_convs=tuple(_pack_conv_1x1(layer, keep_source) for layer in p.lateral_convs),
        fpn_convs=tuple(pack_conv_3x3(layer, keep_source, full_size_parts=1) for layer in p.fpn_convs),
        fpn_bottleneck=pack_conv_3x3(p.fpn_bottleneck, keep_source, full_size_parts=1),
        classifier=pack_linear([p.classifier], keep_source),
    )


def _fold(bn: BatchNorm | None, out: int, bias: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(scale, bias) of every output channel that stand for the layer's bias and the batch norm behind it."""
    if bn is None:
        return np.ones(out, np.float32), np.zeros(out, np.float32) if bias is None else bias.astype(np.float32)
    scale, shift = fold(bn, bias)
    return scale.astype(np.float32), shift.astype(np.float32)


def _arrays(bn: BatchNorm | None) -> tuple[Any, ...]:
    return () if bn is None else (bn.weight, bn.bias, bn.running_mean, bn.running_var)


def _pack_conv_1x1(layer: Any, keep_source: bool) -> Any:
    if not isinstance(layer, ConvBatchNorm):
        return prepare(layer, keep_source)
    weight, bn = layer.conv.weight, layer.bn
    if not is_float32(weight, *_arrays(bn)) or weight.shape[2:] != (1, 1):
        return layer
    out = weight.shape[0]
    scale, bias = _fold(bn, out, layer.conv.bias)
    panels = pack_matrix(weight.reshape(out, -1), scale=scale)
    release_pages(weight)
    return PackedLinear(panels, padded_bias(bias, out), out, layer if keep_source else None)


def pack_conv_3x3(layer: Any, keep_source: bool, full_size_parts: int) -> Any:
    """Parts of `out` input channels each, one for every map that comes in; the first few see maps of full size."""
    if not isinstance(layer, ConvBatchNorm):
        return prepare(layer, keep_source)
    weight, bn = layer.conv.weight, layer.bn
    out, channels = weight.shape[:2]
    fits = weight.shape[2:] == (3, 3) and out % NR == 0 and out % LANES == 0 and channels % out == 0
    if not fits or not is_float32(weight, *_arrays(bn)):
        return layer
    scale, bias = _fold(bn, out, layer.conv.bias)
    parts: list[PackedWinograd | PackedTaps] = []
    for i in range(channels // out):
        share = weight[:, i * out : (i + 1) * out]
        parts.append(pack_winograd(share, scale) if i < full_size_parts else pack_taps(share, scale))
    release_pages(weight)
    return PackedConv(tuple(parts), aligned_copy(bias), layer if keep_source else None)


def _pack_low_conv(layer: LowConv, keep_source: bool) -> Any:
    """The same of low precision; the layer itself if its channels do not fill whole panels."""
    out = len(layer.bias)
    if out % NR or out % LANES:
        return layer
    parts: list[PackedWinograd | PackedShortWinograd | PackedLowTaps] = [
        pack_low_taps(part, out)
        if not isinstance(part, FullPart)
        else pack_short_winograd(part.weight, part.scale)
        if isinstance(part, ShortPart)
        else pack_winograd(part.weight, part.scale)
        for part in layer.parts
    ]
    return PackedConv(tuple(parts), aligned_copy(layer.bias), layer if keep_source else None)


def pack_deconv(layer: Any, bn: BatchNorm | None, keep_source: bool) -> Any:
    """The four corners of a 2x2 transposed convolution with `bn` folded in; the layer itself if it is not float32."""
    if not isinstance(layer, ConvTranspose):
        return prepare(layer, keep_source)
    weight = layer.weight
    if not is_float32(weight, layer.bias, *_arrays(bn)):
        return layer
    channels, out = weight.shape[:2]
    scale, bias = _fold(bn, out, layer.bias)
    panels = aligned((4, -(-out // NR), channels, NR))
    for corner in range(4):
        pack_matrix(weight[:, :, corner // 2, corner % 2].T, panels[corner], scale)
    release_pages(weight)
    return PackedDeconv(panels, padded_bias(bias, out), out, layer if keep_source else None)
