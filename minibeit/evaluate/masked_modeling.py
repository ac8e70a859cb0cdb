"""A model of masked modelling measured: how well it predicts the visual tokens of patches that it does not see."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..metrics import mean_interval
from ..train.examples import Example
from ..train.metrics import perplexity
from ..train.objective import Batch
from ..train.pretraining import MaskedModeling, token_losses
from .drawing import thumbnail
from .evaluation import NUMBER, SHARE, Evaluation, Figure, Worst
from .reading import Reader


def evaluate_masked_modeling(
    compute: Callable[[Batch], np.ndarray],
    objective: MaskedModeling,
    images: Sequence[Example],
    *,
    batch_size: int = 8,
    workers: int = 2,
    worst: int = 24,
    draw: bool = True,
    tell: Callable[[int], None] = lambda done: None,
    **facts: Any,
) -> Evaluation:
    """Measures `compute`, which gives the logits (n, V) of the n masked patches of a batch, on images that `objective`
    masks, each in the same way every time.

    The loss (cross-entropy in nats) and the accuracy are means over an image's masked patches, then over the images;
    the perplexity of the tokens says how varied the right answers are.  The `worst` images are those of the largest
    loss.  `tell` gets the number of images done after each batch; `facts` are further fields of the `Evaluation`.
    """
    started = time.monotonic()
    reader: Reader[Example] = Reader(images, objective.read_judged, workers)
    losses: list[float] = []
    shares: list[float] = []
    shown: list[tuple[float, str]] = []
    counts = np.zeros(objective.tokenizer.config.vocab_size, np.int64)
    for examples, samples in reader.lists(batch_size):
        batch = objective.batch(samples)
        assert batch.mask is not None
        of_image = np.nonzero(batch.mask)[0]  # of each masked patch
        patch_losses, right = token_losses(compute(batch), batch.targets[batch.mask])
        for i, example in enumerate(examples):
            losses.append(float(patch_losses[of_image == i].mean()))
            shares.append(float(right[of_image == i].mean()))
            shown.append((losses[-1], example.path))
        counts += np.bincount(batch.targets.reshape(-1), minlength=len(counts))
        tell(len(losses))
    figures = [_mean("accuracy", shares, SHARE), _mean("loss", losses, NUMBER)]
    if losses:
        figures.append(Figure("token_perplexity", perplexity(counts), kind=NUMBER))
    return Evaluation(
        task="masked_image_modeling",
        images=len(losses),
        figures=tuple(figures),
        classes=(),
        unit="images",
        worst=tuple(
            Worst(path, f"loss {loss:.3f}", loss, (("", thumbnail(path)),) if draw else ())
            for loss, path in sorted(shown, reverse=True)[:worst]
        ),
        left_out=tuple(reader.left_out),
        seconds=time.monotonic() - started,
        **facts,
    )


def _mean(name: str, values: list[float], kind: str) -> Figure:
    if not values:
        return Figure(name, float("nan"), kind=kind)
    return Figure(name, float(np.mean(values)), *mean_interval(np.array(values)), kind)
