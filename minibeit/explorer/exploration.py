"""`explore`: one image and one model, as a page."""

from __future__ import annotations

import html
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..evaluate.drawing import as_png, as_seen
from ..files import atomic_write
from ..image_processor import BeitImageProcessor, default_processor
from ..task_table import in_words
from .attention import AttentionTrace
from .outcome import OUTCOMES, Outcome, Progress, Seen
from .page import page
from .regions import Regions, operations, regions_for, work_of

FRAME_HEIGHT = 900  # pixels of the page within a notebook


@dataclass(frozen=True)
class Exploration:
    """What the page shows: `facts` as JSON has them, `arrays` by name.  In a notebook it displays itself."""

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def html(self) -> str:
        """The page: one file that needs neither a network nor anything else."""
        return page(self.facts, self.arrays)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page to a file."""
        with atomic_write(path) as file:
            file.write(self.html().encode())

    def _repr_html_(self) -> str:
        """The page within a frame, so that its style and the notebook's leave each other alone."""
        return (
            f'<iframe title="{html.escape(self.facts["title"])}" width="100%" height="{FRAME_HEIGHT}" '
            f'style="border:1px solid #8886;border-radius:6px" srcdoc="{html.escape(self.html())}"></iframe>'
        )


def explore(
    model: Any,
    image: Any,
    processor: BeitImageProcessor | None = None,
    tokenizer: Any | None = None,
    *,
    mask_side: int | None = None,
    names: tuple[str, str] | None = None,
    progress: Progress = lambda done, count: None,
) -> Exploration:
    """Where every head of `model` looks in `image`, what the model says, and what changes when patches are masked.

    `image` is anything that `processor` takes; without a processor images are resized to the model's size (bilinear)
    and normalised with mean and standard deviation 0.5.  `tokenizer`, for a model of masked image modelling, is the one
    whose visual tokens the model predicts.  `mask_side` is the side of the squares that are masked one after the other,
    in patches: 1 for every patch, by default the least that takes about ten seconds on two cores.  `names` are those
    of image and model in the title.  `progress` is called with the masked passes done and their number.
    Raises ImageError for an image that cannot be read, ValueError for arguments that do not go together.
    """
    config = model.config
    processor = default_processor(config) if processor is None else processor
    pixels = np.asarray(processor(image).pixel_values)
    if len(pixels) != 1:
        raise ValueError(f"image: expected one image, found {len(pixels)}")
    check_tokenizer(model, tokenizer)
    grid = (pixels.shape[2] // config.patch_shape[0], pixels.shape[3] // config.patch_shape[1])
    regions = regions_for(grid, operations(model, grid), mask_side, work_of(model))
    heads = config.num_attention_heads
    trace = AttentionTrace(model.ops, config.num_hidden_layers, heads, config.hidden_size // heads, grid)
    seen = Seen(model, pixels, as_seen(pixels[0], processor), regions, tokenizer, progress)
    outcome = OUTCOMES[model.task](seen, trace)
    found = trace.finish()
    facts = {
        **facts_of(model, names or (name_of(image), type(model).__name__)),
        "grid": list(grid),
        "photo": as_png(seen.photo),
        "blocks": found.blocks,
        "rollout_blocks": found.rollout_blocks,
        "bits": found.bits,
        "difference": found.difference,
        "regions": region_facts(regions, outcome),
        **outcome.facts,
    }
    return Exploration(facts, {**found.arrays, **outcome.arrays})


def facts_of(model: Any, names: tuple[str, str]) -> dict[str, Any]:
    """What is known of a model before it has seen anything."""
    from .. import __version__

    c = model.config
    return {
        "title": f"{names[0]} seen by {names[1]}",
        "image": names[0],
        "model": names[1],
        "task": in_words(model.task),
        "depth": c.num_hidden_layers,
        "heads": c.num_attention_heads,
        "width": c.hidden_size,
        "patch": list(c.patch_shape),
        "parameters": model.num_parameters(),
        "made": f"minibeit {__version__}, backend {model.ops.backend}, {model.dtype}",
    }


def region_facts(regions: Regions, outcome: Outcome) -> dict[str, Any] | None:
    """The regions that were masked; None if none were."""
    if not outcome.masked:
        return None
    rows, columns = regions.shape
    return {"side": regions.side, "rows": rows, "columns": columns}


def check_tokenizer(model: Any, tokenizer: Any) -> None:
    """Raises ValueError or CheckpointError for a tokenizer that is of no use to the model."""
    if tokenizer is None:
        return
    if model.task != "masked_image_modeling":
        raise ValueError(f"tokenizer: is for masked image modeling, the model is for {in_words(model.task)}")
    if tokenizer.config.vocab_size != model.config.vocab_size:
        raise CheckpointError(
            f"tokenizer: has {tokenizer.config.vocab_size} visual tokens, but the model predicts "
            f"{model.config.vocab_size}; give the tokenizer that it was pre-trained with"
        )


def name_of(image: Any) -> str:
    """The name of an image's file, or "an image"."""
    return Path(image).name if isinstance(image, (str, os.PathLike)) else "an image"
