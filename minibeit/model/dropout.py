"""Noise of the training mode: dropout and stochastic depth.  Without noise nothing is dropped."""

from __future__ import annotations

from typing import Any

Array = Any
PROBS, ATTENTION, ATTENTION_PATH, MLP, MLP_PATH = range(5)  # where a block draws: each place has numbers of its own


def dropout_factors(ops: Any, noise: Any, shape: tuple[int, ...], rate: float, dtype: Any) -> Array:
    """Factors 0 (with probability `rate`) or 1 / (1 - rate), so that the expectation is 1; all 0 at rate 1."""
    keep = 1 - rate
    drawn = noise.random(shape) < keep
    return ops.asarray(drawn, dtype) * (1 / keep if keep else 0.0)


def dropout(ops: Any, noise: Any | None, x: Array, rate: float) -> Array:  # (...) -> (...)
    """x with single elements dropped; x itself without noise.  Source: Srivastava et al. 2014."""
    if noise is None or rate == 0:
        return x
    return ops.dropout(x, dropout_factors(ops, noise, x.shape, rate, x.dtype))


def branch_factors(
    ops: Any, noise: Any | None, x: Array, dropout_rate: float, path_rate: float, places: tuple[int, int]
) -> Array | None:  # (B, N, D) -> a shape that broadcasts to (B, N, D)
    """What a branch is multiplied by before it is added to x, or None for 1.

    Dropout drops single elements, stochastic depth (drop path) all of a sample.  Source: Huang et al. 2016.
    """
    if noise is None:
        return None
    elements = samples = None
    if dropout_rate > 0:
        elements = dropout_factors(ops, noise.at(place=places[0]), x.shape, dropout_rate, x.dtype)
    if path_rate > 0:
        samples = dropout_factors(ops, noise.at(place=places[1]), (x.shape[0], 1, 1), path_rate, x.dtype)
    if elements is None or samples is None:
        return samples if elements is None else elements
    return elements * samples
