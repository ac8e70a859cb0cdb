"""The training loop: batches, gradients, steps, evaluation, and what is saved when."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..noise import Noise
from ..ops import GPU_BACKENDS
from ..ops.backward.maps import BatchStatistics
from ..params import flatten
from ..trace import Trace
from .batches import in_batches, order_of
from .gradients import Gradients, value_and_grad
from .metrics import better, draw_curves, write_log
from .objective import Batch, Objective
from .optimizer import AdamW, AverageOfWeights, EarlyStep, clipped, set_running
from .ranks import Ranks
from .recipes import Recipe
from .state import State, Stopped, StopSign, digest, load_state, save_state, stop_signals
from .summed import SummedGradients

LOG_NAME, CURVES_NAME = "log.jsonl", "curves.png"
SAVE_SECONDS = 600  # within an epoch the state is saved so often
MIXING = 1 << 20  # keeps the generators of mixup apart from those of images


@dataclass(frozen=True)
class Progress:
    """What a step has to tell: means of the epoch so far, images a second, and the seconds left."""

    step: int
    steps: int
    epoch: int
    loss: float
    accuracy: float | None  # None where nothing is right or wrong
    images_per_s: float
    seconds_left: float


@dataclass(frozen=True)
class Learned:
    """What a batch teaches: its loss, the tree of gradients, how many of its answers were right, and of how many."""

    loss: float
    grads: Any
    right: float
    answers: int


class NotFinite(ValueError):
    """The loss or a gradient is NaN or infinite; the message names the first array that is not finite."""


class Trainer:
    """Trains a model for an `objective` as `recipe` says; `folder` gets the best model.

    `frozen` has the names or patterns of what is not learned, `accumulate` in how many pieces a batch is computed,
    `recompute` trades time for memory, `workers` threads decode images.  `tell` gets a `Progress` after each step,
    `record` the number of the step and named numbers after each step and each epoch.
    The result depends on `seed` and on nothing else: not on the number of workers, nor on stops in between.

    With several `ranks` each makes a trainer of its own with the same arguments.  Every rank reads and computes its
    samples of each batch, and all make the same step; the first alone writes, tells and records.  The result is that
    of one process but for the order in which gradients are added up.
    """

    optimizer_class, average_class = AdamW, AverageOfWeights

    def __init__(
        self,
        model: Any,
        objective: Objective,
        recipe: Recipe,
        folder: str | os.PathLike[str],
        *,
        seed: int = 0,
        frozen: str | Iterable[str] = (),
        accumulate: int = 1,
        recompute: bool = False,
        workers: int = 2,
        tell: Callable[[Progress], None] = lambda progress: None,
        record: Callable[[int, dict[str, float]], None] = lambda step, numbers: None,
        ranks: Ranks | None = None,
    ) -> None:
        if not isinstance(self, trainer_of(model)):
            raise ValueError(
                f"model: expected one on a CPU, found the backend {model.ops.backend}; use trainer_of(model)"
            )
        self.ranks = ranks or Ranks()
        self.model, self.objective, self.recipe, self.folder = model, objective, recipe, Path(folder)
        self.seed, self.recompute, self.workers, self.tell, self.record = seed, recompute, workers, tell, record
        self.frozen = (frozen,) if isinstance(frozen, str) else tuple(frozen)
        self.batch_size = min(recipe.batch_size, len(objective.train))
        shares = self.ranks.shares(self.batch_size)
        self.rows = shares[self.ranks.rank]
        self.pieces = min(accumulate, *map(len, shares))
        self.steps_per_epoch = len(objective.train) // self.batch_size  # what is left over waits for another epoch
        self.steps = recipe.epochs * self.steps_per_epoch
        settings = dataclasses.asdict(dataclasses.replace(recipe, source=""))
        self.identity = {
            "pictures, labels or split": objective.fingerprint,
            "settings": digest([settings, seed, self.frozen, accumulate]),
            "config": digest(model.config.to_dict()),
            "weights of --model": digest(dict(model.arrays)),
            **objective.identity,
        }
        self._check_same(self.identity, "give all of them the same files and options")
        self.optimizer = self.optimizer_class(
            model,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            decay_tables=recipe.decay_tables,
            decay_tokens=recipe.decay_tokens,
            table_rate=recipe.table_rate,
            frozen=self.frozen,
        )
        self.rate = recipe.schedule(self.steps, self.steps_per_epoch)
        self.average = self.average_class(self.optimizer, recipe.average) if recipe.average else None
        self.sums = self._new_sums()
        self.state = State()

    def _new_sums(self) -> SummedGradients | None:
        """None if one backward passes through a batch, of which there is nothing to sum."""
        alone = self.pieces == 1 and self.ranks.count == 1
        return None if alone else SummedGradients(self.optimizer.slots, self.optimizer.weights.dtype, self.ranks)

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
        vectors: dict[str, np.ndarray] = {}
        if self.ranks.first:
            self.state, vectors = load_state(self.folder, self.identity)
        self.state = self.ranks.from_first(lambda: self.state)
        own = self._vectors()
        for name, vector in own.items():
            if self.ranks.first:
                vector[...] = vectors[name]
            self.ranks.copy_from_first(vector)
        self._take_up(own)

    def evaluate(self, examples: Sequence[Any], sign: StopSign | None = None) -> dict[str, float]:
        """The metrics of the model on examples as it will be asked about them.

        The ranks take turns in batches, and the first makes the metrics of what all have found.
        """
        score, ranks, model = self.objective.score(), self.ranks.count, self._for_inference()
        size = min(-(-self.batch_size // (self.pieces * ranks)), -(-len(examples) // ranks))
        own = [example for i, example in enumerate(examples) if i // size % ranks == self.ranks.rank]
        batches = in_batches(own, size, self._read_judged, self.workers)
        for _ in range(0, len(examples), size * ranks):
            for _, samples in itertools.islice(batches, 1):  # in the last turn there may be none for this rank
                batch = self.objective.batch(samples)
                score.add(model(batch.pixels, **batch.inputs), batch)
            if self.ranks.any(sign is not None and sign.asked):
                raise Stopped
        for other in self.ranks.gathered(score)[1:]:
            score.take_in(other)
        return self.ranks.from_first(score.metrics)

    # One epoch --------------------------------------------------------------------------------------------------------

    def _train_epoch(self, sign: StopSign) -> None:
        started, saved, first = time.monotonic(), time.monotonic(), self.state.step
        for batch in self._batches():
            self._step(batch)
            seconds = time.monotonic() - started
            if self.ranks.first:
                self.tell(self._progress((self.state.step - first) / max(seconds, 1e-9)))
            if self.ranks.any(sign.asked):
                self._stop()
            if time.monotonic() - saved > SAVE_SECONDS:
                self._save()
                saved = time.monotonic()

    def _batches(self) -> Iterator[Batch]:
        """This rank's share of the batches of the epoch at hand that have not been used yet."""
        epoch, size, train = len(self.state.history), self.batch_size, self.objective.train
        order = order_of(len(train), self.seed, epoch)[: self.steps_per_epoch * size].reshape(-1, size)
        left = order[self.state.step - epoch * self.steps_per_epoch :, self.rows].reshape(-1).tolist()

        def read(i: int) -> Any:
            return self.objective.read(train[i], (self.seed, epoch, i))

        for _, samples in in_batches(left, len(self.rows), read, self.workers):
            yield self.objective.batch(samples)

    def _step(self, batch: Batch) -> None:
        batch, rate = self._mixed(batch), self.rate(self.state.step)
        early = None if self.recipe.clip or self.sums is not None else EarlyStep(self.optimizer, rate)
        found = self._learned(batch, early)
        grads, norm = clipped(found.grads, self.recipe.clip or math.inf)
        norm = norm if early is None else early.norm
        if not (math.isfinite(found.loss) and math.isfinite(norm)):
            raise NotFinite(self._sentence(self._first_not_finite(found, batch)))
        self.optimizer.step(grads, rate)  # of which an early step has left nothing
        if self.average is not None:
            self.average.update()
        self.state.step += 1
        self._take_in(self.state.step, found, rate, norm)

    def _mixed(self, batch: Batch) -> Batch:
        step = self.state.step
        return self.objective.for_step(batch, step / self.steps, (self.seed, step, MIXING))

    def _take_in(self, step: int, found: Learned, rate: float, norm: float) -> None:
        """Counts and records what a step has found."""
        state = self.state
        state.seen += self.batch_size
        state.loss_sum += found.loss * self.batch_size
        state.right += found.right
        state.answers += found.answers
        if self.ranks.first:
            self.record(step, {"train/loss": found.loss, "train/lr": rate, "train/gradient_norm": norm})

    def _learned(self, batch: Batch, early: EarlyStep | None = None) -> Learned:
        """What a batch teaches, of which `batch` is this rank's share: computed in pieces, summed over the ranks."""
        if self.sums is None:
            return self._learned_of(batch, self.rows, 1.0, early)
        terms = self._terms(batch)
        self.sums.begin()
        parts = []
        for piece, samples, last in self._pieces_of(batch):
            ready = functools.partial(self.sums.add, last=last)
            parts.append(self._learned_of(piece, samples, self.objective.terms(piece) / terms, ready))
        self.sums.end()
        sums = np.sum([(part.loss, part.right, part.answers) for part in parts], axis=0)
        loss, right, answers = self.ranks.total(sums).tolist()
        return Learned(loss, parts[-1].grads, right, int(answers))

    def _terms(self, batch: Batch) -> float:
        """How many terms the mean loss of a batch has in all ranks."""
        return max(float(self.ranks.total(np.array([float(self.objective.terms(batch))]))[0]), 1.0)

    def _pieces_of(self, batch: Batch) -> Iterator[tuple[Batch, np.ndarray, bool]]:
        """(piece, numbers of its samples, whether it is the last) of this rank's share of a batch."""
        for rows in np.array_split(np.arange(len(batch)), self.pieces):
            there = slice(int(rows[0]), int(rows[-1]) + 1)
            yield (batch.rows(there) if self.pieces > 1 else batch), self.rows[there], there.stop == len(batch)

    def _learned_of(
        self, piece: Batch, samples: np.ndarray, share: float, ready: Callable[[str, Any], Any] | None
    ) -> Learned:
        """What a piece teaches, its loss being a share of the batch's; `ready` gets each gradient as it is complete."""
        found = self._gradients(piece, samples, share, ready)
        said = self.objective.said(found.output)
        return Learned(found.loss * share, found.grads, *self.objective.right(said, piece))

    def _gradients(self, piece: Batch, samples: np.ndarray, weight: Any, ready: Any, wait: bool = True) -> Gradients:
        found = value_and_grad(
            self.model,
            piece.pixels,
            loss=self.objective.loss(piece),
            rng=Noise(self.seed, self.state.step, tuple(samples.tolist())),
            frozen=self.frozen,
            batch_statistics=self.objective.batch_statistics and BatchStatistics(self.ranks.total),
            recompute=self.recompute,
            weight=weight,
            ready=ready,
            wait=wait,
            **piece.inputs,
        )
        if found.running:
            set_running(self.model, found.running)
        return found

    def _end_epoch(self, sign: StopSign) -> None:
        self._settle()
        state = self.state
        if self.ranks.count > 1:  # equal steps from equal weights, unless a machine computes otherwise than the others
            weights = {"weights": digest({"": self.optimizer.vectors()["weights"]})}
            self._check_same(weights, "they must have the same program and processors; resume from the epoch before")
        row: dict[str, Any] = {"epoch": len(state.history) + 1, "step": state.step}
        row.update(lr=self.rate(state.step - 1), train_loss=state.loss_sum / max(state.seen, 1))
        if state.answers:
            row["train_accuracy"] = state.right / state.answers
        try:
            with self.average.in_use() if self.average is not None else contextlib.nullcontext():
                self._judge(row, sign)
        except Stopped:  # the model has its own weights again, which are the ones to save
            self._stop()
        self.state = State(state.step, [*state.history, row], loss_scale=state.loss_scale, good_steps=state.good_steps)
        self._save()
        if self.ranks.first:
            write_log(self.folder / LOG_NAME, self.state.history)
            draw_curves(self.folder / CURVES_NAME, self.state.history)
            self.record(state.step, {f"epoch/{name}": value for name, value in row.items() if isinstance(value, float)})

    def _judge(self, row: dict[str, Any], sign: StopSign) -> None:
        """Evaluates, and writes the model if none was better."""
        if self.objective.held_out:
            judged = self.evaluate(self.objective.held_out, sign)
            row.update({f"held_out_{name}": value for name, value in judged.items()})
        self._check_weights()
        best = next((r for r in reversed(self.state.history) if r["best"]), None)
        row["best"] = better(row, best, self.objective.best)
        if row["best"] and self.ranks.first:
            self.objective.save(self._portable(), self.folder)

    def _portable(self) -> Any:
        """The model with its arrays in main memory."""
        return self.model

    def _for_inference(self) -> Any:
        """The model as its weights are now, to be called."""
        return self.model

    # What is kept -----------------------------------------------------------------------------------------------------

    def _vectors(self) -> dict[str, np.ndarray]:
        vectors = self.optimizer.vectors()
        vectors.update((n, a) for n, a in flatten(self.model.plain_params).items() if ".running_" in n)
        return vectors if self.average is None else {**vectors, "average": self.average.average}

    def _take_up(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Goes on with vectors, which are those that `_vectors` has returned."""

    def _settle(self) -> None:
        """Waits for the steps that have begun, so that `state` is that of the weights."""

    def _save(self) -> None:
        self._settle()
        self._check_weights()
        if self.ranks.first:
            save_state(self.folder, self.state, self._vectors(), self.identity)

    def _stop(self) -> None:
        self._save()
        raise Stopped(f"stopped after step {self.state.step} of {self.steps}, which is saved in {self.folder}")

    def _progress(self, steps_per_s: float) -> Progress:
        s = self.state
        left = (self.steps - s.step) / steps_per_s
        rate = steps_per_s * self.batch_size
        right = s.right / s.answers if s.answers else None
        return Progress(s.step, self.steps, len(s.history) + 1, s.loss_sum / max(s.seen, 1), right, rate, left)

    def _check_same(self, values: Mapping[str, str], advice: str) -> None:
        """Raises ValueError, in the first rank, if another has other values."""
        for rank, others in enumerate(self.ranks.gathered(values)):
            for what, value in values.items():
                if others[what] != value:
                    raise ValueError(f"rank {rank} has other {what} than the first; {advice}")

    def _read_judged(self, example: Any) -> Any:
        return self.objective.read_judged(example)

    # What is not finite -----------------------------------------------------------------------------------------------

    def _check_weights(self) -> None:
        if not np.isfinite(self.optimizer.weights).all():
            raise NotFinite(self._sentence(f"the weights {self._first(flatten(self.model.plain_params))}"))

    def _first_not_finite(self, found: Learned, batch: Batch) -> str:
        """The first of pixels, weights, the forward's arrays and, from the loss backwards, the gradients.

        Of pixels and arrays of the forward each rank knows its own: that of the first one that knows any is taken.
        """
        what = None
        if not np.isfinite(batch.pixels).all():
            what = "the pixel values"
        elif name := self._first(flatten(self.model.plain_params)):
            what = f"the weights {name}"
        elif not math.isfinite(found.loss):
            trace, noise = Trace(), Noise(self.seed, self.state.step, tuple(self.rows.tolist()))
            with contextlib.suppress(ValueError):
                self._for_inference()(batch.pixels, rng=noise, trace=trace, **batch.inputs)
            what = self._first(trace)
        else:
            what = f"the gradient of {self._first(dict(reversed(flatten(found.grads).items())))}"
        whats = self.ranks.gathered(what)
        return self.ranks.from_first(lambda: next(filter(None, whats), "the loss itself"))

    def _sentence(self, what: str) -> str:
        kept = f"what {self.folder} holds is of epoch {len(self.state.history)}" if self.state.history else ""
        return (
            f"step {self.state.step + 1}: the loss is no number any more, the first array that is not finite is "
            f"{what}; {kept or 'nothing was written'}; try a smaller --lr or a --clip of 1"
        )

    def _first(self, arrays: Any) -> str | None:
        host = self.model.ops.to_host
        return next((name for name, array in arrays.items() if not np.isfinite(np.asarray(host(array))).all()), None)


def trainer_of(model: Any) -> type[Trainer]:
    """The trainer for a model, by where it computes."""
    if model.ops.backend not in GPU_BACKENDS:
        return Trainer
    from .device import TrainerOnDevice

    return TrainerOnDevice
