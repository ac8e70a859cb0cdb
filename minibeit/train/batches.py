"""Batches of pixel values, decoded by threads in the order in which they are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from ..image_processor import BeitImageProcessor
from ..images.loading import load_image, read_picture
from ..images.transforms import to_pixel_values
from .augment import augmented, erase
from .examples import Example
from .recipes import Recipe

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 2  # batches that are decoded before they are asked for


def training_pixels(
    example: Example, recipe: Recipe, processor: BeitImageProcessor, shape: tuple[int, int], key: Sequence[int]
) -> np.ndarray:  # -> (C, h, w)
    """The normalised pixels of a picture, changed at random by a generator that `key` alone seeds."""
    rng = np.random.default_rng(list(key))
    channels = len(processor.image_mean) if isinstance(processor.image_mean, list) else 3
    pixels = load_image(read_picture(example.path, processor.apply_exif_orientation), example.path, channels)
    flat = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    changed = np.asarray(augmented(Image.fromarray(flat), shape, recipe, rng)).reshape(*shape, channels)
    mean, std = ([v] * channels if isinstance(v, float) else v for v in (processor.image_mean, processor.image_std))
    values = to_pixel_values(
        changed,
        processor.rescale_factor if processor.do_rescale else None,
        mean if processor.do_normalize else None,
        std if processor.do_normalize else None,
    )
    return erase(values, recipe.erasing, rng)


def judged_pixels(example: Example, processor: BeitImageProcessor) -> np.ndarray:  # -> (C, h, w)
    """The pixels of a picture as `minibeit classify` will make them."""
    return processor(example.path).pixel_values[0]


def order_of(count: int, seed: int, epoch: int) -> np.ndarray:  # -> (count,)
    """The order of the examples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def in_batches(
    items: Sequence[Item], size: int, read: Callable[[Item], np.ndarray], workers: int
) -> Iterator[tuple[Sequence[Item], np.ndarray]]:
    """(items, pixels (B, C, h, w)) of `size` items each, the last perhaps of fewer, read ahead by threads."""
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    flat = (item for part in parts for item in part)
    read_ahead = ahead(flat, read, workers, size * AHEAD)
    for part in parts:
        yield part, np.stack([next(read_ahead) for _ in part])


def ahead(items: Iterable[Any], function: Callable[[Any], Any], workers: int, most: int) -> Iterator[Any]:
    """function(item) for every item in its order, by threads, at most `most` results before they are asked for."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
