"""The training loop: batches, gradients, steps, evaluation, and what is saved when."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..image_processor import BeitImageProcessor
from ..model.masked_modeling import IGNORE_INDEX
from ..noise import Noise
from ..params import flatten, unflatten
from ..trace import Trace
from .augment import mixed, smoothed
from .batches import ahead, in_batches, judged_pixels, order_of, training_pixels
from .examples import MULTI, SINGLE, Example, Examples
from .gradients import Gradients, value_and_grad
from .metrics import better, draw_curves, metrics, right_answers, write_log
from .optimizer import AdamW, AverageOfWeights, clipped, global_norm
from .recipes import Recipe
from .schedule import Cosine
from .state import State, Stopped, StopSign, digest, load_state, save_state, stop_signals

LOG_NAME, CURVES_NAME = "log.jsonl", "curves.png"
SAVE_SECONDS = 600  # within an epoch the state is saved so often
MIXING = 1 << 20  # keeps the generators of mixup apart from those of pictures


@dataclass(frozen=True)
class Progress:
    """What a step has to tell: means of the epoch so far, pictures a second, and the seconds left."""

    step: int
    steps: int
    epoch: int
    loss: float
    accuracy: float
    images_per_s: float
    seconds_left: float


class NotFinite(ValueError):
    """The loss or a gradient is NaN or infinite; the message names the first array that is not finite."""


class Trainer:
    """Trains a `BeitForImageClassification` on `examples` as `recipe` says; `folder` gets the best model.

    `frozen` has the names or patterns of what is not learned, `accumulate` in how many pieces a batch is computed,
    `recompute` trades time for memory, `workers` threads decode pictures.  `tell` gets a `Progress` after each step.
    The result depends on `seed` and on nothing else: not on the number of workers, nor on stops in between.
    """

    def __init__(
        self,
        model: Any,
        examples: Examples,
        processor: BeitImageProcessor,
        recipe: Recipe,
        folder: str | os.PathLike[str],
        *,
        seed: int = 0,
        frozen: str | Iterable[str] = (),
        accumulate: int = 1,
        recompute: bool = False,
        workers: int = 2,
        tell: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.model, self.examples, self.processor, self.recipe = model, examples, processor, recipe
        self.folder, self.seed, self.recompute, self.workers, self.tell = Path(folder), seed, recompute, workers, tell
        self.frozen = (frozen,) if isinstance(frozen, str) else tuple(frozen)
        self.batch_size = min(recipe.batch_size, len(examples.train))
        self.pieces = min(accumulate, self.batch_size)
        self.steps_per_epoch = len(examples.train) // self.batch_size  # what is left over waits for another epoch
        self.steps = recipe.epochs * self.steps_per_epoch
        self.identity = {
            "pictures, labels or split": examples.fingerprint,
            "settings": digest([dataclasses.asdict(recipe), seed, self.frozen, accumulate]),
            "config": digest(model.config.to_dict()),
            "weights of --model": digest(dict(model.arrays)),
        }
        self.optimizer = AdamW(
            model,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            decay_tables=recipe.decay_tables,
            frozen=self.frozen,
        )
        self.optimizer.slots = [
            replace(slot, rate=slot.rate * recipe.table_rate) if slot.name.endswith("bias_table") else slot
            for slot in self.optimizer.slots
        ]
        warmup = min(round(recipe.warmup * self.steps_per_epoch), self.steps - 1)
        self.schedule = Cosine(recipe.lr, self.steps, warmup, min(recipe.floor, recipe.lr))
        self.average = AverageOfWeights(self.optimizer, recipe.average) if recipe.average else None
        self.state = State()

    def run(self) -> list[dict[str, Any]]:
        """Trains to the end and returns a row of numbers for each epoch.

        Raises Stopped when the user stops it, the state being saved; NotFinite when the loss is not a number.
        """
        with stop_signals() as sign, np.errstate(all="ignore"):
            while len(self.state.history) < self.recipe.epochs:
                self._train_epoch(sign)
                self._end_epoch(sign)
        return self.state.history

    def resume(self) -> None:
        """Takes up the state that `folder` holds.  Raises FileNotFoundError, and ValueError for another's state."""
        self.state, vectors = load_state(self.folder, self.identity)
        for name, vector in self._vectors().items():
            vector[...] = vectors[name]

    def evaluate(self, examples: Sequence[Example], sign: StopSign | None = None) -> dict[str, float]:
        """The metrics of the model on pictures as `minibeit classify` would read them."""
        logits = []
        for _, pixels in in_batches(examples, self.batch_size, self._judged_pixels, self.workers):
            logits.append(self.model(pixels).logits)
            if sign is not None and sign.asked:
                raise Stopped
        problem = self.examples.problem
        return metrics(np.concatenate(logits), self.examples.targets(examples), problem)

    # One epoch --------------------------------------------------------------------------------------------------------

    def _train_epoch(self, sign: StopSign) -> None:
        started, saved, first = time.monotonic(), time.monotonic(), self.state.step
        for chosen, pixels in self._batches():
            self._step(chosen, pixels)
            seconds = time.monotonic() - started
            self.tell(self._progress((self.state.step - first) / max(seconds, 1e-9)))
            if sign.asked:
                self._stop()
            if time.monotonic() - saved > SAVE_SECONDS:
                self._save()
                saved = time.monotonic()

    def _batches(self) -> Iterator[tuple[list[Example], np.ndarray]]:
        """The batches of the epoch at hand that have not been used yet."""
        epoch, size = len(self.state.history), self.batch_size
        order = order_of(len(self.examples.train), self.seed, epoch)[: self.steps_per_epoch * size]
        left = order[(self.state.step - epoch * self.steps_per_epoch) * size :].tolist()
        shape = self.model.config.image_shape

        def read(i: int) -> np.ndarray:
            key = (self.seed, epoch, i)
            return training_pixels(self.examples.train[i], self.recipe, self.processor, shape, key)

        pixels = ahead(left, read, self.workers, 2 * size)
        for start in range(0, len(left), size):
            chosen = [self.examples.train[i] for i in left[start : start + size]]
            yield chosen, np.stack([next(pixels) for _ in chosen])

    def _step(self, chosen: list[Example], pixels: np.ndarray) -> None:
        state = self.state
        labels = self.examples.targets(chosen)
        pixels, targets = self._mixed(pixels, labels)
        found = self._gradients(pixels, targets)
        norm = global_norm(found.grads)
        if not (math.isfinite(found.loss) and math.isfinite(norm)):
            raise NotFinite(self._first_not_finite(found, pixels))
        grads = clipped(found.grads, self.recipe.clip)[0] if self.recipe.clip else found.grads
        self.optimizer.step(grads, self.schedule(state.step))
        if self.average is not None:
            self.average.update()
        state.step += 1
        state.seen += len(chosen)
        state.loss_sum += found.loss * len(chosen)
        state.right += right_answers(found.output, targets, self.examples.problem)

    def _mixed(self, pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        recipe, K = self.recipe, len(self.examples.names)
        if self.examples.problem != SINGLE or not (recipe.mixup or recipe.cutmix):
            return pixels, labels
        rng = np.random.default_rng([self.seed, self.state.step, MIXING])
        return mixed(pixels, smoothed(labels, K, recipe.smoothing), recipe, rng)

    def _gradients(self, pixels: np.ndarray, targets: np.ndarray) -> Gradients:
        """Loss, gradients and logits of a batch, computed in pieces."""
        parts = np.array_split(np.arange(len(pixels)), self.pieces)
        total: dict[str, np.ndarray] = {}
        loss, logits, grads = 0.0, [], None
        for part in parts:
            found = value_and_grad(
                self.model,
                pixels[part],
                loss=self._loss(targets[part]),
                rng=Noise(self.seed, self.state.step, first_sample=int(part[0])),
                frozen=self.frozen,
                recompute=self.recompute,
            )
            if len(parts) == 1:
                return replace(found, output=found.output.logits)
            share = len(part) / len(pixels)
            loss += found.loss * share
            logits.append(found.output.logits)
            grads = found.grads
            for name, g in flatten(grads).items():
                scaled = g * g.dtype.type(share)
                total[name] = total[name] + scaled if name in total else scaled
        assert grads is not None
        return Gradients(loss, unflatten(grads, total), np.concatenate(logits), {})

    def _loss(self, targets: np.ndarray) -> Callable[[Any, Any], Any]:
        problem, smoothing = self.examples.problem, self.recipe.smoothing
        if problem == MULTI:
            return lambda ops, output: ops.bce_with_logits(output.logits, targets)
        if problem != SINGLE:
            return lambda ops, output: ops.mse_loss(output.logits, targets)
        if targets.ndim == 2:
            return lambda ops, output: ops.soft_cross_entropy(output.logits, targets)
        return lambda ops, output: ops.cross_entropy(output.logits, targets, IGNORE_INDEX, smoothing)

    def _end_epoch(self, sign: StopSign) -> None:
        state = self.state
        row: dict[str, Any] = {"epoch": len(state.history) + 1, "step": state.step}
        row.update(lr=self.schedule(state.step - 1), train_loss=state.loss_sum / state.seen)
        if self.examples.problem in (SINGLE, MULTI):
            row["train_accuracy"] = state.right / state.seen
        try:
            with self.average.in_use() if self.average is not None else contextlib.nullcontext():
                self._judge(row, sign)
        except Stopped:  # the model has its own weights again, which are the ones to save
            self._stop()
        self.state = State(state.step, [*state.history, row])
        self._save()
        write_log(self.folder / LOG_NAME, self.state.history)
        draw_curves(self.folder / CURVES_NAME, self.state.history)

    def _judge(self, row: dict[str, Any], sign: StopSign) -> None:
        """Evaluates, and writes the model if none was better."""
        if self.examples.held_out:
            judged = self.evaluate(self.examples.held_out, sign)
            row.update({f"held_out_{name}": value for name, value in judged.items()})
        self._check_weights()
        best = next((r for r in reversed(self.state.history) if r["best"]), None)
        row["best"] = better(row, best, self.examples.problem)
        if row["best"]:
            self.processor.save_pretrained(self.folder)
            self.model.save_pretrained(self.folder)

    # What is kept -----------------------------------------------------------------------------------------------------

    def _vectors(self) -> dict[str, np.ndarray]:
        o = self.optimizer
        vectors = {"weights": o.weights, "mean": o.mean, "square": o.square, "steps": o.steps}
        return vectors if self.average is None else {**vectors, "average": self.average.average}

    def _save(self) -> None:
        self._check_weights()
        save_state(self.folder, self.state, self._vectors(), self.identity)

    def _stop(self) -> None:
        self._save()
        raise Stopped(f"stopped after step {self.state.step} of {self.steps}, which is saved in {self.folder}")

    def _progress(self, steps_per_s: float) -> Progress:
        s = self.state
        left = (self.steps - s.step) / steps_per_s
        rate = steps_per_s * self.batch_size
        return Progress(
            s.step, self.steps, len(s.history) + 1, s.loss_sum / s.seen, s.right / s.seen, rate, left
        )  # fmt: skip

    def _judged_pixels(self, example: Example) -> np.ndarray:
        return judged_pixels(example, self.processor)

    # What is not finite -----------------------------------------------------------------------------------------------

    def _check_weights(self) -> None:
        if not np.isfinite(self.optimizer.weights).all():
            raise NotFinite(self._sentence(f"the weights {_first(flatten(self.model.plain_params))}"))

    def _first_not_finite(self, found: Gradients, pixels: np.ndarray) -> str:
        """The first of pixels, weights, the forward's arrays and, from the loss backwards, the gradients."""
        if not np.isfinite(pixels).all():
            return self._sentence("the pixel values")
        if name := _first(flatten(self.model.plain_params)):
            return self._sentence(f"the weights {name}")
        if not math.isfinite(found.loss):
            trace = Trace()
            with contextlib.suppress(ValueError):
                self.model(pixels, rng=Noise(self.seed, self.state.step), trace=trace)
            return self._sentence(_first(trace) or "the loss itself")
        return self._sentence(f"the gradient of {_first(dict(reversed(flatten(found.grads).items())))}")

    def _sentence(self, what: str) -> str:
        kept = f"what {self.folder} holds is of epoch {len(self.state.history)}" if self.state.history else ""
        return (
            f"step {self.state.step + 1}: the loss is no number any more, the first array that is not finite is "
            f"{what}; {kept or 'nothing was written'}; try a smaller --lr or a --clip of 1"
        )


def _first(arrays: Any) -> str | None:
    return next((name for name, array in arrays.items() if not np.isfinite(np.asarray(array)).all()), None)
