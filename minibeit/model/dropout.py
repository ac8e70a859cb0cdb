"""Dropout and stochastic depth, in training.  Without noise nothing is dropped."""

from __future__ import annotations

from typing import Any

from ..noise import Noise
from ..ops import Ops

Array = Any
PROBS, ATTENTION, ATTENTION_PATH, MLP, MLP_PATH = range(5)  # the places in a block that draw random numbers


def dropout_factors(ops: Ops, noise: Any, shape: tuple[int, ...], rate: float, dtype: Any) -> Array:
    """Random factors with expectation 1: 0 with probability `rate`, else 1 / (1 - rate); all 0 at rate 1."""
    keep = 1 - rate
    return ops.asarray((noise.random(shape) < keep) * (1 / keep if keep else 0.0), dtype)


def dropout(ops: Ops, noise: Noise | None, x: Array, rate: float) -> Array:  # (...) -> (...)
    """x with elements dropped at random; x itself without noise.  Source: Srivastava et al. 2014."""
    if noise is None or rate == 0:
        return x
    return ops.dropout(x, dropout_factors(ops, noise, x.shape, rate, x.dtype))


def channel_dropout(ops: Ops, noise: Noise | None, x: Array, rate: float) -> Array:  # (B, C, h, w) -> (B, C, h, w)
    """x with whole channels of an image dropped at random; x itself without noise.  Source: Tompson et al. 2015."""
    if noise is None or rate == 0:
        return x
    return ops.dropout(x, dropout_factors(ops, noise, (*x.shape[:2], 1, 1), rate, x.dtype))


def branch_factors(
    ops: Ops, noise: Noise | None, x: Array, dropout_rate: float, drop_path_rate: float, places: tuple[int, int]
) -> Array | None:  # (B, N, D) -> broadcasts to (B, N, D)
    """The factors of a branch before it is added to x: dropout per element, stochastic depth per image.

    None if nothing is dropped.  Source: Srivastava et al. 2014; Huang et al. 2016.
    """
    if noise is None:
        return None
    B, N, D = x.shape
    factors = []
    if dropout_rate > 0:
        factors.append(dropout_factors(ops, noise.at(place=places[0]), (B, N, D), dropout_rate, x.dtype))
    if drop_path_rate > 0:
        factors.append(dropout_factors(ops, noise.at(place=places[1]), (B, 1, 1), drop_path_rate, x.dtype))
    if len(factors) == 2:
        return ops.dropout(*factors)
    return factors[0] if factors else None
