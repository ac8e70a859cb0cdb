"""Time per op: the model's ops, wrapped with timers and counters."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..ops import backward, reference
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
    return _profile(model, model, x, runs)


def profile_step(step: Any, x: np.ndarray, runs: int = 5) -> tuple[dict[str, Entry], float]:
    """The same of a training step (see `training.Step`); an op's backward is an entry of its own."""
    return _profile(step, step.model, x, runs)


def _profile(run: Callable[[np.ndarray], Any], model: Any, x: np.ndarray, runs: int) -> tuple[dict[str, Entry], float]:
    run(x)
    original, finish = model.ops, _finisher(model)
    entries: dict[str, Entry] = {}
    try:
        model.ops = watched(original, entries, finish)
        start = time.perf_counter()
        for _ in range(runs):
            run(x)
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
    """The same ops and their halves for a tape; each call adds to `entries` the time until `finish` returns."""
    table = dict(vars(ops), queued=reference.queued)
    for name in (*names_of(ARITHMETIC, ARRAYS), "adamw"):
        table[name] = _watch(name, table[name], entries, ops.origin[name], finish, operations)
        for half, count in (("forward", _forward_operations), ("backward", _backward_operations)):
            full = f"{name}_{half}"
            own = getattr(ops, full, None)
            origin = ops.backend if own is not None else "numpy"
            function = own or getattr(backward, full, None)
            if function is not None:
                table[full] = _watch(full, function, entries, origin, finish, count)
    return SimpleNamespace(**table)


def _watch(
    name: str,
    op: Callable[..., Any],
    entries: dict[str, Entry],
    origin: str,
    finish: Callable[[], None],
    count: Callable[..., int],
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = op(*args, **kwargs)
        finish()
        entry = entries.setdefault(name, Entry(origin))
        entry.seconds += time.perf_counter() - start
        entry.calls += 1
        entry.operations += count(name, args, result)
        return result

    return call


def operations(name: str, args: tuple[Any, ...], result: Any) -> int:
    """Floating-point operations of the products in one call, by the direct count (see `flops`)."""
    products = TABLE[name].products
    return 0 if products is None else 2 * products(args, result)


def _forward_operations(name: str, args: tuple[Any, ...], result: Any) -> int:
    return operations(name.removesuffix("_forward"), args, result[0])


def _backward_operations(name: str, args: tuple[Any, ...], result: Any) -> int:
    """Two products for each of the forward, whose result had the shape of the cotangent."""
    g, _, *rest = args
    return 2 * operations(name.removesuffix("_backward"), tuple(rest), g)
