"""Arrays as text within a page: of fewer bits where they are only looked at, deflated, in base64."""

from __future__ import annotations

import base64
import zlib

import numpy as np

LEVELS = 255
TEXT_PER_BYTE = 4 / 3  # base64
FAST = 1  # zlib's level: what a page holds is nearly incompressible, so a higher one costs seconds and gains little


def rounded(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:  # (..., n) -> (..., n) integers, (...) float32
    """`x` as integers of 8 or 16 bits and a scale for each row: integers * scale is within scale / 2 of `x`."""
    most = (1 << (bits - 1)) - 1
    scale = (np.abs(x).max(-1) / most).astype(np.float32)
    steps = np.where(scale > 0, scale, 1)[..., None]
    return np.clip(np.rint(x / steps), -most, most).astype(f"int{bits}"), scale


def square_roots(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # (..., n) -> (..., n) uint8, (...) float32
    """Values of at least 0 as bytes and a scale for each row: scale * (byte / 255)^2 is nearly `x`.

    Square roots keep what is small beside the largest value of its row.
    """
    scale = x.max(-1).astype(np.float32)
    share = x / np.where(scale > 0, scale, 1)[..., None]
    return np.clip(np.rint(LEVELS * np.sqrt(share)), 0, LEVELS).astype(np.uint8), scale


def text_of(array: np.ndarray) -> str:
    """The bytes of an array, little-endian and row by row, deflated (zlib's format), as base64."""
    plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return base64.b64encode(zlib.compress(plain.tobytes(), FAST)).decode()


def spaced(count: int, most: int) -> list[int]:
    """All of 0 ... count - 1, or at most `most` (at least one) of them, evenly spaced, the last among them."""
    kept = min(count, max(most, 1))
    return [count - 1 - (count * i) // kept for i in reversed(range(kept))]
