"""What an evaluation finds: figures with intervals, figures of each class, confusions, and the worst images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SHARE, NUMBER, SMALL, COSINE = "share", "number", "small", "cosine"
FORMATS = {NUMBER: ".4f", SMALL: ".3g", COSINE: ".6f"}
TITLES = {"top1": "top-1", "top5": "top-5", "mean_iou": "mean IoU", "mean_accuracy": "mean accuracy",
          "pixel_accuracy": "pixel accuracy", "iou": "IoU", "token_accuracy": "token accuracy",
          "same_top1": "same top-1", "shared_top5": "shared top-5", "same_tokens": "same tokens",
          "same_pixels": "same pixels", "kl": "KL divergence", "relative_rms": "relative RMS"}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A number, the 95% interval around it, and its kind, which says how it is shown: SHARE is one of 0 to 1."""

    name: str
    value: float
    low: float = math.nan
    high: float = math.nan
    kind: str = SHARE

    @property
    def title(self) -> str:
        """The name as a person reads it."""
        return TITLES.get(self.name, self.name)

    def shown(self) -> str:
        """The number as a person reads it."""
        if math.isnan(self.value):
            return "–"
        return f"{100 * self.value:.2f}%" if self.kind == SHARE else format(self.value, FORMATS[self.kind])

    def interval(self) -> str:
        """The interval as a person reads it; empty where there is none."""
        if math.isnan(self.low):
            return ""
        if self.kind == SHARE:
            return f"{100 * self.low:.2f} to {100 * self.high:.2f}"
        return " to ".join(format(end, FORMATS[self.kind]) for end in (self.low, self.high))


@dataclass(frozen=True)
class ClassRow:
    """The figures of one class, and how many images (or pixels) it has."""

    index: int
    name: str
    count: int
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Worst:
    """An image that the model is most wrong about: what is said of it, and drawings (uint8, (h, w, 3)) with titles."""

    path: str
    text: str
    score: float
    drawings: tuple[tuple[str, np.ndarray], ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """A model measured on data.

    `names` are those of all classes, `classes` the figures of those that occur.  `confusions` are (true class,
    predicted class, count).  `legend` gives the colours of classes in the drawings.  `left_out` are sentences about
    images that could not be used; `settings` say how it was measured.
    """

    task: str
    model: str
    data: str
    images: int
    figures: tuple[Figure, ...]
    classes: tuple[ClassRow, ...]
    unit: str
    names: tuple[str, ...] = ()
    confusions: tuple[tuple[int, int, int], ...] = ()
    worst: tuple[Worst, ...] = ()
    legend: tuple[tuple[str, tuple[int, int, int]], ...] = ()
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it but the drawings, for JSON."""
        return {
            "task": self.task,
            "model": self.model,
            "data": self.data,
            "images": self.images,
            "figures": {figure.name: _numbers(figure) for figure in self.figures},
            "classes": [
                {"index": row.index, "name": row.name, self.unit: row.count}
                | {figure.name: _numbers(figure) for figure in row.figures}
                for row in self.classes
            ],
            "confusions": [dict(zip(("true", "predicted", "count"), triple)) for triple in self.confusions],
            "worst": [{"file": worst.path, "text": worst.text, "score": worst.score} for worst in self.worst],
            "left_out": list(self.left_out),
            "notes": list(self.notes),
            "settings": self.settings,
            "seconds": round(self.seconds, 3),
        }


def triples(confusion: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """The entries of a confusion matrix (K, K) that are not 0, as (true, predicted, count)."""
    true, predicted = np.nonzero(confusion)
    counts = confusion[true, predicted]
    return tuple(zip(true.tolist(), predicted.tolist(), counts.tolist()))


def _numbers(figure: Figure) -> dict[str, float]:
    return {"value": figure.value, "low": figure.low, "high": figure.high}
