"""Two segmentation models on the same images: how their maps and their logits differ."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..images.opening import read_picture
from ..images.transforms import resize_labels
from ..metrics import areas, class_iou, confusion_matrix, mean_of_known, segmentation_intervals, segmentation_scores
from .comparison import DEFAULT, Comparison, Distance, How, distances, divergence_of, rms_of
from .drawing import overlay, thumbnail, tinted
from .evaluation import ClassRow, Figure, Worst, triples
from .reading import Reader
from .segmentation import MOST_CONFUSIONS, share

Logits = Callable[[np.ndarray], np.ndarray]  # pixel values (B, C, h, w) -> logits (B, K, h', w')
Segment = Callable[[Logits, Any, tuple[int, int]], np.ndarray]  # logits of what, image, (H, W) -> classes (H, W)
DIFFERENT = (209, 36, 47)
NO_LOGITS = "the logits are not compared, since A and B see images of different sizes"


class Beside:
    """The calls of two models in the same order: keeps the logits of `a` until `b` is called, and adds up how far they
    are apart.  `comparable` is False once their shapes have differed."""

    def __init__(self, a: Logits, b: Logits) -> None:
        self._a, self._b = a, b
        self._kept: deque[np.ndarray] = deque()
        self._found: list[Distance] = []
        self.comparable = True

    def a(self, pixels: np.ndarray) -> np.ndarray:  # (B, C, h, w) -> (B, K, h', w')
        """The logits of A, kept."""
        self._kept.append(self._a(pixels))
        return self._kept[-1]

    def b(self, pixels: np.ndarray) -> np.ndarray:  # (B, C, h, w) -> (B, K, h', w')
        """The logits of B, compared with those of A."""
        logits = self._b(pixels)
        other = self._kept.popleft() if self._kept else None
        if other is None or other.shape != logits.shape:
            self.comparable = False
        else:
            self._found += distances(other, logits, axis=1)
        return logits

    def distance(self) -> Distance:
        """The sums of all calls since the last time this was asked."""
        found, self._found = self._found, []
        if self._kept:
            self.comparable = False
            self._kept.clear()
        return Distance(
            sum(one.squares for one in found),
            sum(one.size for one in found),
            sum(one.divergence for one in found),
            sum(one.terms for one in found),
        )


def compare_segmentation(
    a: Logits,
    b: Logits,
    /,
    segment: tuple[Segment, Segment],
    paths: Sequence[str],
    names: Sequence[str],
    colours: np.ndarray,
    how: How = DEFAULT,
    upright: bool = True,
    notes: Sequence[str] = (),
    **facts: Any,
) -> Comparison:
    """Compares the maps that two models make of images, at the images' own sizes.

    `a` and `b` compute logits, `segment` makes maps from them, for each model.  `mean_iou` and the rows are those of
    B's maps against A's; `same_pixels` is the share of pixels of the same class; `kl` (of every point of the logits'
    maps) and `relative_rms` compare the logits, where both models see the same sizes.  Worst are the images with most
    differing pixels.  `colours` (K, 3) draw the classes `names`; `facts` are further fields of the `Comparison`.
    """
    started = time.monotonic()
    reader: Reader[str] = Reader(paths, lambda path: read_picture(path, upright), how.workers)
    beside = Beside(a, b)
    confusion = np.zeros((len(names), len(names)), np.int64)
    counts: list[np.ndarray] = []
    found: list[Distance] = []
    gallery: list[Worst] = []
    for path, image in reader.each():
        shape = image.height, image.width
        maps = segment[0](beside.a, image, shape), segment[1](beside.b, image, shape)
        found.append(beside.distance())
        own = confusion_matrix(*maps, len(names))
        confusion += own
        counts.append(areas(own))
        gallery = _with(gallery, path, image, maps, counts[-1], colours, how)
        how.tell(len(found))
    if not beside.comparable:
        notes, found = (*notes, NO_LOGITS), [Distance(0, 0)] * len(found)
    figures, rows = _figures(np.array(counts).reshape(-1, 3, len(names)), names, how.seed)
    seen = sorted(row.index for row in rows)
    return Comparison(
        task="semantic_segmentation",
        images=len(found),
        figures=(*figures, divergence_of(found, how.seed), rms_of(found, how.seed)),
        classes=rows,
        unit="pixels",
        names=tuple(names),
        confusions=tuple(sorted(triples(confusion), key=lambda entry: -entry[2])[:MOST_CONFUSIONS]),
        worst=tuple(gallery),
        legend=tuple((names[i], (int(r), int(g), int(b))) for i in seen for r, g, b in (colours[i],)),
        left_out=tuple(reader.left_out),
        notes=tuple(notes),
        seconds=time.monotonic() - started,
        **facts,
    )


def _figures(
    counts: np.ndarray, names: Sequence[str], seed: int
) -> tuple[tuple[Figure, ...], tuple[ClassRow, ...]]:  # (n, 3, K)
    """The figures of all images, and the IoU of each class that either model sees anywhere."""
    if not len(counts):
        return (Figure("mean_iou", float("nan")), Figure("same_pixels", float("nan"))), ()
    total, intervals = counts.sum(0), segmentation_intervals(counts, seed=seed)
    scores = segmentation_scores(total)
    figures = tuple(
        share(name, scores[score], intervals[score])
        for name, score in (("mean_iou", "mean_iou"), ("same_pixels", "pixel_accuracy"))
    )
    iou, ends = class_iou(total), intervals["class_iou"]
    seen = np.flatnonzero(total[1] + total[2]).tolist()
    return figures, tuple(ClassRow(i, names[i], int(total[1, i]), (share("iou", iou[i], ends[:, i]),)) for i in seen)


def _with(
    gallery: list[Worst],
    path: str,
    image: Any,
    maps: tuple[np.ndarray, np.ndarray],
    counts: np.ndarray,
    colours: np.ndarray,
    how: How,
) -> list[Worst]:
    """The gallery with an image in its place if it is among those with most differing pixels."""
    score = 1 - float(counts[0].sum() / counts[1].sum())
    if score == 0 or how.worst < 1 or (len(gallery) == how.worst and score <= gallery[-1].score):
        return gallery
    text = f"{score:.2%} of the pixels differ; mIoU {float(mean_of_known(class_iou(counts))):.1%}"
    shown = Worst(path, text, score, _drawn(image, maps, colours) if how.draw else ())
    return sorted([*gallery, shown], key=lambda one: -one.score)[: how.worst]


def _drawn(image: Any, maps: tuple[np.ndarray, np.ndarray], colours: np.ndarray) -> tuple[tuple[str, np.ndarray], ...]:
    photo = thumbnail(image)
    differs = resize_labels((maps[0] != maps[1]).astype(np.uint8), (photo.shape[0], photo.shape[1])).astype(bool)
    marked = np.where(differs[..., None], tinted(photo, np.broadcast_to(DIFFERENT, photo.shape)), photo)
    return (
        ("image", photo),
        ("A", overlay(photo, maps[0], colours)),
        ("B", overlay(photo, maps[1], colours)),
        ("where they differ", marked),
    )
