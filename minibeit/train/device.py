"""Training on a GPU: weights, gradients, moments and averages stay on the device, and the host runs one step ahead.

The loop is that of `loop.Trainer`.  What is different is where arrays lie and when the host waits: within a step never,
between two only until the device has done the one before.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ..ops.cupy_gpu.device import cupy
from ..ops.cupy_gpu.optimizer import ALIGNED, DeviceAdamW, update_average
from ..ops.cupy_gpu.transfers import Downloads, Uploads
from ..params import flatten, unflatten
from .loop import Learned, NotFinite, Trainer
from .objective import Batch
from .optimizer import AdamW, AverageOfWeights
from .summed import SummedGradients

FIRST_SCALE = 2.0**16  # of the loss in float16
GOOD_STEPS = 2000  # after which the scale is doubled
SMALLEST_SCALE = 1.0  # a step that is not finite at this scale is not a matter of float16's range


class AdamWOnDevice(AdamW):
    """AdamW whose vectors are on the device, in float32 also for a model of a half-precision dtype."""

    aligned = ALIGNED

    def _allocate(self, size: int, dtype: str) -> None:
        places = [(slot.start, slot.stop, slot.rate, slot.decay) for slot in self.slots]
        self.weights = cupy.zeros(size, dtype)
        half = self.half
        self.device = DeviceAdamW(
            self.weights, places, self.betas, self.eps, GOOD_STEPS if half else 0, FIRST_SCALE if half else 1.0
        )

    def _here(self, array: Any) -> Any:
        return array.copy() if isinstance(array, cupy.ndarray) else cupy.asarray(np.ascontiguousarray(array))

    @property
    def half(self) -> bool:
        """Whether the loss is scaled, as gradients in float16 need."""
        return self.dtype == "float16"

    def vectors(self) -> dict[str, np.ndarray]:
        flat = {"weights": self.weights, "mean": self.device.mean, "square": self.device.square}
        return {**{name: self.dense(vector) for name, vector in flat.items()}, "steps": self.device.steps.get()}

    def take_up(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Overwrites the device's vectors by those that `vectors` has returned."""
        for name, vector in {"weights": self.weights, "mean": self.device.mean, "square": self.device.square}.items():
            self.spread(vectors[name], vector)
        self.device.steps.set(vectors["steps"])

    def dense(self, vector: Any) -> np.ndarray:
        """A vector of the device in main memory, without the gaps between slots."""
        host = vector.get()
        return np.concatenate([host[slot.start : slot.stop] for slot in self.slots])

    def spread(self, dense: np.ndarray, vector: Any) -> None:
        """The reverse of `dense`, into `vector`."""
        host, done = np.zeros(vector.shape, vector.dtype), 0
        for slot in self.slots:
            size = slot.stop - slot.start
            host[slot.start : slot.stop] = dense[done : done + size]
            done += size
        vector.set(host)


class AverageOnDevice(AverageOfWeights):
    """The average, updated in one launch."""

    def update(self) -> None:
        update_average(self.average, self.optimizer.weights, self.decay)


class SumsOnDevice(SummedGradients):
    """The vector of all gradients on the device, of every batch."""

    empty = staticmethod(cupy.empty)


@dataclass(frozen=True)
class Begun:
    """A step that the device may still be at."""

    step: int  # steps with it
    batch: Batch
    rate: float
    numbers: Downloads  # what the optimizer told, then what the model said of each piece


