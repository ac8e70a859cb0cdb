"""What the tests of the image processor share."""

from __future__ import annotations

import numpy as np
from PIL import Image

from minibeit.image_processor import BeitImageProcessor

SCALED_FLOATS = "ignore:.*the floats are within 0..1"


def plain(**settings):
    """A processor that only turns pixels into float32, so that tests see what arrived."""
    return BeitImageProcessor(**{"do_resize": False, "do_rescale": False, "do_normalize": False, **settings})


def picture(rng, height=6, width=5, mode="RGB"):
    channels = {"RGB": 3, "L": 1, "LA": 2, "RGBA": 4, "CMYK": 4}[mode]
    pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())
