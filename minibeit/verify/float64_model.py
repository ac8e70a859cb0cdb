"""The float64 truth: NumPy's ops in double precision on any input, in little memory, with a log of the calls.

Weights that fill memory stay float32 and are widened where they are multiplied, which is exact; everything that takes
part in more than a product is float64 from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..ops import get_ops, reference
from ..ops.table import CONTROL, TABLE, names_of
from ..params import BATCH_NORM_EPS, Conv, ConvBatchNorm, ConvTranspose
from . import engine_arithmetic
from .networks import network

STRIP_BYTES = 16 << 20  # what a strip of rows of a convolution may take
MIXED = ("conv_bn_relu", "conv_bn_relu_resized", "concatenate")  # ops that need no float64 copy of their input


@dataclass
class Call:
    """One op as it was called; its arguments are kept as they came, which takes half the memory."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def wide_args(self) -> tuple[Any, ...]:
        """The arguments that the op computed with: float64."""
        return tuple([_wide(part) for part in x] if isinstance(x, list) else _wide(x) for x in self.args)


@dataclass
class Log:
    """The calls since the last recorded array."""

    calls: list[Call] = field(default_factory=list)

    def take(self) -> list[Call]:
        calls, self.calls = self.calls, []
        return calls


def truth_model(config: Any, task: str, arrays: Mapping[str, np.ndarray], log: Log | None = None) -> Any:
    """A float64 model with these weights; `log` collects the calls of its ops."""
    named = {name: a if _multiplied_only(name, a) else np.asarray(a, np.float64) for name, a in arrays.items()}
    model = network(config, task, named, dtype="float64", backend="numpy")
    model.ops = double_ops(log)
    return model


def float32_model(config: Any, task: str, arrays: Mapping[str, np.ndarray], seed: int | None = None) -> Any:
    """The NumPy reference in float32 as engines compute it, with the convolutions that need little memory.

    With a `seed` products are added up in random orders.
    """
    named = {name: np.asarray(a, np.float32) for name, a in arrays.items()}
    model = network(config, task, named, dtype="float32", backend="numpy")
    ops = {**vars(model.ops), **LEAN, **ENGINES}
    model.ops = SimpleNamespace(**ops | ({} if seed is None else engine_arithmetic.in_another_order(ops, seed)))
    return model


def double_ops(log: Log | None = None) -> SimpleNamespace:
    """NumPy's ops, every float32 array among their arguments widened first; large maps strip by strip."""
    plain = vars(get_ops("numpy"))
    wrapped = {name: _widened(name, op, log) for name, op in ({name: plain[name] for name in TABLE} | LEAN).items()}
    wrapped |= {name: plain[name] for name in names_of(CONTROL)}
    wrapped["asarray"] = lambda x, dtype: np.asarray(x, np.float64 if np.dtype(dtype).kind == "f" else dtype)
    return SimpleNamespace(**plain | wrapped)


def _multiplied_only(name: str, array: np.ndarray) -> bool:
    return name.endswith(".weight") and array.ndim > 1


def _widened(name: str, op: Callable[..., Any], log: Log | None) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        result = op(*(args if name in MIXED else map(_wide, args)), **kwargs)
        if log is not None:
            log.calls.append(Call(name, args, kwargs, result))
        return result

    return call


def _wide(x: Any) -> Any:
    narrow = isinstance(x, np.ndarray) and x.dtype.kind == "f" and x.dtype != np.float64
    return x.astype(np.float64) if narrow else x


# Convolutions strip by strip ----------------------------------------------------------------------------------------


def conv2d(x: np.ndarray, conv: Conv) -> np.ndarray:  # (B, C, h, w) -> (B, out, h, w)
    """`reference.conv2d`, some rows at a time."""
    y = np.zeros((x.shape[0], conv.weight.shape[0], *x.shape[2:]), x.dtype)
    _add_conv2d(y, x, conv)
    return y


