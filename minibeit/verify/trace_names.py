"""The names and shapes of every intermediate of a model, without computing one: a pass over arrays that hold nothing.

This is the list that documents the trace format (`minibeit verify --list-names`), and it cannot go out of date.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..ops import get_ops
from ..ops.table import TABLE, Op
from ..trace import Trace
from .networks import network, pixel_shape, shapes_of

Shape = tuple[int, ...]
TOKENS = "tokens"  # the one array of integers: what a tokenizer chose


def trace_shapes(config: Any, task: str, inputs: Mapping[str, Shape] | None = None) -> dict[str, Shape]:
    """{name: shape} of everything a call records, in order.

    `inputs` are the shapes of the call's arrays, by default one image of the native size.
    """
    trace = Trace()
    _ghost_run(config, task, inputs or {"pixel_values": (1, *pixel_shape(config))}, trace)
    return {name: tuple(array.shape) for name, array in trace.items()}


def describe(shapes: Mapping[str, Shape]) -> str:
    """The list as text: one name and shape a line, alike blocks written once."""
    lines = []
    for name, shape in shapes.items():
        words = name.split(".")
        if words[0] == "encoder" and words[1].isdigit():
            if words[1] != "0":
                continue
            words[1] = "*"
        lines.append(f"{'.'.join(words):36} {shape}")
    return "\n".join(lines)


def _ghost_run(config: Any, task: str, inputs: Mapping[str, Shape], trace: Trace) -> None:
    arrays = {name: _ghost(shape) for name, shape in shapes_of(config, task).items()}
    model = network(config, task, arrays, backend="numpy")
    ghosts = {name: _ghost_op(entry) for name, entry in TABLE.items() if entry.shape is not None}
    ops = vars(get_ops("numpy")) | ghosts | {"all_finite": lambda x, most=None: True}
    model.ops = SimpleNamespace(**ops)
    model(
        **{name: _ghost(shape, bool if "mask" in name else np.float32) for name, shape in inputs.items()}, trace=trace
    )


def _ghost(shape: Shape, dtype: Any = np.float32) -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype), shape)  # one number, seen many times


def _ghost_op(op: Op) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        assert op.shape is not None
        shape = op.shape(*args, **kwargs)
        return tuple(map(_ghost, shape)) if isinstance(shape, list) else _ghost(shape)

    return call
