"""`prepare`: the parameters on the device, in the layout of products and kernels, made once when a model is loaded.

Matrices are stored in the model's dtype; biases, norms, layer scales and bias tables in the dtype of model code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...params import (
    Attention,
    BatchNorm,
    Conv,
    ConvBatchNorm,
    ConvTranspose,
    LayerNorm,
    Linear,
    ReluConv,
    UperHead,
)  # fmt: skip
from ..folding import fold
from .device import cupy
from .kernels import compute_dtype, to_storage
from .winograd import transformed

Array = Any


@dataclass(frozen=True)
class DeviceLinear:
    """A linear layer, or a convolution with flattened kernels."""

    weight: Array  # (out, in * kernel height * kernel width)
    bias: Array | None  # (out,)
    dtype: str
    kernel: tuple[int, int] = (1, 1)
    source: Any = None


@dataclass(frozen=True)
class DeviceAttention:
    """Query, key and value as one layer of 3 D outputs, beside the output projection."""

    qkv: DeviceLinear
    output: DeviceLinear
    source: Any = None


@dataclass(frozen=True)
class DeviceNorm:
    """A layer norm."""

    weight: Array  # (D,)
    bias: Array  # (D,)
    dtype: str
    source: Any = None


@dataclass(frozen=True)
class DeviceConv:
    """A convolution with odd square kernels as one matrix per tap; a batch norm behind it is folded in."""

    taps: Array  # (side * side, out, C)
    bias: Array  # (out,)
    winograd: Array | None  # (16, out, leading channels, which see maps of full size)
    dtype: str
    source: Any = None

    @property
    def side(self) -> int:
        return round(len(self.taps) ** 0.5)


@dataclass(frozen=True)
class DeviceDeconv:
    """A 2x2 transposed convolution of stride 2 as one product: outputs in the order row, column, channel."""

    weight: Array  # (4 * out, C)
    bias: Array  # (out,)
    dtype: str
    source: Any = None


@dataclass(frozen=True)
class DeviceBatchNorm:
    """x scale + shift."""

    scale: Array  # (C,)
    shift: Array  # (C,)
    source: Any = None


def prepare(params: Any, keep_source: bool = False, dtype: str = "float32") -> Any:
    """Uploads a parameter tree for a model of that dtype.

    `keep_source` keeps the original leaves in `.source`, for NumPy ops that run beside those of the device.
    """
    return _Preparation(dtype, keep_source).tree(params)


@dataclass(frozen=True)
class _Preparation:
    dtype: str
    keep_source: bool

    def tree(self, p: Any) -> Any:
        makers: dict[type, Callable[[Any], Any]] = {
            Linear: self.linear,
            Conv: self.conv,
            ReluConv: self.relu_conv,
            LayerNorm: self.norm,
            BatchNorm: self.batch_norm,
            ConvTranspose: self.deconv,
            ConvBatchNorm: self.conv_bn,
            Attention: self.attention,
            UperHead: self.head,
        }
        maker = makers.get(type(p))
        if maker is not None:
            return maker(p)
        if isinstance(p, tuple):
            return tuple(map(self.tree, p))
        if dataclasses.is_dataclass(p):
            fields = {f.name: self.tree(getattr(p, f.name)) for f in dataclasses.fields(p)}
            return dataclasses.replace(p, **fields)  # type: ignore[type-var]
        return self.seen(p) if hasattr(p, "shape") else p

    def linear(self, p: Linear) -> DeviceLinear:
        return DeviceLinear(self.matrix(p.weight), self.optional(p.bias), self.dtype, source=self.source(p))

    def conv(self, p: Conv) -> DeviceLinear:
        out, _, kh, kw = p.weight.shape
        weight = self.matrix(np.reshape(p.weight, (out, -1)))
        return DeviceLinear(weight, self.optional(p.bias), self.dtype, (kh, kw), self.source(p))

    def relu_conv(self, p: ReluConv) -> DeviceConv:
        weight = np.asarray(p.weight)
        out, C, side, _ = weight.shape
        taps = self.matrix(weight.reshape(out, C, side * side).transpose(2, 0, 1))
        winograd = self.seen(transformed(weight)) if side == 3 and self.dtype == "float32" else None
        return DeviceConv(taps, self.seen(p.bias), winograd, self.dtype, self.source(p))

    def norm(self, p: LayerNorm) -> DeviceNorm:
        return DeviceNorm(self.seen(p.weight), self.seen(p.bias), self.dtype, self.source(p))

    def batch_norm(self, p: BatchNorm) -> DeviceBatchNorm:
        scale, shift = fold(p)
        return DeviceBatchNorm(self.seen(scale), self.seen(shift), self.source(p))

    def deconv(self, p: ConvTranspose) -> DeviceDeconv:
        weight = np.transpose(p.weight, (2, 3, 1, 0)).reshape(-1, p.weight.shape[0])
        return DeviceDeconv(self.matrix(weight), self.seen(p.bias), self.dtype, self.source(p))

    def attention(self, p: Attention) -> DeviceAttention:
        layers = (p.query, p.key, p.value)
        biases = [np.zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
        weight = self.matrix(np.concatenate([layer.weight for layer in layers]))
        qkv = DeviceLinear(weight, self.seen(np.concatenate(biases)), self.dtype)
        return DeviceAttention(qkv, self.linear(p.output), self.source(p))

    def conv_bn(self, p: ConvBatchNorm, full_size: int = 0) -> DeviceConv:
        """The first `full_size` input channels come from maps of the output's size; Winograd is used for them."""
        scale, shift = fold(p.bn, p.conv.bias)
        weight = np.asarray(p.conv.weight) * scale[:, None, None, None]  # float64
        out, C, side, _ = weight.shape
        taps = self.matrix(weight.reshape(out, C, side * side).transpose(2, 0, 1))
        fast = full_size > 0 and side == 3 and self.dtype == "float32"
        winograd = self.seen(transformed(weight[:, :full_size])) if fast else None
        return DeviceConv(taps, self.seen(shift), winograd, self.dtype, self.source(p))

    def head(self, p: UperHead) -> UperHead:
        """The head's layers, with Winograd's form for maps of full size; the map of `psp_bottleneck` is small."""
        out, C = p.fpn_bottleneck.conv.weight.shape[:2]
        fast: dict[str, Any] = {
            "fpn_convs": tuple(self.conv_bn(layer, layer.conv.weight.shape[1]) for layer in p.fpn_convs),
            "fpn_bottleneck": self.conv_bn(p.fpn_bottleneck, min(out, C)),  # the first of its four maps
        }
        names = [f.name for f in dataclasses.fields(p) if f.name not in fast]
        return UperHead(**fast, **{name: self.tree(getattr(p, name)) for name in names})

    def source(self, p: Any) -> Any:
        return p if self.keep_source else None

    def seen(self, array: Array) -> Array:
        """`array` on the device.  Tables are stored by column, as kernels read one head of a bias table at a time."""
        array = np.asarray(array, compute_dtype(self.dtype))
        if array.ndim == 2:
            return cupy.asarray(np.ascontiguousarray(array.T)).T
        return cupy.asarray(np.ascontiguousarray(array))

    def optional(self, array: Array | None) -> Array | None:
        return None if array is None else self.seen(array)

    def matrix(self, array: Array) -> Array:
        return to_storage(cupy.asarray(np.ascontiguousarray(array, compute_dtype(self.dtype))), self.dtype)
