"""Time per op: the model's ops, wrapped in clocks and counters."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..ops import reference

NOT_OPS = ("backend", "origin", "prepare", "num_threads", "deferred", "recompute")


@dataclass
class Entry:
    """What one op cost, summed over all calls."""

    origin: str
    calls: int = 0
    seconds: float = 0.0
    operations: int = 0


def profile(model: Any, x: np.ndarray, runs: int = 5) -> tuple[dict[str, Entry], float]:
    """({op: cost of one forward pass}, seconds of one pass), means over `runs` passes after a first one.

    What the ops leave over is work of the model itself: means, additions, changes of layout.
    """
    model(x)
    original, finish = model.ops, _finisher(model)
    entries: dict[str, Entry] = {}
    try:
        model.ops = watched(original, entries, finish)
        start = time.perf_counter()
        for _ in range(runs):
            model(x)
        seconds = (time.perf_counter() - start) / runs
    finally:
        model.ops = original
    for entry in entries.values():
        entry.calls //= runs
        entry.seconds /= runs
        entry.operations //= runs
    return dict(sorted(entries.items(), key=lambda item: -item[1].seconds)), seconds


def _finisher(model: Any) -> Callable[[], None]:
    """What waits until a GPU has done what it was told; a clock would see the telling alone."""
    if model.ops.backend != "cupy":
        return lambda: None
    from ..ops.cupy_gpu.device import cupy

    return lambda: cupy.cuda.get_current_stream().synchronize()


def watched(ops: Any, entries: dict[str, Entry], finish: Callable[[], None] = lambda: None) -> SimpleNamespace:
    """The same ops; each call is added to `entries`, with the time until `finish` returns."""
    table = dict(vars(ops), deferred=reference.deferred)
    for name, op in table.items():
        if name not in NOT_OPS:
            table[name] = _watch(name, op, entries, ops.origin[name], finish)
    return SimpleNamespace(**table)


def _watch(
    name: str, op: Callable[..., Any], entries: dict[str, Entry], origin: str, finish: Callable[[], None]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = op(*args, **kwargs)
        finish()
        entry = entries.setdefault(name, Entry(origin))
        entry.seconds += time.perf_counter() - start
        entry.calls += 1
        entry.operations += operations(name, args, result)
        return result

    return call


def operations(name: str, args: tuple[Any, ...], result: Any) -> int:
    """Floating-point operations of the products in one call, by the direct count (see `flops`)."""
    if name in ("linear", "linear_activation", "linear_residual"):
        return 2 * result.size * args[0].shape[-1]
    if name == "project_qkv":
        return 2 * sum(part.size for part in result) * args[0].shape[-1]
    if name == "attention":
        q = args[0]  # (B, H, N, d)
        return 4 * q.size * q.shape[2]
    if name in ("conv2d", "conv_bn_relu"):
        return 2 * result.size * args[0].shape[1] * _taps(args[1])
    if name == "conv_bn_relu_resized":
        return 2 * result.size * sum(x.shape[1] for x in args[0]) * _taps(args[1])
    if name in ("conv_transpose", "conv_transpose_bn_gelu"):
        return 2 * result.size * args[0].shape[1]  # a pixel of the result has one tap
    return 0


def _taps(layer: Any) -> int:
    """Numbers of the kernel window; packed layers are linear (one) or 3x3, in `parts`."""
    weight = getattr(getattr(layer, "conv", layer), "weight", None)
    if isinstance(weight, np.ndarray):
        return weight.shape[2] * weight.shape[3]
    if hasattr(layer, "taps"):  # of a GPU: one matrix each
        return len(layer.taps)
    return 9 if hasattr(layer, "parts") else 1
