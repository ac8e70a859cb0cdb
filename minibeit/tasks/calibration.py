"""What int8 can learn from images: how large the channels after every layer norm become."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..trace import Trace

Array = Any
_NORMS = ("norm1", "norm2")


def channel_spans(model: Any, batches: Iterable[Array]) -> list[tuple[Array, Array]]:  # (B, C, height, width) each
    """For every block the largest magnitudes of the channels after its two norms, (D,) each, over all pixel values.

    `model` is of any task, in float32 or float64.  Raises ValueError if there are no batches.
    """
    blocks = model.config.num_hidden_layers
    names = [tuple(f"encoder.{i}.{norm}" for norm in _NORMS) for i in range(blocks)]
    largest: dict[str, Array] = {}
    for pixel_values in batches:
        trace = Trace([f"encoder.*.{norm}" for norm in _NORMS])
        model(pixel_values, trace=trace)
        for name, array in trace.items():
            found = abs(array).reshape(-1, array.shape[-1]).max(0)
            before = largest.get(name)
            largest[name] = found if before is None else (found + before + abs(found - before)) / 2  # the larger one
    if not largest:
        raise ValueError("calibration: expected at least one image, found none")
    return [(largest[first], largest[second]) for first, second in names]
