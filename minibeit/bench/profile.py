"""Time per op: the model's ops, wrapped with timers and counters."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..ops import reference
from ..ops.table import ARITHMETIC, ARRAYS, TABLE, names_of


@dataclass
class Entry:
    """What one op cost, summed over all calls."""

    origin: str
    calls: int = 0
    seconds: float = 0.0
    operations: int = 0


def profile(model: Any, x: np.ndarray, runs: int = 5) -> tuple[dict[str, Entry], float]:
    """({op: cost of one forward pass}, seconds of one pass), means over `runs` passes after a first one.

    The time not in ops is spent in the model's own Python code: changes of layout and the like.
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
    """A function that waits for a GPU to finish; otherwise only the launches would be timed."""
    if model.ops.backend != "cupy":
        return lambda: None
    from ..ops.cupy_gpu.device import cupy

    return lambda: cupy.cuda.get_current_stream().synchronize()


def watched(ops: Any, entries: dict[str, Entry], finish: Callable[[], None] = lambda: None) -> SimpleNamespace:
    """The same ops, each call of which adds to `entries` the time until `finish` returns."""
    table = dict(vars(ops), queued=reference.queued)
    for name in names_of(ARITHMETIC, ARRAYS):
        table[name] = _watch(name, table[name], entries, ops.origin[name], finish)
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
    products = TABLE[name].products
    return 0 if products is None else 2 * products(args, result)
