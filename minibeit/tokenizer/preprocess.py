"""Images to the pixels that a tokenizer takes, and its output to images."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from ..image_processor import BeitImageProcessor

EPS = 0.1  # of the logit-Laplace distribution: 0 and 1 themselves, whose logit is infinite, are mapped away from


def map_pixels(x: np.ndarray) -> np.ndarray:
    """(1 - 2 eps) x + eps, from 0..1 to 0.1..0.9.  Source: Ramesh et al. 2021, appendix A.3."""
    return (x.dtype.type(1 - 2 * EPS) * x) + x.dtype.type(EPS)


def unmap_pixels(x: np.ndarray) -> np.ndarray:
    """(x - eps) / (1 - 2 eps), limited to 0..1."""
    return np.clip((x - x.dtype.type(EPS)) / x.dtype.type(1 - 2 * EPS), 0, 1)


def likeliest_pixels(statistics: np.ndarray) -> np.ndarray:  # (B, 2 C, height, width) -> (B, C, height, width)
    """The image at the decoder's means, in 0..1: unmapped sigmoids; the log-scales are for training alone."""
    means = statistics[:, : statistics.shape[1] // 2]
    with np.errstate(over="ignore"):  # of exp, for pixels that are plainly 0
        return unmap_pixels(1 / (1 + np.exp(-means)))


def pixel_processor(size: int, channels: int) -> BeitImageProcessor:
    """The image processor whose pixels are those of `pixels_of`, but for rounding: 0.8 x + 0.1 = (x + 0.125) / 1.25."""
    return BeitImageProcessor(
        size={"height": size, "width": size},
        resample=Image.Resampling.LANCZOS,
        do_center_crop=False,
        image_mean=[-EPS / (1 - 2 * EPS)] * channels,
        image_std=[1 / (1 - 2 * EPS)] * channels,
    )


def pixels_of(
    images: Any, size: int | tuple[int, int], channels: int, center_crop: bool = False
) -> np.ndarray:  # -> (B, C, height, width) float32
    """Mapped pixels of images, resized by Lanczos' filter to `size` (a side or height and width, in pixels).

    `images` are what BeitImageProcessor takes: a path, a PIL image, an array (H, W, C), or a list of them.  Both axes
    are resized, as FlavaImageProcessor does for its codebook and BEiT's pre-training does with a crop; with
    `center_crop` the shorter side is, and the middle cut out, as in DALL-E's notebook, which rounds half pixels
    elsewhere.
    Raises ImageError for an image that cannot be read.
    """
    height, width = (size, size) if isinstance(size, int) else size
    processor = BeitImageProcessor(
        size={"shortest_edge": max(height, width)} if center_crop else {"height": height, "width": width},
        resample=Image.Resampling.LANCZOS,
        do_center_crop=center_crop,
        crop_size={"height": height, "width": width},
        image_mean=[0.0] * channels,
        image_std=[1.0] * channels,
    )
    return map_pixels(processor(images).pixel_values)
