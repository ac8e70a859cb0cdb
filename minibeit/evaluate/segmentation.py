"""A segmentation model measured: mIoU, mean and pixel accuracy, every class, and the images it does worst on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..images.transforms import IGNORED_LABEL
from ..metrics import (
    areas,
    class_accuracy,
    class_iou,
    confusion_matrix,
    mean_of_known,
    segmentation_intervals,
    segmentation_scores,
)
from ..train.label_maps import MapReader, Pair
from .drawing import overlay, thumbnail
from .evaluation import ClassRow, Evaluation, Figure, Worst, triples
from .maps import check_classes, read_pair
from .reading import Measured, Reader

Segment = Callable[[Any, tuple[int, int]], np.ndarray]  # image, (H, W) -> class numbers (H, W)
NO_CLASS = -1
BY_NUMBER = MapReader()
MOST_CONFUSIONS = 2000  # entries of the confusion matrix that are kept, those of most pixels


def evaluate_segmentation(
    segment: Segment,
    pairs: Sequence[Pair],
    names: Sequence[str],
    colours: np.ndarray,
    *,
    read_map: MapReader = BY_NUMBER,
    upright: bool = True,
    workers: int = 2,
    worst: int = 12,
    draw: bool = True,
    seed: int = 0,
    notes: Sequence[str] = (),
    tell: Callable[[int], None] = lambda done: None,
    **facts: Any,
) -> Evaluation:
    """Measures `segment` on images and label maps, at the images' own sizes; both are read in threads while it works.

    `colours` (K, 3) draw the classes `names`; `read_map` and `upright` say how maps are read.  The `worst` images,
    those of lowest mIoU, are shown, with `draw` drawn.  `tell` gets the number of images done.  `notes` and `facts` are
    further fields of the `Evaluation`; a note is added where only the largest confusions are kept.
    Raises ValueError for maps with numbers that are no class.
    """
    started = time.monotonic()
    gallery = Gallery(names, colours, worst, draw)
    measured = segmented_images(
        segment, pairs, len(names), read_map=read_map, upright=upright, workers=workers, seen=gallery.see, tell=tell
    )
    seconds = time.monotonic() - started
    return segmentation_of(measured, names, colours, gallery.worst, seed=seed, notes=notes, seconds=seconds, **facts)


@dataclass(frozen=True)
class Segmented:
    """The confusion matrix of one image, as (true class, predicted class, count) of each entry that is not 0."""

    path: str
    entries: tuple[tuple[int, int, int], ...]

    def confusion(self, classes: int) -> np.ndarray:  # -> (K, K)
        """The matrix."""
        matrix = np.zeros((classes, classes), np.int64)
        for true, predicted, count in self.entries:
            matrix[true, predicted] = count
        return matrix


def segmented_images(
    segment: Segment,
    pairs: Sequence[Pair],
    classes: int,
    *,
    read_map: MapReader = BY_NUMBER,
    upright: bool = True,
    workers: int = 2,
    seen: Callable[[Segmented, Any, np.ndarray, np.ndarray], None] = lambda found, image, truth, predicted: None,
    tell: Callable[[int], None] = lambda done: None,
) -> Measured[Segmented]:
    """What `segment` says of some images, as in `evaluate_segmentation`; `seen` is called for each while it is there.

    Its arguments: what was found, the PIL image, and the true and the predicted classes (H, W).
    """
    reader: Reader[Pair] = Reader(pairs, lambda pair: read_pair(pair, read_map, upright), workers)
    done: list[Segmented] = []
    for pair, (image, labels) in reader.each():
        check_classes(pair, labels, classes, read_map)
        predicted = segment(image, (image.height, image.width))
        truth = np.where(labels == IGNORED_LABEL, NO_CLASS, labels.astype(np.int64))
        found = Segmented(pair.path, triples(confusion_matrix(truth, predicted, classes, NO_CLASS)))
        seen(found, image, truth, predicted)
        done.append(found)
        tell(len(done))
    return reader.measured(done)


def segmentation_of(
    measured: Measured[Segmented],
    names: Sequence[str],
    colours: np.ndarray,
    worst: Sequence[Worst],
    *,
    seed: int = 0,
    notes: Sequence[str] = (),
    **facts: Any,
) -> Evaluation:
    """The evaluation that what was found of all images makes, those in several places put together."""
    confusion = np.zeros((len(names), len(names)), np.int64)
    counts = np.zeros((len(measured.records), 3, len(names)), np.int64)
    for own, found in zip(counts, measured.records):
        matrix = found.confusion(len(names))
        confusion += matrix
        own[:] = areas(matrix)
    figures, rows = _figures(counts, names, seed)
    entries = sorted(triples(confusion), key=lambda entry: -entry[2])
    seen = {row.index for row in rows}
    return Evaluation(
        task="semantic_segmentation",
        images=len(counts),
        figures=figures,
        classes=rows,
        unit="pixels",
        names=tuple(names),
        confusions=tuple(entries[:MOST_CONFUSIONS]),
        worst=tuple(worst),
        legend=tuple((names[i], (int(r), int(g), int(b))) for i in sorted(seen) for r, g, b in (colours[i],)),
        left_out=tuple(measured.left_out),
        notes=(*notes, *_cut(len(entries))),
        **facts,
    )


def _cut(entries: int) -> tuple[str, ...]:
    """A note if the confusion matrix has more entries than are kept."""
    if entries <= MOST_CONFUSIONS:
        return ()
    return (f"of {entries:,} pairs of a true and a predicted class, the {MOST_CONFUSIONS:,} of most pixels are kept",)


def _figures(
    counts: np.ndarray, names: Sequence[str], seed: int
) -> tuple[tuple[Figure, ...], tuple[ClassRow, ...]]:  # (n, 3, K)
    """The figures of all images and those of each class that is true or predicted anywhere."""
    total = counts.sum(0)
    scores = segmentation_scores(total)
    if not len(counts):
        return tuple(Figure(name, float("nan")) for name in scores), ()
    intervals = segmentation_intervals(counts, seed=seed)
    figures = tuple(share(name, value, intervals[name]) for name, value in scores.items())
    rows = []
    for i in np.flatnonzero(total[1] + total[2]).tolist():
        iou = share("iou", class_iou(total)[i], intervals["class_iou"][:, i])
        accuracy = share("accuracy", class_accuracy(total)[i], intervals["class_accuracy"][:, i])
        rows.append(ClassRow(i, names[i], int(total[1, i]), (iou, accuracy)))
    return figures, tuple(rows)


def share(name: str, value: Any, interval: np.ndarray) -> Figure:  # interval (2,)
    """A share of pixels, and the interval around it."""
    return Figure(name, float(value), float(interval[0]), float(interval[1]))


class Gallery:
    """The `most` images of lowest mIoU, the lowest first, with `draw` drawn in the colours (K, 3) of the classes."""

    def __init__(self, names: Sequence[str], colours: np.ndarray, most: int, draw: bool) -> None:
        self.names, self.colours, self.most, self.draw = names, colours, most, draw
        self.worst: list[Worst] = []

    def see(self, found: Segmented, image: Any = None, truth: Any = None, predicted: Any = None) -> None:
        """Puts an image in its place if it is one of them; its arguments are as in `segmented_images`."""
        counts = areas(found.confusion(len(self.names)))
        score = float(mean_of_known(class_iou(counts)))
        if self.most < 1 or np.isnan(score) or (len(self.worst) == self.most and score >= self.worst[-1].score):
            return
        missed = counts[1] - counts[0]
        largest = int(missed.argmax())
        part = missed[largest] / max(counts[1].sum(), 1)
        text = f"mIoU {score:.1%}; most missed: {self.names[largest]}, {part:.1%} of the area"
        drawn = _drawn(image, truth, predicted, self.colours) if self.draw else ()
        self.worst = sorted([*self.worst, Worst(found.path, text, score, drawn)], key=lambda one: one.score)
        del self.worst[self.most :]


def _drawn(
    image: Any, truth: np.ndarray, predicted: np.ndarray, colours: np.ndarray
) -> tuple[tuple[str, np.ndarray], ...]:
    photo = thumbnail(image)
    return (
        ("image", photo),
        ("truth", overlay(photo, truth, colours)),
        ("predicted", overlay(photo, predicted, colours)),
    )
