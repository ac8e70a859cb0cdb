"""Label maps of whole images: sliding windows, several scales and mirror images, as BEiT's ADE20K numbers were made.

An image is shown to the model in one or more views.  The logits of a view are those of one forward pass, or the means
of overlapping windows; views are resized to the image, turned into probabilities and added up; the largest wins.
Source: microsoft/unilm beit/semantic_segmentation and mmseg's slide_inference (BEiT appendix B).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from .ops.reference.maps import bilinear_taps

Compute = Callable[[np.ndarray], np.ndarray]  # pixel values (B, C, h, w) -> logits (B, K, h', w')

ROOM = 64 << 20  # bytes of one band of rows of scores at the image's size, which would take gigabytes at once
ROOM_FOR_SUMS = 1 << 30  # bytes of the sums of probabilities at the image's size; beyond them, views are kept instead
BILINEAR = 2  # Pillow's number
SQUASH, WHOLE, SLIDE = "squash", "whole", "slide"


class View(NamedTuple):
    """What the model says of one view: logits (K, h, w), whether of the mirror image, and how often it counts."""

    logits: np.ndarray
    mirrored: bool = False
    times: int = 1


@dataclass(frozen=True)
class Inference:
    """How an image is shown to the model.

    mode "squash": as the image processor resizes it, whatever its proportions.  "whole": at its own proportions, the
    shorter side of `short_side` pixels, both sides rounded to multiples of `patch`, in one pass.  "slide": at its own
    proportions in square windows of `window` pixels, `stride` pixels apart, `batch_size` at a time; the shorter side is
    never less than a window.  `scales` multiply `short_side`, one view each; `flip` adds the mirror image of each.
    Raises ValueError for settings that do not go together.
    """

    mode: str = SQUASH
    window: int = 640
    stride: int = 426
    short_side: int = 640
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    batch_size: int = 1
    patch: int = 16

    def __post_init__(self) -> None:
        if self.mode not in (SQUASH, WHOLE, SLIDE):
            raise ValueError(f"mode: expected {SQUASH}, {WHOLE} or {SLIDE}, found {self.mode!r}")
        if self.mode == SQUASH and self.scales != (1.0,):
            raise ValueError("scales: images that the processor resizes have one; choose slide or whole")
        if not self.scales or not all(0 < scale < 100 for scale in self.scales):
            raise ValueError(f"scales: expected numbers above 0 and below 100, found {list(self.scales)}")
        if self.mode == SLIDE and self.window % self.patch:
            raise ValueError(f"window: expected a multiple of the patch size {self.patch}, found {self.window}")
        if self.mode == SLIDE and not 1 <= self.stride <= self.window:
            raise ValueError(f"stride: expected 1 to the window's {self.window} pixels, found {self.stride}")

    @property
    def views(self) -> int:
        """How many views are computed for an image; equal ones count, but are not computed again."""
        return len(set(self._short_sides())) * (2 if self.flip else 1)

    def sizes(self, shape: tuple[int, int]) -> Counter[tuple[int, int]]:
        """The sizes (height, width) of the views of an image (H, W), and how many scales lead to each."""
        return Counter(self._size(shape, short) for short in self._short_sides())

    def _short_sides(self) -> list[int]:
        least = self.window if self.mode == SLIDE else self.patch
        return [max(int(self.short_side * scale), least) for scale in self.scales]

    def _size(self, shape: tuple[int, int], short: int) -> tuple[int, int]:
        factor = short / min(shape)
        size = [int(length * factor + 0.5) for length in shape]
        if self.mode == WHOLE:
            size = [max(round(length / self.patch), 2) * self.patch for length in size]  # the head needs 2x2 patches
        return size[0], size[1]


def segment(
    compute: Compute, processor: Any, image: Any, shape: tuple[int, int], how: Inference
) -> np.ndarray:  # -> (H, W)
    """The class of every pixel of `image` (anything that `processor` takes), whose height and width are `shape`."""
    views = views_of(compute, processor, image, shape, how)
    return largest_logit(next(views).logits, shape) if how.views == 1 else largest_mean_probability(views, shape)


def views_of(compute: Compute, processor: Any, image: Any, shape: tuple[int, int], how: Inference) -> Iterator[View]:
    """The views of an image, computed one after the other."""
    if how.mode == SQUASH:
        yield from _views(compute, processor(image).pixel_values[0], 1, how)
        return
    for (height, width), times in how.sizes(shape).items():
        pixels = processor(
            image,
            do_resize=True,
            size={"height": height, "width": width},
            resample=BILINEAR,
            do_center_crop=False,
        ).pixel_values[0]
        yield from _views(compute, pixels, times, how)


def _views(compute: Compute, pixels: np.ndarray, times: int, how: Inference) -> Iterator[View]:
    for mirrored in (False, True) if how.flip else (False,):
        seen = np.ascontiguousarray(pixels[..., ::-1]) if mirrored else pixels
        if how.mode == SLIDE:
            logits = slide(compute, seen, (how.window, how.window), (how.stride, how.stride), how.batch_size)
        else:
            logits = compute(seen[None])[0]
        yield View(logits, mirrored, times)


# Windows --------------------------------------------------------------------------------------------------------------


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows along an axis begin: every `stride` pixels, the last one moved back so that it ends inside."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride + window, length) - window, 0) for i in range(count)]


def slide(
    compute: Compute,
    pixels: np.ndarray,
    window: tuple[int, int],
    stride: tuple[int, int],
    batch_size: int = 1,
) -> np.ndarray:  # (C, h, w) -> (K, h, w)
    """The mean, at every pixel, of the logits of all windows that contain it.

    The logits of each window are resized bilinearly to its size, then added up row by row of windows, and divided by
    the number of windows.  `batch_size` windows are computed at a time; results are those of one at a time, as far as
    the model's own rounding does not depend on the batch.
    """
    _, h, w = pixels.shape
    places = [
        (slice(y, y + window[0]), slice(x, x + window[1]))
        for y in window_starts(h, window[0], stride[0])
        for x in window_starts(w, window[1], stride[1])
    ]
    sums, counts = np.zeros(0), np.zeros((h, w), np.int64)
    for first in range(0, len(places), batch_size):
        chosen = places[first : first + batch_size]
        crops = np.stack([pixels[:, rows, columns] for rows, columns in chosen])
        logits = compute(crops)
        if first == 0:
            sums = np.zeros((logits.shape[1], h, w), logits.dtype)
        for (rows, columns), part in zip(chosen, logits):
            counts[rows, columns] += 1
            target = sums[:, rows, columns]
            K, *size = target.shape
            for band in _bands((size[0], size[1]), K, part.itemsize):
                target[:, band] += _resized_rows(part, (size[0], size[1]), band)
    sums /= counts.astype(sums.dtype)
    return sums


# Views to a label map -------------------------------------------------------------------------------------------------


def largest_logit(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:  # (K, h, w) -> (H, W) int64
    """The class with the largest logit at every pixel after a bilinear resize to `size`; the lower one of equals.

    It has the largest probability too.  Computed in bands of rows, without the classes that cannot win anywhere.
    """
    classes = contenders(logits)
    some = logits[classes]
    labels = np.empty(size, np.int64)
    for rows in _bands(size, len(classes), logits.itemsize):
        labels[rows] = classes[_resized_rows(some, size, rows).argmax(0)]
    return labels


def largest_mean_probability(views: Iterable[View], size: tuple[int, int]) -> np.ndarray:  # -> (H, W) int64
    """The class with the largest mean over views of its probability, the softmax of the resized logits.

    Computed in bands of rows: beside `ROOM` for a band, memory holds the sums of probabilities at the image's size or,
    where these would take more than `ROOM_FOR_SUMS`, the views, whose size does not grow with the image.
    """
    views = iter(views)
    first = next(views)
    K, dtype = len(first.logits), first.logits.dtype
    bands = list(_bands(size, K, dtype.itemsize))
    every = chain([first], views)
    del first  # held by `every` until it is used
    if K * size[0] * size[1] * dtype.itemsize > ROOM_FOR_SUMS:
        kept, labels = list(every), np.empty(size, np.int64)
        for rows in bands:
            labels[rows] = reduce(np.add, (_probabilities(view, size, rows) for view in kept)).argmax(0)
        return labels
    sums = np.zeros((K, *size), dtype)
    for view in every:
        for rows in bands:
            sums[:, rows] += _probabilities(view, size, rows)
    return sums.argmax(0)


def contenders(logits: np.ndarray) -> np.ndarray:  # (K, h, w) -> (n,)
    """The classes that can be the largest anywhere after a bilinear resize.

    A resized value lies between the minimum and the maximum of four neighbours; a class whose maximum is below the
    minimum of another class in every such square is ruled out.
    """
    K, h, w = logits.shape
    rounding = 1e-5 * np.abs(logits).max()
    possible = np.zeros(K, bool)
    columns = np.clip(np.arange(-1, w + 1), 0, w - 1)  # the edges repeated
    for band in _bands((h + 1, w + 1), K, logits.itemsize):
        rows = np.clip(np.arange(band.start - 1, band.stop), 0, h - 1)
        x = logits[:, rows[:, None], columns]
        corners = [x[:, :-1, :-1], x[:, :-1, 1:], x[:, 1:, :-1], x[:, 1:, 1:]]
        least, greatest = np.minimum.reduce(corners), np.maximum.reduce(corners)
        possible |= (greatest + rounding >= least.max(axis=0)).any(axis=(1, 2))
    return np.flatnonzero(possible)


def _bands(size: tuple[int, int], classes: int, itemsize: int) -> Iterator[slice]:
    step = max(1, ROOM // (classes * size[1] * itemsize))
    return (slice(top, min(top + step, size[0])) for top in range(0, size[0], step))


def _probabilities(view: View, size: tuple[int, int], rows: slice) -> np.ndarray:  # -> (K, rows, W)
    """The softmax of a view's resized logits, times the number of scales that it stands for."""
    x = _resized_rows(view.logits, size, rows)
    x -= x.max(0)
    np.exp(x, out=x)
    x /= x.sum(0)
    if view.times > 1:
        x *= x.dtype.type(view.times)
    return x[..., ::-1] if view.mirrored else x


def _resized_rows(x: np.ndarray, size: tuple[int, int], rows: slice) -> np.ndarray:  # (K, h, w) -> (K, rows, W)
    """Some rows of `resize_bilinear(x, size)`; a new array."""
    taps = [(index[rows], weight[rows]) for index, weight in bilinear_taps(x.shape[1], size[0])]
    return _weighted(_weighted(x, 1, taps), 2, bilinear_taps(x.shape[2], size[1]))


def _weighted(x: np.ndarray, axis: int, taps: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The elements at the first tap's indices along an axis times its weights, plus those of the second."""
    shape = (1, -1, 1) if axis == 1 else (1, 1, -1)
    total, part = (np.take(x, index, axis) * weight.astype(x.dtype).reshape(shape) for index, weight in taps)
    total += part
    return total
