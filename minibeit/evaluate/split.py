"""Which images of a user's data a model is measured on: those that are held out, where the data has a split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..train.splits import HELD_OUT, Item

NO_SPLIT = (
    "the data has no split, so all of its images are measured; those that the model has learned from make it look "
    "better than it is"
)


def held_out(data: Path, found: Sequence[Item]) -> list[Item]:
    """What is held out; all of it where nothing is said of a split.

    Raises ValueError, one sentence, for a split that holds nothing out.
    """
    said = {one.held_out for one in found}
    if said <= {None}:
        return list(found)
    if True not in said:
        raise ValueError(
            f"{data}: expected held-out images ({HELD_OUT[0]} or {HELD_OUT[-1]}) to measure a model on, found only "
            f"{len(found)} to learn from; to measure it on those, leave out the column split"
        )
    return [one for one in found if one.held_out]


def without_split(data: Path, found: Sequence[Any]) -> tuple[str, ...]:
    """A note if nothing says that the images are held out, not even the name of their folder; else none."""
    place = data.resolve()
    names = place.stem.lower(), place.parent.name.lower() if place.name == "images" else ""
    return () if set(names) & set(HELD_OUT) or any(one.held_out for one in found) else (NO_SPLIT,)
