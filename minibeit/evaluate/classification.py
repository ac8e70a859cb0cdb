"""A classifier measured: top-1, top-5, the loss, every class, what is taken for what, and the worst mistakes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..image_processor import BeitImageProcessor
from ..metrics import mean_interval, ranks, wilson
from ..places import place
from .drawing import thumbnail_of
from .evaluation import NUMBER, ClassRow, Evaluation, Figure, Worst
from .labelled import Labelled, LabelledImages
from .reading import Measured, Reader

BICUBIC = 3  # Pillow's number
Compute = Callable[[np.ndarray], np.ndarray]  # pixel values (B, C, H, W) -> logits (B, K)


@dataclass(frozen=True)
class Judged:
    """What a model says of one image: rank of its own class, loss, the class named first, and its probability."""

    image: Labelled
    rank: int
    loss: float
    predicted: int
    probability: float


def pixels_of(processor: BeitImageProcessor, crop_fraction: float | None, size: int) -> Callable[[Any], np.ndarray]:
    """A function from a path to pixel values (C, H, W).

    With `crop_fraction` F the shorter side is resized to int(size / F) by bicubic and the central `size` pixels are
    taken, as BEiT's authors (7/8 below 384 pixels, else 1) and timm evaluate; without, the processor decides.
    """
    if crop_fraction is None:
        return lambda path: processor(path).pixel_values[0]
    short = int(size / crop_fraction)

    def cropped(path: Any) -> np.ndarray:
        pixels = processor(
            path, do_resize=True, size={"shortest_edge": short}, resample=BICUBIC, do_center_crop=False
        ).pixel_values[0]
        top, left = (round((length - size) / 2) for length in pixels.shape[1:])  # torchvision rounds halves to even
        return pixels[:, top : top + size, left : left + size]

    return cropped


def evaluate_classification(
    compute: Compute,
    labelled: LabelledImages,
    read: Callable[[Any], np.ndarray],
    *,
    batch_size: int = 8,
    workers: int = 2,
    worst: int = 24,
    draw: bool = True,
    tell: Callable[[int], None] = lambda done: None,
    **facts: Any,
) -> Evaluation:
    """Measures `compute` on images; `read` makes pixel values of a path, in `workers` threads while it computes.

    The `worst` mistakes, those of the largest loss, are shown, with `draw` drawn.  `tell` gets the number of
    images done after each batch.  `facts` are further fields of the `Evaluation`.
    """
    started = time.monotonic()
    measured = judged_images(
        compute, labelled.images, labelled.outputs, read, batch_size=batch_size, workers=workers, tell=tell
    )
    seconds = time.monotonic() - started
    return classification_of(measured, labelled, worst=worst, draw=draw, seconds=seconds, **facts)


def judged_images(
    compute: Compute,
    images: Sequence[Labelled],
    outputs: Sequence[int] | None,
    read: Callable[[Any], np.ndarray],
    *,
    batch_size: int = 8,
    workers: int = 2,
    tell: Callable[[int], None] = lambda done: None,
) -> Measured[Judged]:
    """What `compute` says of some images, as in `evaluate_classification`; `outputs` as in `LabelledImages`."""
    reader: Reader[Labelled] = Reader(images, lambda image: read(place(image.path)), workers)
    judged: list[Judged] = []
    for batch, pixels in reader.batches(batch_size):
        logits = compute(pixels)
        judged += judge(batch, logits if outputs is None else logits[:, list(outputs)])
        tell(len(judged))
    return reader.measured(judged)


def classification_of(
    measured: Measured[Judged], labelled: LabelledImages, *, worst: int = 24, draw: bool = True, **facts: Any
) -> Evaluation:
    """The evaluation that the judgements of all images make, those in several places put together."""
    judged, names = measured.records, labelled.names
    chosen = sorted((one for one in judged if one.rank), key=lambda one: -one.loss)[:worst]
    return Evaluation(
        task="image_classification",
        images=len(judged),
        figures=figures_of(judged, len(names)),
        classes=_rows(judged, names),
        unit="images",
        names=names,
        confusions=_confusions(judged),
        worst=tuple(_shown(one, names, draw) for one in chosen),
        left_out=tuple(measured.left_out),
        notes=labelled.notes,
        **facts,
    )


def judge(images: list[Labelled], logits: np.ndarray) -> list[Judged]:
    """What logits (B, K) say of each image."""
    labels, x = np.array([image.label for image in images]), logits.astype(np.float64)
    shifted = x - x.max(1, keepdims=True)
    total = np.exp(shifted).sum(1)
    losses = np.log(total) - np.take_along_axis(shifted, labels[:, None], 1)[:, 0]
    found = zip(images, ranks(x, labels), losses, x.argmax(1), 1 / total)
    return [Judged(image, int(r), float(loss), int(p), float(share)) for image, r, loss, p, share in found]


def figures_of(judged: list[Judged], classes: int) -> tuple[Figure, ...]:
    """top1, top5 where there are more than five classes, and the loss (cross-entropy)."""
    n, losses = len(judged), np.array([one.loss for one in judged])
    figures = [_share(f"top{k}", sum(one.rank < k for one in judged), n) for k in (1, 5) if k == 1 or classes > k]
    mean = float(losses.mean()) if n else float("nan")
    return *figures, Figure("loss", mean, *mean_interval(losses), NUMBER)


def _share(name: str, right: int, total: int) -> Figure:
    return Figure(name, right / total if total else float("nan"), *wilson(right, total))


def _rows(judged: list[Judged], names: tuple[str, ...]) -> tuple[ClassRow, ...]:
    counts = Counter(one.image.label for one in judged)
    right = [Counter(one.image.label for one in judged if one.rank < k) for k in (1, 5)]
    ks = (1, 5) if len(names) > 5 else (1,)
    return tuple(
        ClassRow(
            i, names[i], counts[i], tuple(_share(f"top{k}", hits[i], counts[i]) for k, hits in zip(ks, right))
        )
        for i in sorted(counts)
    )  # fmt: skip


def _confusions(judged: list[Judged]) -> tuple[tuple[int, int, int], ...]:
    pairs = Counter((one.image.label, one.predicted) for one in judged)
    return tuple((true, predicted, count) for (true, predicted), count in sorted(pairs.items()))


def _shown(one: Judged, names: tuple[str, ...], draw: bool) -> Worst:
    text = f"{names[one.image.label]}, taken for {names[one.predicted]} ({one.probability:.0%})"
    photo = thumbnail_of(one.image.path) if draw else None
    return Worst(one.image.path, text, one.loss, () if photo is None else (("", photo),))
