"""The names and shapes of every intermediate of a model, without computing one: a pass over arrays that hold nothing.

This is the list that documents the trace format (`minibeit verify --list-names`), and it cannot go out of date.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..config import BeitConfig
from ..ops import reference
from ..params import param_shapes
from ..trace import Trace
from .exact import task_class

Shape = tuple[int, ...]


def trace_shapes(config: BeitConfig, task: str, inputs: Mapping[str, Shape] | None = None) -> dict[str, Shape]:
    """{name: shape} of everything a call records, in order.

    `inputs` are the shapes of the call's arrays, by default one image of the native size.
    """
    trace = Trace()
    _ghost_run(config, task, inputs or {"pixel_values": (1, config.num_channels, *config.image_shape)}, trace)
    return {name: tuple(array.shape) for name, array in trace.items()}


def describe(shapes: Mapping[str, Shape]) -> str:
    """The list as text: one name and shape a line, alike blocks written once."""
    lines = []
    for name, shape in shapes.items():
        words = name.split(".")
        if words[0] == "encoder":
            if words[1] != "0":
                continue
            words[1] = "*"
        lines.append(f"{'.'.join(words):36} {shape}")
    return "\n".join(lines)


def _ghost_run(config: BeitConfig, task: str, inputs: Mapping[str, Shape], trace: Trace) -> None:
    arrays = {name: _ghost(shape) for name, shape in param_shapes(config, task).items()}
    model = task_class(task)(config, arrays=arrays, backend="numpy")
    ops = {name: getattr(reference, name) for name in reference.__all__} | GHOST_OPS
    model.ops = SimpleNamespace(backend="numpy", origin={}, **ops)
    model(
        **{name: _ghost(shape, bool if "mask" in name else np.float32) for name, shape in inputs.items()}, trace=trace
    )


def _ghost(shape: Shape, dtype: Any = np.float32) -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype), shape)  # one number, seen many times


def _linear(x: Any, layer: Any, *_: Any) -> np.ndarray:
    return _ghost((*x.shape[:-1], layer.weight.shape[0]))


def _qkv(x: Any, p: Any, num_heads: int) -> tuple[np.ndarray, ...]:
    B, N, D = x.shape
    return (_ghost((B, num_heads, N, D // num_heads)),) * 3


def _attention(q: Any, k: Any, v: Any, bias: Any, return_probs: bool = False, keep: Any = None) -> Any:
    B, H, N, d = q.shape
    context = _ghost((B, N, H * d))
    return (context, _ghost((B, H, N, N))) if return_probs else context


def _conv(x: Any, conv: Any) -> np.ndarray:
    return _ghost((x.shape[0], conv.weight.shape[0], *x.shape[2:]))


def _deconv(x: Any, deconv: Any, *_: Any) -> np.ndarray:
    return _ghost((x.shape[0], deconv.weight.shape[1], 2 * x.shape[2], 2 * x.shape[3]))


def _resized(x: Any, size: Sequence[int]) -> np.ndarray:
    return _ghost((*x.shape[:2], *size))


GHOST_OPS = {
    "all_finite": lambda x, most=None: True,
    "layer_norm": lambda x, norm, eps: _ghost(x.shape),
    "linear": _linear,
    "linear_activation": _linear,
    "linear_residual": _linear,
    "project_qkv": _qkv,
    "attention": _attention,
    "conv2d": _conv,
    "conv_bn_relu": lambda x, layer: _conv(x, layer.conv),
    "conv_bn_relu_resized": lambda maps, layer, size: _resized(_conv(maps[0], layer.conv), size),
    "conv_transpose": _deconv,
    "conv_transpose_bn_gelu": _deconv,
    "max_pool2x2": lambda x: _ghost((*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)),
    "adaptive_avg_pool": lambda x, size: _resized(x, (size, size)),
    "resize_bilinear": _resized,
    "resize_bicubic": _resized,
}