class TrainerOnDevice(Trainer):
    """`Trainer` for a model of the backend cupy.  State and checkpoints are the same files, to be resumed on either.

    In float16 the loss is scaled: a step whose gradients overflow is left out and halves the scale, `GOOD_STEPS` good
    ones double it.  Any other step that is not finite changes nothing, nor do those that have begun since.
    """

    optimizer_class, average_class = AdamWOnDevice, AverageOnDevice
    optimizer: AdamWOnDevice
    sums: SumsOnDevice

    def __init__(self, model: Any, *args: Any, **options: Any) -> None:
        self._begun: deque[Begun] = deque()
        with model.ops.num_threads(None):
            super().__init__(model, *args, **options)
            self._uploads = Uploads()

    def run(self) -> list[dict[str, Any]]:
        with self._session():
            return super().run()

    def resume(self) -> None:
        with self._session():
            super().resume()

    @contextmanager
    def _session(self) -> Iterator[None]:
        """On the device.  Raises MemoryError that says what to do about the batch."""
        try:
            with self.model.ops.num_threads(None):
                yield
        except MemoryError as error:
            raise MemoryError(f"{error}; {self._smaller()}") from None

    def _smaller(self) -> str:
        pieces = f" in {self.pieces} pieces" if self.pieces > 1 else ""
        ways = [f"--accumulate {2 * self.pieces}"] if 2 * self.pieces <= len(self.rows) else []
        ways += [] if self.recompute else ["--recompute"]
        return f"a batch of {len(self.rows)}{pieces} does not fit, try {' or '.join(ways) or 'a smaller model'}"

    def _new_sums(self) -> SumsOnDevice:
        return SumsOnDevice(self.optimizer.slots, self.optimizer.weights.dtype, self.ranks)

    # A step -----------------------------------------------------------------------------------------------------------

    def _step(self, batch: Batch) -> None:
        batch, rate = self._mixed(batch), self.rate(self.state.step)
        loss, said = self._backward(batch)
        told = self.optimizer.device.step(self.sums.vector, loss, self.sums.seen(), rate, self.recipe.clip or math.inf)
        if self.average is not None:
            self.average.update()
        self.state.step += 1
        self._begun.append(Begun(self.state.step, batch, rate, Downloads([told, *said])))
        self._read(ahead=1 if self.state.seen else 0)  # an epoch's first step is waited for, to have a loss to show

    def _backward(self, batch: Batch) -> tuple[Any, list[Any]]:
        """(loss, what the model said of each piece); the gradients are then in `sums`."""
        terms, losses, said = self._terms(batch), [], []
        self.sums.begin()
        for piece, samples, last in self._pieces_of(replace(batch, pixels=self._uploads.upload(batch.pixels))):
            share, ready = self.objective.terms(piece) / terms, partial(self.sums.add, last=last)
            found = self._gradients(piece, samples, self.optimizer.device.scaled(share), ready, wait=False)
            losses.append((found.loss * share).astype(self.optimizer.weights.dtype))  # NumPy 1's rules would widen it
            answers = self.objective.said(found.output)
            said += [] if answers is None else [answers]
        loss = sum(losses[1:], losses[0]).reshape(1)
        self.ranks.begin_sum(loss)
        self.sums.end()
        return loss, said

    def _read(self, ahead: int) -> None:
        """Takes in what the steps have found that have begun, but for the last `ahead`."""
        while len(self._begun) > ahead:
            begun = self._begun.popleft()
            told, *said = begun.numbers.wait()
            loss, norm, scale, good, finite = told.tolist()
            if self.optimizer.half:
                self.state.loss_scale, self.state.good_steps = scale, int(good)
            if finite or (self.optimizer.half and math.isfinite(loss) and scale >= SMALLEST_SCALE):
                self._take_in(begun.step, self._judged(loss, begun.batch, said), begun.rate, norm)
            else:
                self._begun.clear()  # they have changed nothing
                self.state.step = begun.step - 1
                raise NotFinite(self._sentence(self._first_not_finite(self._again(begun.batch), begun.batch)))

    def _judged(self, loss: float, batch: Batch, said: list[np.ndarray]) -> Learned:
        pieces = [piece for piece, _, _ in self._pieces_of(batch)]
        pairs = zip(said or itertools.repeat(None), pieces)
        own = np.sum([self.objective.right(answers, piece) for answers, piece in pairs], axis=0)
        right, answers = self.ranks.total(own.astype(np.float64)).tolist()
        return Learned(loss, None, right, int(answers))

    def _again(self, batch: Batch) -> Learned:
        """What a batch has taught, computed a second time from the same weights, to find what was not finite."""
        loss, _ = self._backward(batch)
        named, vector = flatten(self.model.plain_params), self.sums.vector
        grads = {slot.name: vector[slot.start : slot.stop] for slot in self.optimizer.slots}
        tree = unflatten(self.model.plain_params, {name: grads.get(name) for name in named})
        return Learned(float(loss[0]), tree, 0.0, 0)

    # What is kept -----------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        self._read(ahead=0)

    def _vectors(self) -> dict[str, np.ndarray]:
        vectors, host = self.optimizer.vectors(), self.model.ops.to_host
        vectors.update((n, host(a)) for n, a in flatten(self.model.plain_params).items() if ".running_" in n)
        if self.average is not None:
            vectors["average"] = self.optimizer.dense(self.average.average)
        return vectors

    def _take_up(self, vectors: Mapping[str, np.ndarray]) -> None:
        self.optimizer.take_up(vectors)
        for name, array in flatten(self.model.plain_params).items():
            if ".running_" in name:
                array.set(vectors[name])
        if self.average is not None:
            self.optimizer.spread(vectors["average"], self.average.average)
        if self.optimizer.half and self.state.loss_scale:
            self.optimizer.device.set_scale(self.state.loss_scale, self.state.good_steps)

    def _portable(self) -> Any:
        host = self.model.ops.to_host
        model = object.__new__(type(self.model))
        vars(model).update(vars(self.model), _arrays={n: host(a) for n, a in self.model.arrays.items()})
        return model

    def _for_inference(self) -> Any:
        model = self._portable()
        model.params = model.ops.prepare(model.plain_params)
        return model
