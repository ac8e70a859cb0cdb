"""AdamW on the device: one launch for all parameters, and nothing that the host waits for.

Whether a step is finite, how much it is clipped and what becomes of the loss scale is decided there too; the host is
told afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from .device import cupy

Array = Any
THREADS = 256
CHUNK = 1 << 13  # elements of a block
ALIGNED = 64  # elements: parameters begin where wide loads may
FACTORS = 5  # of each parameter, as in optimizer.cu
TOLD = ("loss", "norm", "scale", "good", "finite")  # what `DeviceAdamW.step` returns, in this order


@cache
def _function(name: str, dtype: str, device: int) -> Any:
    return _module(dtype, device).get_function(name)


@cache
def _module(dtype: str, device: int) -> Any:
    text = resources.files(__package__).joinpath("optimizer.cu").read_text()
    type_ = {"float32": "float", "float64": "double"}[dtype]
    return cupy.RawModule(code=f"typedef {type_} A;\n#define THREADS {THREADS}\n{text}", options=("--std=c++17",))


def _launch(name: str, like: Array, blocks: int, *args: Any) -> None:
    _function(name, like.dtype.name, cupy.cuda.runtime.getDevice())((blocks,), (THREADS,), args)


class DeviceAdamW:
    """The moments of flat weights, and their update: see `reference.adamw`.

    `places` are (first element, end, factor of the rate, decay) of each parameter.  The gradients are those of the
    loss times `scale`; with an `interval` the scale is halved by every step whose gradients are not finite, which is
    left out, and doubled after so many that are.  Without one, or if it is the loss, nothing is updated any more.
    """

    def __init__(
        self,
        weights: Array,
        places: Sequence[tuple[int, int, float, float]],
        betas: tuple[float, float],
        eps: float,
        interval: int = 0,
        scale: float = 1.0,
    ) -> None:
        self.weights, self.betas, self.eps, self.interval = weights, betas, eps, interval
        self.mean, self.square = cupy.zeros_like(weights), cupy.zeros_like(weights)
        self.steps = cupy.zeros(len(places), np.int64)
        chunks = [
            (number, start, min(start + CHUNK, end))
            for number, (first, end, *_) in enumerate(places)
            for start in range(first, end, CHUNK)
        ]
        self._chunks, self._blocks = cupy.asarray(np.array(chunks, np.int64)), len(chunks)
        self._rates = cupy.asarray(np.array([rate for *_, rate, _ in places], np.float64))
        self._decays = cupy.asarray(np.array([decay for *_, decay in places], np.float64))
        self._factors = cupy.empty((len(places), FACTORS), np.float64)
        self._sums = cupy.empty(len(chunks), np.float64)
        self._present = cupy.ones(len(places), np.uint8)
        self._seen: tuple[bool, ...] = (True,) * len(places)
        self.control = cupy.asarray(np.array([scale, 0, 0], np.float64))

    def step(self, gradient: Array, loss: Array, seen: Sequence[bool], rate: float, largest: float) -> Array:
        """One step by a flat gradient, clipped to the norm `largest`; what came of it (`TOLD`), on the device.

        `seen` says which parameters have a gradient; the others stay as they are.
        """
        if tuple(seen) != self._seen:
            self._seen = tuple(seen)
            self._present = cupy.asarray(np.array(self._seen, np.uint8))
        told, (b1, b2) = cupy.empty(len(TOLD), np.float64), self.betas
        _launch("sums_of_squares", gradient, self._blocks, gradient, self._chunks, self._present, self._sums)
        _launch(
            "plan", gradient, 1, self._sums, self._blocks, loss, self._present, self._rates, self._decays, self.steps,
            self._factors, self.control, told, len(self._seen), float(rate), b1, b2, float(largest), self.interval,
        )  # fmt: skip
        _launch(
            "adamw", gradient, self._blocks, self.weights, gradient, self.mean, self.square, self._chunks,
            self._factors, b1, b2, self.eps,
        )  # fmt: skip
        return told

    def set_scale(self, scale: float, good: int) -> None:
        """The loss scale, and how many good steps it has seen."""
        self.control[...] = cupy.asarray(np.array([scale, good, 0], np.float64))

    def scaled(self, share: float) -> Array:  # -> ()
        """What the backward begins with: the loss scale times a share of the loss."""
        return (self.control[0] * share).astype(self.weights.dtype)


def update_average(average: Array, weights: Array, decay: float) -> None:
    """a = decay a + (1 - decay) w, in place."""
    _launch("average", weights, -(-weights.size // THREADS), average, weights, weights.size, 1 - decay)
