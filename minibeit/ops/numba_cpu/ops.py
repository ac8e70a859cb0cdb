"""The fast ops: each looks at its arguments and calls the kernels, or the NumPy definition where they cannot serve."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from ...params import Attention, Conv, ConvTranspose, LayerNorm, Linear, ReluConv
from .. import reference
from ..activations import ACTIVATIONS
from ..table import TABLE
from . import gemm
from .arguments import GELU, PLAIN, RELU, RESIDUAL
from .attention import attend, can_fuse
from .convs import PACKED, convolve_map
from .low_precision import PackedLow, PackedLowDeconv, low_product
from .maps import (
    PackedConv,
    PackedDeconv,
    average_pool,
    can_resize,
    conv_1x1,
    conv_3x3,
    conv_transpose_2x2,
    max_pool,
    resize,
    upsample,
)
from .norm import PackedNorm, layer_norm_rows
from .operands import contiguous
from .pack import PackedLinear
from .prepare import PackedAttention, is_float32, pack_deconv, pack_linear, pack_map_conv
from .queue import flush, synchronous
from .target import SHORT_SUM, STEPS

_GELUS = ("gelu", "gelu_python")
_low_attention = synchronous(reference.attention_of_low_precision)
_numpy = SimpleNamespace(**{name: synchronous(getattr(reference, name)) for name in TABLE})


def layer_norm(x: np.ndarray, norm: Any, eps: float) -> np.ndarray:  # (..., D) -> (..., D)
    """See `reference.layer_norm`."""
    if isinstance(norm, LayerNorm) and is_float32(norm.weight, norm.bias):
        norm = PackedNorm(contiguous(norm.weight), contiguous(norm.bias))
    if not isinstance(norm, PackedNorm) or not is_float32(x) or x.size == 0:
        return _numpy.layer_norm(x, norm, eps)
    return layer_norm_rows(x, norm, eps)


def linear(x: np.ndarray, layer: Any) -> np.ndarray:  # (..., in) -> (..., out)
    """See `reference.linear`."""
    layer = _packed(x, layer)
    if not _fits(x, layer):
        return _numpy.linear(x, _plain(layer))
    return _product(x, layer, steps_per_sum=SHORT_SUM)


def linear_activation(x: np.ndarray, layer: Any, activation: str) -> np.ndarray:  # (..., in) -> (..., out)
    """See `reference.linear_activation`; GELU and ReLU are applied while the product is in registers."""
    layer = _packed(x, layer)
    if not _fits(x, layer):
        return _numpy.linear_activation(x, _plain(layer), activation)
    if activation in _GELUS:
        return _product(x, layer, GELU)
    if activation == "relu":
        return _product(x, layer, RELU)
    y = _product(x, layer)
    flush()
    return ACTIVATIONS[activation](y)


def linear_residual(
    x: np.ndarray, layer: Any, scale: np.ndarray | None, residual: np.ndarray, keep: np.ndarray | None = None
) -> np.ndarray:  # (..., in) -> (..., out)
    """See `reference.linear_residual`."""
    layer = _packed(x, layer)
    if not _fits(x, layer) or not is_float32(scale, residual, keep):
        return _numpy.linear_residual(x, _plain(layer), scale, residual, keep)
    if keep is None:
        return _product(x, layer, RESIDUAL, scale, residual)
    y = _product(x, layer)
    flush()
    return residual + (y if scale is None else y * scale) * keep


def project_qkv(
    x: np.ndarray, p: Any, num_heads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # (B, N, D) -> 3 x (B, H, N, d)
    """See `reference.project_qkv`; one product, whose result `attention` reads where it lies."""
    p = _packed_attention(x, p)
    if not isinstance(p, PackedAttention) or not is_float32(x) or x.size == 0:
        return _numpy.project_qkv(x, _plain_attention(p), num_heads)
    B, N, _ = x.shape
    joined = _product(x, p.qkv)  # (B, N, 3 D)
    parts = joined.reshape(B, N, 3, num_heads, -1).transpose(2, 0, 3, 1, 4)
    return parts[0], parts[1], parts[2]


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: Any | None,
    return_probs: bool = False,
    keep: np.ndarray | None = None,
) -> Any:  # 3 x (B, H, N, d) -> (B, N, D)
    """See `reference.attention`."""
    if return_probs or keep is not None or not _can_attend(q, k, v, bias):
        return _numpy.attention(q, k, v, bias, return_probs, keep)
    return attend(q, k, v, bias)


def attention_of_low_precision(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: Any | None,
    return_probs: bool = False,
    keep: np.ndarray | None = None,
) -> Any:  # 3 x (B, H, N, d) -> (B, N, D)
    """See `low_precision.attention`; on a CPU without products of bfloat16 they are of float32."""
    if return_probs or keep is not None or not _can_attend(q, k, v, bias):
        return _low_attention(q, k, v, bias, return_probs, keep)
    return attend(q, k, v, bias, bfloat16=True)


def _can_attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: Any | None) -> bool:
    return is_float32(q, k, v) and q.size > 0 and can_fuse(q, k, v, bias)


@synchronous
def conv2d(x: np.ndarray, conv: Any) -> np.ndarray:  # (B, C, h, w) -> (B, out, h, w)
    """See `reference.conv2d`."""
    conv = _packed_conv(x, conv)
    return convolve_map(x, conv, relu=False) if isinstance(conv, PACKED) else reference.conv2d(x, conv)


@synchronous
def relu_conv2d(x: np.ndarray, conv: Any) -> np.ndarray:  # (B, C, h, w) -> (B, out, h, w)
    """See `reference.relu_conv2d`."""
    conv = _packed_conv(x, conv)
    return convolve_map(x, conv, relu=True) if isinstance(conv, PACKED) else reference.relu_conv2d(x, conv)


@synchronous
def relu_conv2d_residual(
    x: np.ndarray, conv: Any, gain: float, residual: np.ndarray
) -> np.ndarray:  # (B, C, h, w) -> (B, out, h, w)
    """See `reference.relu_conv2d_residual`."""
    conv = _packed_conv(x, conv)
    if not isinstance(conv, PACKED):
        return reference.relu_conv2d_residual(x, conv, gain, residual)
    return convolve_map(x, conv, True, gain, residual)


@synchronous
def conv2d_one_hot(ids: np.ndarray, conv: Any) -> np.ndarray:  # (B, h, w) -> (B, out, h, w)
    """See `reference.conv2d_one_hot`; rows of the panels are columns of the weight."""
    if not isinstance(conv, PackedLinear):
        return reference.conv2d_one_hot(ids, conv)
    columns = conv.panels[:, ids]  # (panels, B, h, w, NR)
    y = np.moveaxis(columns, 0, 3).reshape(*ids.shape, -1) + conv.bias
    return y[..., : conv.out].transpose(0, 3, 1, 2)


@synchronous
def conv_bn_relu(x: np.ndarray, layer: Any) -> np.ndarray:  # (B, C, h, w) -> (B, out, h, w)
    """See `reference.conv_bn_relu`; the batch norm was folded into the weights."""
    if isinstance(layer, (PackedLinear, PackedLow)):
        return conv_1x1(x, layer, relu=True)
    if isinstance(layer, PackedConv):
        return conv_bn_relu_resized([x], layer, (x.shape[2], x.shape[3]))
    return reference.conv_bn_relu(x, layer)


@synchronous
def conv_bn_relu_resized(
    maps: Sequence[np.ndarray], layer: Any, size: tuple[int, int]
) -> np.ndarray:  # k x (B, Ci, hi, wi) -> (B, out, h, w)
    """See `reference.conv_bn_relu_resized`; small maps are multiplied first and enlarged after."""
    if not isinstance(layer, PackedConv):
        return reference.conv_bn_relu_resized(maps, layer, size)
    found, expected = [x.shape[1] for x in maps], [part.channels for part in layer.parts]
    if found != expected:
        raise ValueError(f"conv_bn_relu_resized: expected maps of {expected} channels, found {found}")
    return conv_3x3(maps, layer, (size[0], size[1]))


@synchronous
def conv_transpose(x: np.ndarray, deconv: Any) -> np.ndarray:  # (B, C, h, w) -> (B, out, 2h, 2w)
    """See `reference.conv_transpose`."""
    if isinstance(deconv, ConvTranspose) and is_float32(x) and x.size:
        deconv = pack_deconv(deconv, None, False)
    if not isinstance(deconv, (PackedDeconv, PackedLowDeconv)):
        return reference.conv_transpose(x, deconv)
    return conv_transpose_2x2(x, deconv, PLAIN)


@synchronous
def conv_transpose_bn_gelu(x: np.ndarray, deconv: Any, bn: Any) -> np.ndarray:  # (B, C, h, w) -> (B, out, 2h, 2w)
    """See `reference.conv_transpose_bn_gelu`; `bn` was folded into the weights of `deconv`."""
    if not isinstance(deconv, (PackedDeconv, PackedLowDeconv)):
        return reference.conv_transpose_bn_gelu(x, deconv, bn)
    return conv_transpose_2x2(x, deconv, GELU)


@synchronous
def max_pool2x2(x: np.ndarray) -> np.ndarray:  # (B, C, h, w) -> (B, C, h // 2, w // 2)
    """See `reference.max_pool2x2`."""
    return max_pool(x) if is_float32(x) else reference.max_pool2x2(x)


@synchronous
def upsample2x2(x: np.ndarray) -> np.ndarray:  # (B, C, h, w) -> (B, C, 2h, 2w)
    """See `reference.upsample2x2`."""
    return upsample(x) if is_float32(x) else reference.upsample2x2(x)


@synchronous
def adaptive_avg_pool(x: np.ndarray, size: int) -> np.ndarray:  # (B, C, h, w) -> (B, C, size, size)
    """See `reference.adaptive_avg_pool`."""
    return average_pool(x, size) if is_float32(x) else reference.adaptive_avg_pool(x, size)


@synchronous
def resize_bilinear(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:  # (B, C, h, w) -> (B, C, *size)
    """See `reference.resize_bilinear`."""
    return resize(x, (size[0], size[1])) if can_resize(x) else reference.resize_bilinear(x, size)


def _product(
    x: np.ndarray,
    layer: PackedLinear | PackedLow,
    mode: int = PLAIN,
    scale: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    steps_per_sum: int = STEPS,
) -> np.ndarray:
    if isinstance(layer, PackedLow):
        return low_product(x, layer, mode, scale, residual)
    return gemm.product(x, layer, mode, scale, residual, steps_per_sum)


def _packed(x: np.ndarray, layer: Any) -> Any:
    """A layer in training, whose weights change at every step, packed for this one call; others as they are."""
    return pack_linear([layer], False) if isinstance(layer, (Linear, Conv)) and is_float32(x) and x.size else layer


def _packed_conv(x: np.ndarray, conv: Any) -> Any:
    """The same for a convolution of maps."""
    return pack_map_conv(conv, False) if isinstance(conv, (Conv, ReluConv)) and is_float32(x) and x.size else conv


def _packed_attention(x: np.ndarray, p: Any) -> Any:
    if not isinstance(p, Attention) or not is_float32(x) or not x.size:
        return p
    joined = pack_linear([p.query, p.key, p.value], False)
    return PackedAttention(joined, p.output) if isinstance(joined, PackedLinear) else p


def _fits(x: np.ndarray, layer: Any) -> bool:
    return isinstance(layer, (PackedLinear, PackedLow)) and is_float32(x) and x.size > 0


def _plain(layer: Any) -> Any:
    """A packed layer as NumPy ops want it."""
    if isinstance(layer, PackedLow):
        return layer.plain()
    return Linear(layer.weight(), layer.bias[: layer.out]) if isinstance(layer, PackedLinear) else layer


def _plain_attention(p: Any) -> Any:
    if not isinstance(p, PackedAttention):
        return p
    if isinstance(p.qkv, PackedLow):
        query, key, value = p.qkv.parts(3)
        return Attention(query, key, value, p.output)
    weights, biases = np.split(p.qkv.weight(), 3), np.split(p.qkv.bias[: p.qkv.out], 3)
    query, key, value = (Linear(w, b) for w, b in zip(weights, biases))
    return Attention(query, key, value, p.output)
