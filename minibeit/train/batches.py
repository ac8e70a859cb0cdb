"""Batches of pixel values, decoded by threads in the order in which they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image

from ..image_processor import BeitImageProcessor
from ..images.ahead import read_ahead
from ..images.loading import load_image
from .augment import augmented, erase
from .recipes import Recipe

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 2  # batches that are decoded before they are asked for


def training_pixels(
    path: str, recipe: Recipe, processor: BeitImageProcessor, shape: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:  # -> (C, h, w)
    """The normalised pixels of an image, changed at random."""
    changed = np.asarray(augmented(read_image(path, processor), shape, recipe, rng))
    return erase(normalised(changed, processor), recipe.erasing, rng)


def read_image(path: str, processor: BeitImageProcessor, content: bytes | None = None) -> Image.Image:
    """An image file, whose `content` may have been read, as the processor reads it, before it is resized."""
    mean = processor.image_mean
    pixels = load_image(
        path if content is None else content,
        path,
        channels=len(mean) if isinstance(mean, list) else 3,
        apply_exif_orientation=processor.apply_exif_orientation,
        value_range=processor.value_range,
    )
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def normalised(image: np.ndarray, processor: BeitImageProcessor) -> np.ndarray:  # (h, w, C) or (h, w) -> (C, h, w)
    """What the processor makes of an image that has its final size."""
    pixels = image.reshape(*image.shape[:2], -1)
    whole = processor(pixels, do_resize=False, do_center_crop=False, input_data_format="channels_last")
    return whole.pixel_values[0]


def judged_pixels(path: str, processor: BeitImageProcessor) -> np.ndarray:  # -> (C, h, w)
    """The pixels of an image as `minibeit classify` will make them."""
    return processor(path).pixel_values[0]


def order_of(count: int, seed: int, epoch: int) -> np.ndarray:  # -> (count,)
    """The order of the examples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def in_batches(
    items: Sequence[Item], size: int, read: Callable[[Item], Result], workers: int
) -> Iterator[tuple[Sequence[Item], list[Result]]]:
    """(items, what `read` makes of them) of `size` items each, the last perhaps of fewer, read ahead by threads."""
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    results = read_ahead((item for part in parts for item in part), read, workers, size * AHEAD)
    for part in parts:
        yield part, [next(results) for _ in part]
