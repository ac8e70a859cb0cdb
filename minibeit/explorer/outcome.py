"""What a model says of an image, and what changes when squares of patches are masked: one function per task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..colours import class_colours
from ..errors import CheckpointError
from ..evaluate.drawing import as_png, levels
from ..ops.reference import softmax
from ..scores import is_regression, scores
from ..trace import Trace
from .regions import Regions, covered, in_batches

TOP = 5  # classes or visual tokens of an answer
APART = 3  # tokens: what is farther away changes little of what a token decodes to
Progress = Callable[[int, int], None]


@dataclass
class Seen:
    """What the outcome is computed from.

    `pixels` (1, C, height, width) are those of the model, `photo` (height, width, 3) the same as an image.
    """

    model: Any
    pixels: np.ndarray
    photo: np.ndarray
    regions: Regions
    tokenizer: Any  # or None
    progress: Progress


@dataclass
class Outcome:
    """`facts` for the page as JSON, `arrays` for it as packed text; `regions` where squares of patches were masked."""

    facts: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    masked: bool = False


def of_encoder(seen: Seen, trace: Trace) -> Outcome:
    """Of the encoder alone: nothing, but it is run for its attention."""
    seen.model(seen.pixels, trace=trace)
    return Outcome()


def of_classification(seen: Seen, trace: Trace) -> Outcome:
    """The highest scores, with the image as it is and with each region covered by the image's mean colour."""
    config = seen.model.config
    whole = finite(seen.model(seen.pixels, trace=trace).logits)

    def compute(masks: np.ndarray) -> np.ndarray:
        return finite(seen.model(covered(seen.pixels[0], masks, seen.regions.grid)).logits)

    rows = [whole, *in_batches(seen.regions.masks(), compute, seen.progress)]
    values = scores(np.concatenate(rows), config.problem_type)  # (1 + regions, K)
    kept = np.unique(np.argsort(-values, axis=1, kind="stable")[:, :TOP])
    facts = {
        "names": [config.id2label[int(i)] for i in kept],
        "numbers": kept.tolist(),
        "regression": is_regression(config.problem_type, values.shape[1]),
    }
    return Outcome({"classes": facts}, {"class_values": values[:, kept].astype(np.float32)}, masked=True)


def of_masked_modeling(seen: Seen, trace: Trace) -> Outcome:
    """The visual tokens predicted for each patch while its region is hidden; with a tokenizer also the image's own,
    and what both stand for.
    """
    if not seen.model.config.use_mask_token:
        return of_encoder(seen, trace)
    seen.model(seen.pixels, trace=trace)
    own = None if seen.tokenizer is None else own_tokens(seen)
    P = seen.regions.grid[0] * seen.regions.grid[1]
    best, chance, own_chance = np.zeros((P, TOP), np.int32), np.zeros((P, TOP), np.float32), np.zeros(P, np.float32)

    def compute(masks: np.ndarray) -> np.ndarray:
        pixels = np.repeat(seen.pixels, len(masks), axis=0)
        logits = finite(seen.model(pixels, bool_masked_pos=masks, return_all_tokens=False).logits)  # (n, V)
        hidden = np.nonzero(masks)[1]
        probs = softmax(logits.astype(np.float64))
        top = np.argsort(-probs, axis=1, kind="stable")[:, :TOP]
        best[hidden, : top.shape[1]], chance[hidden, : top.shape[1]] = top, np.take_along_axis(probs, top, 1)
        if own is not None:
            own_chance[hidden] = probs[np.arange(len(hidden)), own.reshape(-1)[hidden]]
        return logits

    in_batches(seen.regions.masks(), compute, seen.progress)
    facts: dict[str, Any] = {"vocabulary": seen.model.config.vocab_size, "own": own is not None}
    arrays: dict[str, np.ndarray] = {"token_best": best, "token_chance": chance}
    if own is not None:
        arrays |= {"token_own": own.reshape(-1).astype(np.int32), "token_own_chance": own_chance}
        if seen.tokenizer.has_decoder:
            facts |= drawn_tokens(seen, own, best[:, 0].reshape(seen.regions.grid))
    return Outcome({"tokens": facts}, arrays, masked=True)


def own_tokens(seen: Seen) -> np.ndarray:  # -> (gh, gw)
    """The tokenizer's visual token of every patch."""
    grid, pooling = seen.regions.grid, seen.tokenizer.pooling
    return seen.tokenizer.encode(seen.tokenizer.preprocess(seen.photo, (grid[0] * pooling, grid[1] * pooling)))[0]


def drawn_tokens(seen: Seen, own: np.ndarray, predicted: np.ndarray) -> dict[str, str]:
    """The image's own tokens decoded; and an image whose every region shows what it decodes to with the predicted
    tokens in it and the image's own around it.

    Regions that are APART tokens or more from each other are decoded in one image.
    """
    masks = seen.regions.apart(APART).reshape(-1, *own.shape)
    pooling = seen.tokenizer.pooling
    pieced = levels(seen.tokenizer.decode(own[None])[0]).copy()
    drawn = {"own_drawn": as_png(pieced)}
    for mask in masks:
        image = levels(seen.tokenizer.decode(np.where(mask, predicted, own)[None])[0])
        place = mask.repeat(pooling, axis=0).repeat(pooling, axis=1)
        pieced[place] = image[place]
    return {**drawn, "predicted_drawn": as_png(pieced)}


def of_segmentation(seen: Seen, trace: Trace) -> Outcome:
    """The class of every pixel of what the model saw."""
    from ..image_processor import BeitImageProcessor

    config = seen.model.config
    output = seen.model(seen.pixels, trace=trace)
    finite(output.logits)
    (labels,) = BeitImageProcessor().post_process_semantic_segmentation(output, [seen.photo.shape[:2]])
    colours = class_colours(config.num_labels)
    counts = np.bincount(labels.reshape(-1), minlength=config.num_labels)
    found = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    classes = [
        {
            "number": i,
            "name": config.id2label[i],
            "colour": list(colours[i]),
            "share": float(counts[i] / labels.size),
        }
        for i in found
    ]
    return Outcome({"segmentation": {"classes": classes}}, {"labels": labels.astype(np.uint16)})


OUTCOMES: dict[str, Callable[[Seen, Trace], Outcome]] = {
    "model": of_encoder,
    "backbone": of_encoder,
    "image_classification": of_classification,
    "masked_image_modeling": of_masked_modeling,
    "semantic_segmentation": of_segmentation,
}


def finite(values: np.ndarray) -> np.ndarray:
    """What the model computed.  Raises CheckpointError for NaNs, since the pixels were checked before."""
    if not np.isfinite(values).all():
        raise CheckpointError("the model computes NaN or infinite values, so its checkpoint must be damaged")
    return values
