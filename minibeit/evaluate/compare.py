"""Two classifiers, models of masked image modelling or encoders on the same images."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..masking import nonempty_block_mask
from ..metrics import mean_interval, ratio_interval, wilson
from ..train.recipes import PRETRAINING
from .comparison import (
    DEFAULT,
    Comparison,
    Distance,
    How,
    Read,
    batches,
    distances,
    divergence_of,
    furthest,
    rms_of,
    shown,
)
from .evaluation import COSINE, ClassRow, Figure, Worst
from .reading import Reader

Compute = Callable[[np.ndarray], Any]
RECIPE = PRETRAINING["base-1k"]  # of which the share of masked patches is used, 75 of 196
MOST_NAMED = 5


# Classifiers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """What two classifiers say of one image: the class each names first, its probability, and how far they differ."""

    path: str
    classes: tuple[int, int]
    probabilities: tuple[float, float]
    shared: float  # of A's five classes of largest logits, the share that is among B's
    distance: Distance


def compare_classification(
    a: Compute,
    b: Compute,
    /,
    paths: Sequence[str],
    read: Read,
    names: Sequence[str],
    how: How = DEFAULT,
    **facts: Any,
) -> Comparison:
    """Compares what `a` and `b`, functions from pixel values (B, C, H, W) to logits (B, K), say of images.

    `same_top1`: the share of images of which both name the same class first; `shared_top5` (for more than five
    classes): of A's five, the share that is among B's five, the mean over images; `kl`: KL(A, B) of the probabilities
    in nats, the mean; `relative_rms`: of the logits.  Worst are images whose class changes, then by KL divergence.
    `facts` are further fields of the `Comparison`.
    """
    started, found = time.monotonic(), []
    reader: Reader[str] = Reader(paths, read, how.workers)
    for some, pixels_a, pixels_b in batches(reader, how.batch_size):
        found += named(some, a(pixels_a), b(pixels_b))
        how.tell(len(found))
    pairs = Counter(one.classes for one in found)
    return Comparison(
        task="image_classification",
        images=len(found),
        figures=_figures_of_classes(found, len(names), how.seed),
        classes=_rows(pairs, names),
        unit="images",
        names=tuple(names),
        confusions=tuple((first, second, count) for (first, second), count in sorted(pairs.items())),
        worst=shown([_shown(one, names) for one in _by_harm(found)], how),
        left_out=tuple(reader.left_out),
        seconds=time.monotonic() - started,
        **facts,
    )


def named(paths: Sequence[str], a: np.ndarray, b: np.ndarray) -> list[Named]:
    """What logits (B, K) of both say of each image."""
    best, shares = [], []
    for logits in (a, b):
        x = logits.astype(np.float64)
        best.append(x.argmax(1))
        shares.append(1 / np.exp(x - x.max(1, keepdims=True)).sum(1))
    five = [np.argsort(-logits, axis=1, kind="stable")[:, :MOST_NAMED] for logits in (a, b)]
    shared = [len(set(x) & set(y)) / len(x) for x, y in zip(five[0].tolist(), five[1].tolist())]
    rows = zip(paths, *best, *shares, shared, distances(a, b, axis=1))
    return [
        Named(path, (int(i), int(j)), (float(p), float(q)), share, distance)
        for path, i, j, p, q, share, distance in rows
    ]


def _figures_of_classes(found: Sequence[Named], classes: int, seed: int) -> tuple[Figure, ...]:
    n, same = len(found), sum(one.classes[0] == one.classes[1] for one in found)
    figures = [Figure("same_top1", same / n if n else float("nan"), *wilson(same, n))]
    if classes > MOST_NAMED:
        shared = np.array([one.shared for one in found])
        figures.append(Figure("shared_top5", float(shared.mean()) if n else float("nan"), *mean_interval(shared)))
    between = [one.distance for one in found]
    return *figures, divergence_of(between, seed), rms_of(between, seed)


def _rows(pairs: Counter[tuple[int, int]], names: Sequence[str]) -> tuple[ClassRow, ...]:
    """For each class that A names first, how often B does too."""
    totals: Counter[int] = Counter()
    for (first, _), count in pairs.items():
        totals[first] += count
    return tuple(
        ClassRow(
            i, names[i], totals[i], (Figure("same_top1", pairs[i, i] / totals[i], *wilson(pairs[i, i], totals[i])),)
        )
        for i in sorted(totals)
    )  # fmt: skip


def _shown(one: Named, names: Sequence[str]) -> Worst:
    (i, j), (p, q), divergence = one.classes, one.probabilities, one.distance.mean_divergence
    text = f"{names[i]} ({p:.1%}) in A, {names[j]} ({q:.1%}) in B, KL {divergence:.3g}"
    return Worst(one.path, text, divergence)


def _by_harm(found: Sequence[Named]) -> list[Named]:
    """Images whose class changes first, then by KL divergence; those that do not differ are left out."""
    differing = [one for one in found if one.distance.squares > 0]
    return sorted(differing, key=lambda one: (one.classes[0] == one.classes[1], -one.distance.mean_divergence))


# Masked image modelling -----------------------------------------------------------------------------------------------


def masks_of(paths: Sequence[str], grid: tuple[int, int]) -> np.ndarray:  # -> (B, P)
    """A mask for each image, 75 of 196 patches in blocks, drawn by the digest of its file: always the same."""
    count = max(1, round(RECIPE.masked * grid[0] * grid[1]))
    seeds = [int(hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16], 16) for path in paths]
    return np.stack([nonempty_block_mask(grid, count, np.random.default_rng(seed)).reshape(-1) for seed in seeds])


def compare_masked_modeling(
    a: Callable[..., Any],
    b: Callable[..., Any],
    /,
    paths: Sequence[str],
    read: Read,
    grid: tuple[int, int],
    how: How = DEFAULT,
    **facts: Any,
) -> Comparison:
    """Compares the visual tokens that two BeitForMaskedImageModeling predict for masked patches of images.

    Figures: `same_tokens`, the share of masked patches whose token of largest logit is the same; `kl` and
    `relative_rms` of the logits of masked patches; `cosine`, the mean over all tokens of the last hidden states.
    """
    started, rows = time.monotonic(), []
    reader: Reader[str] = Reader(paths, read, how.workers)
    for some, pixels_a, pixels_b in batches(reader, how.batch_size):
        masks = masks_of(some, grid)
        outputs = [
            model(pixels, bool_masked_pos=masks, output_hidden_states=True)
            for model, pixels in ((a, pixels_a), (b, pixels_b))
        ]
        cosines = cosine(*(output.hidden_states[-1] for output in outputs))
        for path, mask, x, y, close in zip(some, masks, outputs[0].logits, outputs[1].logits, cosines):
            same = int((x[mask].argmax(1) == y[mask].argmax(1)).sum())
            rows.append((path, same, distances(x[mask][None], y[mask][None], axis=2)[0], close))
        how.tell(len(rows))
    return Comparison(
        task="masked_image_modeling",
        images=len(rows),
        figures=_figures_of_tokens(rows, how.seed),
        classes=(),
        unit="patches",
        worst=shown(furthest([_shown_tokens(*row) for row in rows]), how),
        left_out=tuple(reader.left_out),
        seconds=time.monotonic() - started,
        **facts,
    )


def _figures_of_tokens(rows: Sequence[tuple[str, int, Distance, float]], seed: int) -> tuple[Figure, ...]:
    between = [distance for _, _, distance, _ in rows]
    same, masked = np.array([row[1] for row in rows], float), np.array([one.terms for one in between], float)
    share = float(same.sum() / masked.sum()) if rows else float("nan")
    figure = Figure("same_tokens", share, *ratio_interval(same, masked, seed=seed))
    return figure, divergence_of(between, seed), rms_of(between, seed), _mean_cosine([row[3] for row in rows])


def _shown_tokens(path: str, same: int, distance: Distance, close: float) -> Worst:
    kl, masked = distance.mean_divergence, distance.terms
    return Worst(path, f"{same} of {masked} tokens the same, KL {kl:.3g}, cosine {close:.6f}", kl)


# Encoders -------------------------------------------------------------------------------------------------------------


def compare_features(
    a: Callable[[np.ndarray], Sequence[np.ndarray]],
    b: Callable[[np.ndarray], Sequence[np.ndarray]],
    /,
    paths: Sequence[str],
    read: Read,
    places: Sequence[str],
    how: How = DEFAULT,
    **facts: Any,
) -> Comparison:
    """Compares features: `a` and `b` make of pixel values an array (B, n, D) for each of `places`.

    Figures, of the last place: `cosine`, the mean over tokens and images, and `relative_rms`; each place has a row.
    Raises ValueError for features of different shapes.
    """
    started = time.monotonic()
    reader: Reader[str] = Reader(paths, read, how.workers)
    done: list[str] = []
    found: list[list[tuple[float, Distance]]] = [[] for _ in places]  # for each place, for each image
    for some, pixels_a, pixels_b in batches(reader, how.batch_size):
        for place, rows, x, y in zip(places, found, a(pixels_a), b(pixels_b)):
            if x.shape != y.shape:
                raise ValueError(
                    f"{place}: expected features of one shape, found {x.shape} in A and {y.shape} in B; give models of "
                    "one width and one image size"
                )
            rows += zip(cosine(x, y), distances(x, y))
        done += some
        how.tell(len(done))
    rows_of = [_figures_of_features(rows, how.seed) for rows in found]
    last = zip(done, found[-1])
    return Comparison(
        task="features",
        images=len(done),
        figures=rows_of[-1],
        classes=tuple(ClassRow(i, place, len(done), rows) for i, (place, rows) in enumerate(zip(places, rows_of))),
        unit="images",
        names=tuple(places),
        worst=shown(furthest([_shown_features(path, *row) for path, row in last]), how),
        left_out=tuple(reader.left_out),
        seconds=time.monotonic() - started,
        **facts,
    )


def cosine(a: np.ndarray, b: np.ndarray) -> list[float]:  # two of (B, n, D) -> B
    """The mean over tokens of the cosine between two vectors (D,), for each image; in float64."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return ((x * y).sum(-1) / np.maximum(lengths, np.finfo(np.float64).tiny)).mean(-1).tolist()


def _figures_of_features(rows: Sequence[tuple[float, Distance]], seed: int) -> tuple[Figure, ...]:
    return _mean_cosine([close for close, _ in rows]), rms_of([distance for _, distance in rows], seed)


def _mean_cosine(values: Sequence[float]) -> Figure:
    array = np.array(values, float)
    return Figure("cosine", float(array.mean()) if len(array) else float("nan"), *mean_interval(array), COSINE)


def _shown_features(path: str, close: float, distance: Distance) -> Worst:
    return Worst(path, f"cosine {close:.6f}, relative RMS {distance.relative_rms:.3g}", distance.relative_rms)
