"""Pixels come first: those of a trace, compared with what the image processor makes of the image.

If they differ, the model is still judged on the pixels it was given, and the difference is reported separately.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..images.types import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD
from . import budget
from .difference import difference
from .judging import Row
from .known_mistakes import Guess

NAME = "input.pixel_values"
EXPLAINED = 0.01  # of the error may be left by a mistake that is named
MEANS = {
    "0.5 (the Inception convention)": (HALF, HALF),
    "those of ImageNet": (IMAGENET_MEAN, IMAGENET_STD),
    "those of CLIP": (CLIP_MEAN, CLIP_STD),
}
FILTERS = {0: "nearest", 1: "Lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "Hamming"}


def judge(found: np.ndarray, processor: Any, image: Any) -> Row:
    """The row of a trace's pixels (B, C, H, W) beside those that `processor` makes of `image`.

    Raises ImageError for an image that cannot be read.
    """
    expected = processor(image)["pixel_values"]
    row = Row(NAME, "ok", found.shape, found.dtype.name, ("image processor",))
    if found.shape != expected.shape:
        row.status, row.note = "shape", f"expected shape {expected.shape}, found {found.shape}"
        if found.ndim == 4 and found.transpose(0, 3, 1, 2).shape == expected.shape:
            row.note += ": channels last, where they come first"
        return row
    row.own = row.total = difference(found, expected)
    row.inherited = 0.0
    allowed = budget.pixel_limit(expected)
    yard = allowed / budget.PIXEL_STEPS / max(row.own.rms_truth, 1e-300)
    row.own_yard = row.total_yard = budget.Yardstick((yard, yard))
    row.own_limit = row.total_limit = budget.PIXEL_STEPS * yard
    row.own_ratio = row.total_ratio = row.own.rms_rel / yard
    if not (row.own.finite and row.own.max_abs <= allowed):
        row.status = "own"
        row.note = _explain(found, expected, processor, image)
    return row


def _explain(found: np.ndarray, expected: np.ndarray, processor: Any, image: Any) -> str:
    """The known mistake that meets the pixels, or how far off they are."""
    error = _size(found - expected.astype(np.float64))
    nearest, left = "", np.inf
    for text, value in _guesses(expected.astype(np.float64), processor, image):
        gap = _size(found - value) if value.shape == found.shape else np.inf
        if gap < left:
            nearest, left = text, gap
        if left <= EXPLAINED * error:
            return nearest
    levels = float(np.abs(found - expected).max() * np.min(_spread(processor)[1]) * 255)
    said = f"up to {levels:.3g} grey levels of 255 off"
    if left < 0.5 * error:
        said += f"; nearest known mistake: {nearest}, which leaves {left / error:.0%} of the error"
    return said


def _guesses(expected: np.ndarray, processor: Any, image: Any) -> Iterator[Guess]:
    mean, std = _spread(processor)
    whole = expected * std + mean  # 0 to 1
    for what, values in _turned(whole):
        if what:
            yield what, (values - mean) / std
        more = f", and {what}" if what else ""
        yield "the pixels are not normalised: they lie between 0 and 1" + more, values
        yield "the pixels are neither scaled nor normalised: they lie between 0 and 255" + more, 255 * values
        yield "the pixels are normalised without being divided by 255" + more, (255 * values - mean) / std
        yield "the pixels are divided by 256 instead of 255" + more, (values * 255 / 256 - mean) / std
        yield "the standard deviation is not divided by" + more, values - mean
        yield "the mean is not subtracted" + more, values / std
        for name, (other_mean, other_std) in MEANS.items():
            if len(other_mean) == expected.shape[1]:
                m, s = np.reshape(other_mean, (-1, 1, 1)), np.reshape(other_std, (-1, 1, 1))
                yield f"mean and standard deviation are {name}" + more, (values - m) / s
        yield "mean and standard deviation are in the order BGR" + more, (values - mean[::-1]) / std[::-1]
    yield from _processed(processor, image)


def _turned(x: np.ndarray) -> Iterator[Guess]:
    yield "", x
    yield "the colour channels are reversed (BGR for RGB)", x[:, ::-1]
    yield "the image is mirrored", x[..., ::-1]
    yield "the image is upside down", x[:, :, ::-1]
    if x.shape[2] == x.shape[3]:
        yield "height and width are swapped", x.swapaxes(2, 3)


def _processed(processor: Any, image: Any) -> Iterator[Guess]:
    """The image once more with another setting of the processor."""
    for number, name in FILTERS.items():
        if number != int(processor.resample):
            yield (
                f"resized with another filter: {name} instead of {FILTERS[int(processor.resample)]}",
                np.asarray(processor(image, resample=number)["pixel_values"], np.float64),
            )
    if processor.do_center_crop:
        crop = processor.crop_size
        yield (
            "resized to the size of the crop instead of being cropped",
            np.asarray(processor(image, do_center_crop=False, size=crop)["pixel_values"], np.float64),
        )


def _spread(processor: Any) -> tuple[np.ndarray, np.ndarray]:
    if not processor.do_normalize:
        return np.zeros((1, 1, 1)), np.ones((1, 1, 1))
    return np.reshape(processor.image_mean, (-1, 1, 1)), np.reshape(processor.image_std, (-1, 1, 1))


def _size(x: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        size = float(np.sqrt(np.mean(np.square(x))))
    return size if np.isfinite(size) else np.inf
