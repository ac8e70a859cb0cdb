"""Two models on the same images: the result of a comparison, and what those of all tasks share.

Neither is the truth: A is what B is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..metrics import kl_divergence, ratio_interval
from .drawing import thumbnail_of
from .evaluation import SMALL, Evaluation, Figure, Worst
from .reading import Reader

Pixels = tuple[np.ndarray, np.ndarray]  # what A and what B sees; one array where both see the same
Read = Callable[[str], Pixels]


@dataclass(frozen=True)
class How:
    """How images are read and shown: `batch_size` at a time, by `workers` threads, the `worst` listed, with `draw`
    drawn; `seed` is that of the intervals; `tell` gets the number of images done after each batch."""

    batch_size: int = 8
    workers: int = 2
    worst: int = 24
    draw: bool = True
    seed: int = 0
    tell: Callable[[int], None] = lambda done: None


DEFAULT = How()


@dataclass(frozen=True)
class Comparison(Evaluation):
    """Two models on the same images.  `a` and `b` say what each is; the rows of `confusions` are A's, columns B's."""

    a: dict[str, Any] = field(default_factory=dict)
    b: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it but the drawings, for JSON."""
        found = super().to_dict()
        found.pop("model")
        found["confusions"] = [dict(zip(("a", "b", "count"), triple)) for triple in self.confusions]
        return {"task": found.pop("task"), "a": self.a, "b": self.b, **found}


@dataclass(frozen=True)
class Distance:
    """How far outputs of one image are apart, as sums that add up over images.

    `squares` of the differences, `size` the squares of A's, `divergence` the KL divergences of `terms` distributions.
    """

    squares: float
    size: float
    divergence: float = 0.0
    terms: int = 0

    @property
    def mean_divergence(self) -> float:
        """KL(A, B) in nats, the mean over what the image has distributions of."""
        return self.divergence / self.terms if self.terms else math.nan

    @property
    def relative_rms(self) -> float:
        """RMS of the differences over the RMS of A's outputs."""
        return math.sqrt(self.squares / self.size) if self.size else math.nan


def distances(a: np.ndarray, b: np.ndarray, axis: int | None = None) -> list[Distance]:  # two of (B, ...) -> B
    """How far outputs of B images are apart; with `axis`, that of the classes, also as distributions."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    others = tuple(range(1, x.ndim))
    squares, size = ((x - y) ** 2).sum(others), (x**2).sum(others)
    if axis is None:
        return [Distance(float(d), float(s)) for d, s in zip(squares, size)]
    divergences = kl_divergence(x, y, axis).reshape(len(x), -1)
    rows = zip(squares, size, divergences.sum(1))
    return [Distance(float(d), float(s), float(kl), divergences.shape[1]) for d, s, kl in rows]


def divergence_of(found: Sequence[Distance], seed: int) -> Figure:
    """KL(A, B) in nats, the mean over all distributions; its interval a bootstrap over images."""
    return _ratio("kl", [one.divergence for one in found], [one.terms for one in found], seed)


def rms_of(found: Sequence[Distance], seed: int) -> Figure:
    """RMS of the differences over the RMS of A's outputs, over all images; its interval a bootstrap over images."""
    ratio = _ratio("relative_rms", [one.squares for one in found], [one.size for one in found], seed)
    return Figure(ratio.name, math.sqrt(ratio.value), math.sqrt(ratio.low), math.sqrt(ratio.high), SMALL)


def _ratio(name: str, parts: Sequence[float], wholes: Sequence[float], seed: int) -> Figure:
    if not all(wholes) or not wholes:
        return Figure(name, math.nan, kind=SMALL)
    interval = ratio_interval(np.array(parts, np.float64), np.array(wholes, np.float64), seed=seed)
    return Figure(name, sum(parts) / sum(wholes), *interval, SMALL)


def same_pixels(a: Any, b: Any) -> bool:
    """Whether two image processors make the same of every image."""
    return bool(a.to_dict() == b.to_dict())


def reader_of(a: Any, b: Any) -> Read:
    """What reads an image for both models, each by its own image processor; once, if these do the same."""
    if same_pixels(a, b):

        def read_once(path: str) -> Pixels:
            pixels = a(path).pixel_values[0]
            return pixels, pixels

        return read_once
    return lambda path: (a(path).pixel_values[0], b(path).pixel_values[0])


def batches(reader: Reader[str], size: int) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
    """(paths, pixel values of A (B, C, H, W), those of B) of images that fit into a batch on both sides."""
    for paths, pixels in reader.groups(size, lambda two: (two[0].shape, two[1].shape)):
        of_a = np.stack([a for a, _ in pixels])
        shared = all(a is b for a, b in pixels)
        yield paths, of_a, of_a if shared else np.stack([b for _, b in pixels])


def furthest(found: Sequence[Worst]) -> list[Worst]:
    """Those of largest score first, those that do not differ at all left out."""
    return sorted((one for one in found if one.score > 0), key=lambda one: -one.score)


def shown(found: Sequence[Worst], how: How) -> tuple[Worst, ...]:
    """The first of them, as many as `how` says, with the images themselves if they are to be drawn."""
    some = tuple(found[: how.worst])
    if not how.draw:
        return some
    photos = (thumbnail_of(one.path) for one in some)
    return tuple(one if photo is None else replace(one, drawings=(("", photo),)) for one, photo in zip(some, photos))