def _add_conv2d(y: np.ndarray, x: np.ndarray, conv: Conv) -> None:
    """Adds the convolution of x, enlarged to the size of y and in its precision, to y."""
    B, out, h, w = y.shape
    kh = conv.weight.shape[2]
    rows = max(1, STRIP_BYTES // (max(x.shape[1], out) * B * w * y.itemsize))
    for first in range(0, h, rows):
        last = min(h, first + rows)
        above, below = max(0, first - kh // 2), min(h, last + kh // 2)
        strip = reference.conv2d(_enlarged(x, (h, w), slice(above, below), y.dtype), conv)
        y[:, :, first:last] += strip[:, :, first - above : strip.shape[2] - (below - last)]


def _enlarged(x: np.ndarray, size: tuple[int, int], rows: slice, dtype: Any) -> np.ndarray:
    """These rows of `reference.resize_bilinear(x, size)`."""
    if x.shape[2] == size[0]:
        part = x[:, :, rows].astype(dtype, copy=False)
    else:
        taps = _resizing(dtype).bilinear_taps(x.shape[2], size[0])
        part = sum(np.take(x, index[rows], 2) * share[rows, None].astype(dtype) for index, share in taps)
    return _resizing(dtype).resize_bilinear(part, (part.shape[2], size[1]))


def conv2d_one_hot(ids: np.ndarray, conv: Conv) -> np.ndarray:  # (B, h, w) -> (B, out, h, w)
    """`reference.conv2d_one_hot`, in the precision of the bias."""
    weight = conv.weight if conv.bias is None else conv.weight.astype(conv.bias.dtype)
    return reference.conv2d_one_hot(ids, Conv(weight, conv.bias))


def conv_bn_relu(x: np.ndarray, layer: ConvBatchNorm) -> np.ndarray:
    """`reference.conv_bn_relu`, some rows at a time, in the precision of the batch norm."""
    return conv_bn_relu_resized([x], layer, x.shape[2:])


def conv_bn_relu_resized(maps: Sequence[np.ndarray], layer: ConvBatchNorm, size: tuple[int, int]) -> np.ndarray:
    """`reference.conv_bn_relu_resized`, one map at a time: a convolution is the sum over its input channels."""
    y = np.zeros((maps[0].shape[0], layer.conv.weight.shape[0], *size), layer.bn.weight.dtype)
    first = 0
    for x in maps:
        last = first + x.shape[1]
        _add_conv2d(y, x, Conv(layer.conv.weight[:, first:last], None))
        first = last
    return _normalised(y, layer)


def conv_transpose(x: np.ndarray, deconv: ConvTranspose) -> np.ndarray:  # (B, C, h, w) -> (B, out, 2h, 2w)
    """`reference.conv_transpose`, some output channels at a time."""
    B, _, h, w = x.shape
    y = np.empty((B, deconv.weight.shape[1], 2 * h, 2 * w), x.dtype)
    for part in _channels(y):
        y[:, part] = reference.conv_transpose(x, ConvTranspose(deconv.weight[:, part], deconv.bias[part]))
    return y


def resize_bilinear(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:  # (B, C, h, w) -> (B, C, *size)
    """`reference.resize_bilinear`, some channels at a time; in float32 as engines place its sources."""
    y = np.empty((*x.shape[:2], *size), x.dtype)
    for part in _channels(y):
        y[:, part] = _resizing(x.dtype).resize_bilinear(x[:, part], size)
    return y


def _resizing(dtype: Any) -> Any:
    """The module whose resizing a run in this precision uses."""
    return reference if np.dtype(dtype) == np.float64 else engine_arithmetic


def _channels(y: np.ndarray) -> Iterator[slice]:
    """Parts of the channels of maps (B, C, h, w) that take about STRIP_BYTES each."""
    count = max(1, STRIP_BYTES // max(y[:, :1].nbytes, 1))
    return (slice(first, first + count) for first in range(0, y.shape[1], count))


def _normalised(y: Any, layer: ConvBatchNorm) -> np.ndarray:
    bn = layer.bn
    scale = bn.weight / np.sqrt(bn.running_var + y.dtype.type(BATCH_NORM_EPS))
    y -= bn.running_mean[:, None, None]
    y *= scale[:, None, None]
    y += bn.bias[:, None, None]
    return np.maximum(y, 0, out=y)


LEAN = {
    op.__name__: op
    for op in (conv2d, conv2d_one_hot, conv_bn_relu, conv_bn_relu_resized, conv_transpose, resize_bilinear)
}
ENGINES = {name: getattr(engine_arithmetic, name) for name in ("mean_patches", "resize_bicubic", "linear_activation")}
