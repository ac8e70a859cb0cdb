"""Linear probes: how much a linear layer can read from each block of a frozen encoder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.formats.safetensors_file import write_safetensors
from ..files import atomic_write
from ..image_processor import BeitImageProcessor
from ..ops import reference
from .batches import in_batches, judged_pixels
from .examples import SINGLE, Example, Examples
from .metrics import metrics
from .schedule import Cosine

PROBE_NAME, SCORES_NAME = "linear_probe.safetensors", "linear_probe.json"
RATE = 1e-3  # for 256 images
WEIGHT_DECAY, DEVIATION, BETAS, EPS = 1e-4, 0.01, (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Probe:
    """The layers and how good each is on `judged` images; `best` is the number of the best one."""

    weight: np.ndarray  # (L, K, 2 D)
    bias: np.ndarray  # (L, K)
    rows: tuple[dict[str, float], ...]
    judged: int

    @property
    def best(self) -> int:
        """The block, counted from 0, whose layer classifies most images correctly."""
        return max(range(len(self.rows)), key=lambda i: self.rows[i]["top1"])


def probe(
    model: Any,
    examples: Examples,
    processor: BeitImageProcessor,
    *,
    seed: int = 0,
    batch_size: int = 32,
    epochs: int = 100,
    lr: float | None = None,
    workers: int = 2,
    tell: Callable[[str], None] = lambda text: None,
) -> Probe:
    """Linear layers on the features of every block, all trained at once on features that are computed once.

    Features of a block are its CLS token and the mean of its patch tokens, 2 D numbers, not normalised.  AdamW, the
    rate falling by half a cosine from epoch to epoch.  The original changes the images at random in every epoch;
    here each is seen as `minibeit classify` sees it.  Raises ValueError unless every image has one label.
    Source: linear_util.py and run_linear_eval.py in microsoft/unilm beit; Bao et al. 2021, appendix.
    """
    if examples.problem != SINGLE:
        raise ValueError(f"linear probe: expected one label per image, found {examples.problem.replace('_', ' ')}")
    judged = examples.held_out or examples.train
    parts = []
    for what, part in (("to learn from", examples.train), ("to be judged by", examples.held_out)):
        tell(f"features of {len(part)} images {what}")
        parts.append(features(model, part, processor, batch_size, workers) if part else None)
    x, y = parts[0], examples.targets(examples.train)
    assert x is not None
    weight, bias = fit(x, y, len(examples.names), seed, batch_size, epochs, lr or RATE * batch_size / 256)
    seen = x if parts[1] is None else parts[1]
    logits = np.matmul(seen, weight.transpose(0, 2, 1)) + bias[:, None]  # (L, n, K)
    targets = examples.targets(judged)
    return Probe(weight, bias, tuple(metrics(scores, targets, SINGLE) for scores in logits), len(judged))


def features(
    model: Any, examples: Sequence[Example], processor: BeitImageProcessor, batch_size: int, workers: int
) -> np.ndarray:  # -> (L, n, 2 D)
    """[CLS, mean of the patch tokens] after every block of a `BeitModel`."""
    L, D = model.config.num_hidden_layers, model.config.hidden_size
    made, done = np.empty((L, len(examples), 2 * D), np.float32), 0
    for part, pixels in in_batches(examples, batch_size, lambda e: judged_pixels(e.path, processor), workers):
        states = model(np.stack(pixels), output_hidden_states=True).hidden_states
        for block, x in zip(made, states[1:]):
            block[done : done + len(part), :D] = x[:, 0]
            block[done : done + len(part), D:] = x[:, 1:].mean(1)
        done += len(part)
    return made


def fit(
    x: np.ndarray, y: np.ndarray, classes: int, seed: int, batch_size: int, epochs: int, lr: float
) -> tuple[np.ndarray, np.ndarray]:  # (L, n, 2 D), (n,) -> (L, K, 2 D), (L, K)
    """Weights and biases that make the sum of the layers' cross-entropies small; no layer sees another."""
    schedule = Cosine(lr, epochs)
    L, n, width = x.shape
    rng = np.random.default_rng(seed)
    weight = (DEVIATION * rng.standard_normal((L, classes, width))).astype(np.float32)
    arrays = [weight, np.zeros((L, classes), np.float32)]
    moments = [(np.zeros_like(w), np.zeros_like(w)) for w in arrays]
    step = 0
    for epoch in range(epochs):
        rate = schedule(epoch)
        order = rng.permutation(n)
        for start in range(0, n, batch_size):
            chosen, step = order[start : start + batch_size], step + 1
            g = _error(x[:, chosen], y[chosen], *arrays)  # (L, b, K)
            grads = [np.matmul(g.transpose(0, 2, 1), x[:, chosen]), g.sum(1)]
            for w, gradient, (m, v) in zip(arrays, grads, moments):
                reference.adamw(w, gradient, m, v, (rate, WEIGHT_DECAY, BETAS, EPS), step)
    return arrays[0], arrays[1]


def _error(x: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The gradient of the mean cross-entropy by the logits: softmax minus one-hot, over b."""
    logits = np.matmul(x, weight.transpose(0, 2, 1)) + bias[:, None]
    error = reference.softmax(logits)
    error[:, np.arange(len(y)), y] -= 1
    return error / np.float32(len(y))


def write_probe(folder: str | os.PathLike[str], found: Probe, examples: Examples) -> None:
    """The layers as safetensors, and their scores with the names of the classes as JSON."""
    folder = Path(folder)
    write_safetensors(folder / PROBE_NAME, {"weight": found.weight, "bias": found.bias})
    scores = {"classes": list(examples.names), "best_block": found.best, "blocks": list(found.rows)}
    with atomic_write(folder / SCORES_NAME) as file:
        file.write((json.dumps(scores, indent=2) + "\n").encode())
