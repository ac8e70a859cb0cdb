"""Masked image modelling measured: the loss and the share of visual tokens that are predicted rightly."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import BeitConfig
from ..image_processor import BeitImageProcessor
from ..images.transforms import resize_labels
from ..metrics import ratio_interval
from ..places import place
from ..train.examples import Example, Examples, listed_images
from ..train.pretraining import MaskedModeling, token_losses
from ..train.recipes import PRETRAINING
from ..train.splits import held_out_folders, images_in
from .drawing import thumbnail_of
from .evaluation import NUMBER, Evaluation, Figure, Worst
from .reading import AHEAD, Measured, Reader
from .split import held_out

RECIPE = PRETRAINING["base-1k"]  # of which the share of masked patches is used, 75 of 196
COVER = (128, 128, 128)


@dataclass(frozen=True)
class Predicted:
    """What a model says of the masked patches of one image: the sum of losses, how many are right, and the mask."""

    path: str
    loss: float
    right: int
    masked: int
    mask: np.ndarray  # (P,)


def unlabelled_images(data: Path) -> list[Example]:
    """The images of a folder at any depth (of val/, test/ or the like if it is there), or those of a list.

    Of a list with a split, the held-out images are taken.  None is read.  Raises FileNotFoundError or ValueError, one
    sentence.
    """
    if data.is_file():
        return held_out(data, listed_images(data))
    if not data.is_dir():
        raise FileNotFoundError(f"{data}: there is no such folder or list of images")
    part = next(iter(held_out_folders(data)), None)
    found = [Example(str(path), None, None if part is None else True) for path in images_in(part or data)]
    if not found:
        raise ValueError(f"{part or data}: expected images, found none")
    return found


def evaluate_masked_modeling(
    network: Callable[..., Any],
    config: BeitConfig,
    processor: BeitImageProcessor,
    tokenizer: Any,
    paths: Sequence[str],
    *,
    batch_size: int = 8,
    workers: int = 2,
    worst: int = 24,
    draw: bool = True,
    seed: int = 0,
    tell: Callable[[int], None] = lambda done: None,
    **facts: Any,
) -> Evaluation:
    """Measures `network`, a BeitForMaskedImageModeling, as pre-training judges held-out images.

    It is to predict the tokens that `tokenizer` gives to the images at `paths`.
    Each image is resized to the model's size and to that which gives a token for each patch; 75 of 196 patches are
    masked in blocks, drawn by the digest of its file, so that the same file always has the same mask.  Figures are the
    mean cross-entropy of all masked patches and the share of them whose token has the largest logit; their intervals
    are bootstrapped over images.  `facts` are further fields of the `Evaluation`.
    Raises ValueError for a tokenizer with another number of tokens.
    """
    started = time.monotonic()
    measured = predicted_images(
        network, config, processor, tokenizer, paths, batch_size=batch_size, workers=workers, tell=tell
    )
    seconds = time.monotonic() - started
    return masked_modeling_of(measured, config, worst=worst, draw=draw, seed=seed, seconds=seconds, **facts)


def predicted_images(
    network: Callable[..., Any],
    config: BeitConfig,
    processor: BeitImageProcessor,
    tokenizer: Any,
    paths: Sequence[str],
    *,
    batch_size: int = 8,
    workers: int = 2,
    tell: Callable[[int], None] = lambda done: None,
) -> Measured[Predicted]:
    """What `network` says of the masked patches of some images, as in `evaluate_masked_modeling`."""
    objective = MaskedModeling(Examples("unlabelled", (), (), ()), processor, RECIPE, config, tokenizer)

    def read(path: str) -> Any:
        content = place(path).read_bytes()
        return objective.read_judged(Example(path, None, True, hashlib.sha256(content).hexdigest()), content)

    reader: Reader[str] = Reader(paths, read, workers)
    found: list[Predicted] = []
    for group in _groups(reader.each(AHEAD * batch_size), batch_size):
        batch = objective.batch([sample for _, sample in group])
        assert batch.mask is not None
        logits = network(batch.pixels, **batch.inputs).logits  # (n, V), of the masked patches, image by image
        found += _judged([path for path, _ in group], logits, batch.targets[batch.mask], batch.mask)
        tell(len(found))
    return reader.measured(found)


def masked_modeling_of(
    measured: Measured[Predicted],
    config: BeitConfig,
    *,
    worst: int = 24,
    draw: bool = True,
    seed: int = 0,
    **facts: Any,
) -> Evaluation:
    """The evaluation that what was predicted of all images makes, those in several places put together."""
    found = measured.records
    chosen = sorted(found, key=lambda one: -one.loss / one.masked)[:worst]
    return Evaluation(
        task="masked_image_modeling",
        images=len(found),
        figures=_figures(found, seed),
        classes=(),
        unit="patches",
        worst=tuple(_shown(one, config.grid, draw) for one in chosen),
        left_out=tuple(measured.left_out),
        **facts,
    )


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _judged(paths: Sequence[str], logits: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> list[Predicted]:
    """(n, V), (n,), (B, P) -> B."""
    losses, right = token_losses(logits, tokens)
    counts = mask.sum(1)
    ends = np.cumsum(counts)[:-1]
    parts = zip(paths, np.split(losses, ends), np.split(right, ends), mask)
    return [Predicted(path, float(loss.sum()), int(hits.sum()), len(loss), own) for path, loss, hits, own in parts]


def _figures(found: list[Predicted], seed: int) -> tuple[Figure, ...]:
    masked = np.array([one.masked for one in found], np.float64)
    figures = []
    for name, parts, kind in (
        ("loss", [one.loss for one in found], NUMBER),
        ("token_accuracy", [one.right for one in found], "share"),
    ):
        value = float(np.sum(parts) / masked.sum()) if found else float("nan")
        figures.append(Figure(name, value, *ratio_interval(np.array(parts, np.float64), masked, seed=seed), kind))
    return tuple(figures)


def _shown(one: Predicted, grid: tuple[int, int], draw: bool) -> Worst:
    loss = one.loss / one.masked
    text = f"loss {loss:.3f}, {one.right} of {one.masked} tokens right"
    photo = thumbnail_of(one.path) if draw else None
    if photo is None:
        return Worst(one.path, text, loss)
    covered = resize_labels(one.mask.reshape(grid), (photo.shape[0], photo.shape[1])).astype(bool)
    seen = np.where(covered[..., None], np.array(COVER, np.uint8), photo)
    return Worst(one.path, text, loss, (("image", photo), ("what the model sees", seen)))
