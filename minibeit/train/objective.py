"""What a training learns: how an example becomes arrays, what the loss is, and how the model is judged.

The loop knows nothing of labels: it asks an `Objective`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..image_processor import BeitImageProcessor
from ..model.masked_modeling import IGNORE_INDEX
from .augment import mixed, smoothed
from .batches import judged_pixels, training_pixels
from .examples import MULTI, REGRESSION, SINGLE, Example, Examples
from .metrics import BEST, metrics, right_answers
from .recipes import Recipe

Loss = Callable[[Any, Any], Any]  # (ops, output of the model) -> the loss, computed by ops
Sample = tuple[np.ndarray, ...]  # what a thread makes of one example


@dataclass(frozen=True)
class Batch:
    """The arrays of a step, samples first: `pixels`, `mask` and `settings` go to the model, `targets` to the loss."""

    pixels: np.ndarray  # (B, C, h, w)
    targets: np.ndarray  # (B, ...)
    mask: np.ndarray | None = None  # (B, P), for masked image modelling
    settings: Mapping[str, Any] = field(default_factory=dict)  # the same for all samples

    def __len__(self) -> int:
        return len(self.pixels)

    def rows(self, chosen: slice) -> Batch:
        """Some of its samples."""
        mask = None if self.mask is None else self.mask[chosen]
        return Batch(self.pixels[chosen], self.targets[chosen], mask, self.settings)

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model is given beside the pixels."""
        masked = {} if self.mask is None else {"bool_masked_pos": self.mask, "return_all_tokens": False}
        return {**masked, **self.settings}


class Score:
    """Takes in predictions batch by batch and gives their metrics."""

    sums: tuple[str, ...]  # the attributes, numbers, arrays or lists, that are those of all batches added up

    def take_in(self, other: Score) -> None:
        """Takes in what another score has taken in."""
        for name in self.sums:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def add(self, output: Any, batch: Batch) -> None:
        """Takes in the model's output for a batch."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """The metrics of everything taken in; `loss` among them."""
        raise NotImplementedError


class Objective:
    """One kind of training: its examples and what is wanted of the model.  Examples are whatever the subclass reads."""

    processor: BeitImageProcessor
    train: Sequence[Any]
    held_out: Sequence[Any]
    fingerprint: str  # equal for equal examples, labels and split
    identity: Mapping[str, str] = {}  # what else must be the same when a training goes on: a word for it, its digest
    best: tuple[str, int]  # the held-out metric that decides which epoch is kept; 1 if more is better, else -1
    batch_statistics = False  # whether batch norms use the statistics of the batch
    smallest_piece = 1  # images that a piece of a batch must have

    def read(self, example: Any, key: Sequence[int]) -> Sample:
        """An example as it is trained on, changed at random by a generator that `key` alone seeds."""
        raise NotImplementedError

    def read_judged(self, example: Any) -> Sample:
        """An example as the trained model will be asked about it."""
        raise NotImplementedError

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """The batch of some samples."""
        pixels, targets = (np.stack(arrays) for arrays in zip(*samples))
        return Batch(pixels, targets)

    def for_step(self, batch: Batch, done: float, key: Sequence[int]) -> Batch:
        """The batch as a step learns from it: its samples mixed with each other, by a generator that `key` alone seeds.

        `done` is the share of the training that lies behind, for settings that change with it.
        """
        return batch

    def loss(self, batch: Batch) -> Loss:
        """The mean loss of a batch."""
        raise NotImplementedError

    def terms(self, batch: Batch) -> int:
        """How many terms that mean has."""
        return len(batch)

    def said(self, output: Any) -> Any | None:
        """The model's answers, as small as they can be where they were computed; None if none is right or wrong."""
        return None

    def right(self, said: Any | None, batch: Batch) -> tuple[float, int]:
        """(right answers, answers) of what was `said` of a batch; (0, 0) where nothing is right or wrong."""
        return 0.0, 0

    def score(self) -> Score:
        """An empty score of held-out examples."""
        raise NotImplementedError

    def save(self, model: Any, folder: Path) -> None:
        """Writes the model, and what reads images for it, as a folder that `from_pretrained` loads."""
        self.processor.save_pretrained(folder)
        model.save_pretrained(folder)


class Classification(Objective):
    """Labels, several labels or numbers for each image.

    Single labels: cross-entropy with the recipe's smoothing, mixup and cutmix.  Several labels: binary cross-entropy of
    each class.  Numbers: mean squared error.
    """

    def __init__(
        self, examples: Examples, processor: BeitImageProcessor, recipe: Recipe, shape: tuple[int, int]
    ) -> None:
        self.examples, self.processor, self.recipe, self.shape = examples, processor, recipe, shape
        self.train, self.held_out, self.fingerprint = examples.train, examples.held_out, examples.fingerprint
        self.problem, self.best = examples.problem, BEST[examples.problem]

    def read(self, example: Example, key: Sequence[int]) -> Sample:
        pixels = training_pixels(
            example.path, self.recipe, self.processor, self.shape, np.random.default_rng(list(key))
        )
        return pixels, self.examples.targets([example])[0]

    def read_judged(self, example: Example) -> Sample:
        return judged_pixels(example.path, self.processor), self.examples.targets([example])[0]

    def for_step(self, batch: Batch, done: float, key: Sequence[int]) -> Batch:
        recipe, K = self.recipe, len(self.examples.names)
        if self.problem != SINGLE or not (recipe.mixup or recipe.cutmix):
            return batch
        targets = smoothed(batch.targets, K, recipe.smoothing)
        return Batch(*mixed(batch.pixels, targets, recipe, np.random.default_rng(list(key))))

    def loss(self, batch: Batch) -> Loss:
        targets = batch.targets
        if self.problem == MULTI:
            return lambda ops, output: ops.bce_with_logits(output.logits, targets)
        if self.problem == REGRESSION:
            return lambda ops, output: ops.mse_loss(output.logits, targets)
        if targets.ndim == 2:
            return lambda ops, output: ops.soft_cross_entropy(output.logits, targets)
        return lambda ops, output: ops.cross_entropy(output.logits, targets, IGNORE_INDEX, self.recipe.smoothing)

    def said(self, output: Any) -> Any:
        return output.logits

    def right(self, said: Any, batch: Batch) -> tuple[float, int]:
        answers = 0 if self.problem == REGRESSION else len(batch)
        return right_answers(said, batch.targets, self.problem), answers

    def score(self) -> Score:
        return _Predictions(self.problem)


class _Predictions(Score):
    sums = ("logits", "targets")

    def __init__(self, problem: str) -> None:
        self.problem = problem
        self.logits: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []

    def add(self, output: Any, batch: Batch) -> None:
        self.logits.append(output.logits)
        self.targets.append(batch.targets)

    def metrics(self) -> dict[str, float]:
        return metrics(np.concatenate(self.logits), np.concatenate(self.targets), self.problem)
