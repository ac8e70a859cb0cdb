"""The model's own small arithmetic as ops, so that the seam holds all of it: forward, deferred and backward alike.

Letters: B batch, N tokens, P patches, D width, (gh, gw) patch grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def add(x: np.ndarray, y: np.ndarray) -> np.ndarray:  # (...), (...) -> (...)
    """x + y, broadcast."""
    return x + y


def dropout(x: np.ndarray, keep: np.ndarray) -> np.ndarray:  # (...), (...) -> (...)
    """x * keep: `keep` has the factors 0 or 1 / (1 - rate), and may be broadcast."""
    return x * keep


def mask_tokens(x: np.ndarray, mask: np.ndarray, mask_token: np.ndarray) -> np.ndarray:  # (B, P, D) -> (B, P, D)
    """x (1 - w) + mask_token w, w being `mask` (B, P) as 0 and 1; mask_token (1, 1, D)."""
    w = mask[:, :, None].astype(x.dtype)
    return x * (1 - w) + mask_token * w


def mean_patches(x: np.ndarray) -> np.ndarray:  # (B, N, D) -> (B, D)
    """Mean over the patch tokens, the CLS token left out; in float64, since a float32 sum would lose two bits."""
    return x[:, 1:].mean(1, dtype=np.float64).astype(x.dtype, copy=False)


def tokens_to_map(x: np.ndarray, grid: tuple[int, int]) -> np.ndarray:  # (B, N, D) -> (B, D, gh, gw)
    """The patch tokens as a map; the CLS token is left out."""
    B, _, D = x.shape
    return x[:, 1:].transpose(0, 2, 1).reshape(B, D, *grid)


def first_token(x: np.ndarray) -> np.ndarray:  # (B, N, D) -> (B, D)
    """The CLS token."""
    return x[:, 0]


def recompute(function: Callable[..., Any], ops: Any, args: tuple[Any, ...]) -> Any:
    """function(ops, *args).  A tape may keep the arguments alone, and run it again when gradients are asked for."""
    return function(ops, *args)
