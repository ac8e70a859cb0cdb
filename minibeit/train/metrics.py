"""Metrics of predictions, and their record: lines of JSON and a plot of the curves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..files import atomic_write
from ..metrics import ranks
from ..model.masked_modeling import IGNORE_INDEX
from ..ops import reference
from ..text import json_text
from .examples import MULTI, REGRESSION, SINGLE

BEST = {SINGLE: ("top1", 1), MULTI: ("f1", 1), REGRESSION: ("rmse", -1)}  # what decides, and whether more is better


def right_answers(logits: np.ndarray, targets: np.ndarray, problem: str) -> float:
    """How many rows of a batch are right: the largest logit is the label's; all classes are on the right side of 0.

    For regression there is no right and wrong: 0.
    """
    if problem == SINGLE:
        return float((logits.argmax(1) == (targets if targets.ndim == 1 else targets.argmax(1))).sum())
    return float(((logits > 0) == (targets > 0.5)).all(1).sum()) if problem == MULTI else 0.0


def metrics(logits: np.ndarray, targets: np.ndarray, problem: str) -> dict[str, float]:
    """The scores of all predictions (n, K), in float64.

    Single label: top1, top5 and the cross-entropy.  Several labels: f1 over all classes (micro), exact (share of rows
    with every class right) and the binary cross-entropy.  Regression: rmse and the mean squared error.
    """
    x = logits.astype(np.float64)
    if problem == REGRESSION:
        error = float(reference.mse_loss(x, targets.reshape(x.shape)))
        return {"loss": error, "rmse": error**0.5}
    if problem == MULTI:
        loss = reference.bce_with_logits(x, targets)
        said, true = x > 0, targets > 0.5
        both = float((said & true).sum())
        f1 = 2 * both / max(float(said.sum() + true.sum()), 1.0)
        return {"loss": float(loss), "f1": f1, "exact": right_answers(x, targets, problem) / len(x)}
    before = ranks(x, targets)
    loss = reference.cross_entropy(x, targets, IGNORE_INDEX)
    return {"loss": float(loss), "top1": float((before < 1).mean()), "top5": float((before < 5).mean())}


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy of a histogram: how many tokens, if all were equally frequent, would be as varied."""
    shares = counts[counts > 0] / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def better(row: dict[str, Any], best: dict[str, Any] | None, by: tuple[str, int]) -> bool:
    """Whether an epoch is at least as good as the best so far: by the held-out metric `by` (its name, and 1 if more is
    better, else -1), or without held-out images the later one."""
    name, sign = by
    if best is None or f"held_out_{name}" not in row:
        return True
    return sign * row[f"held_out_{name}"] >= sign * best[f"held_out_{name}"]


def write_log(path: str | os.PathLike[str], rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line."""
    with atomic_write(path) as file:
        file.write("".join(json_text(row) + "\n" for row in rows).encode())


# The plot of the curves ---------------------------------------------------------------------------------------------

WIDTH, HEIGHT, MARGIN = 480, 320, 44
SCORES = ("top1", "top5", "f1", "exact", "rmse", "accuracy", "used", "iou")  # drawn together: shares, but for rmse
COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189))


def draw_curves(path: str | os.PathLike[str], rows: Sequence[dict[str, Any]]) -> None:
    """A PNG: on the left the losses by epoch, on the right the scores."""
    scores = [name for name in rows[0] if name.rpartition("_")[2] in SCORES]
    losses = [name for name in ("train_loss", "held_out_loss") if name in rows[0]]
    picture = Image.new("RGB", (2 * WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    for left, names in ((0, losses), (WIDTH, scores)):
        _panel(draw, left, names, rows)
    with atomic_write(Path(path)) as file:
        picture.save(file, "PNG")


def _panel(draw: ImageDraw.ImageDraw, left: int, names: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    values = [float(row[name]) for name in names for row in rows]
    if not values:
        return
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    x0, x1, y0, y1 = left + MARGIN, left + WIDTH - 12, HEIGHT - 28, 16 + 12 * len(names)
    draw.rectangle((x0, y1, x1, y0), outline=(120, 120, 120))
    draw.text((left + 4, y1), f"{high:.4g}", fill="black")
    draw.text((left + 4, y0 - 10), f"{low:.4g}", fill="black")
    draw.text((x0, y0 + 6), "epoch 1", fill="black")
    draw.text((x1 - 20, y0 + 6), str(len(rows)), fill="black")
    for i, name in enumerate(names):
        points = [
            (x0 + (x1 - x0) * k / max(len(rows) - 1, 1), y0 - (y0 - y1) * (float(row[name]) - low) / span)
            for k, row in enumerate(rows)
        ]
        draw.line(points if len(points) > 1 else points * 2, fill=COLORS[i % 4], width=2)
        draw.text((x0, 4 + 12 * i), name.replace("_", " "), fill=COLORS[i % 4])
