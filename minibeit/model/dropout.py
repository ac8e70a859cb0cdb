"""Noise of the training mode: dropout and stochastic depth.  Without a generator nothing is dropped."""

from __future__ import annotations

from typing import Any

Array = Any


def dropout_factors(ops: Any, rng: Any, shape: tuple[int, ...], rate: float, dtype: Any) -> Array:
    """Factors 0 (with probability `rate`) or 1 / (1 - rate), so that the expectation is 1; all 0 at rate 1."""
    keep = 1 - rate
    drawn = rng.random(shape) < keep
    return ops.asarray(drawn, dtype) * (1 / keep if keep else 0.0)


def dropout(ops: Any, rng: Any | None, x: Array, rate: float) -> Array:  # (...) -> (...)
    """x with single elements dropped; x itself without a generator.  Source: Srivastava et al. 2014."""
    if rng is None or rate == 0:
        return x
    return x * dropout_factors(ops, rng, x.shape, rate, x.dtype)


def drop_path(ops: Any, rng: Any | None, x: Array, rate: float) -> Array:  # (B, ...) -> (B, ...)
    """x with whole samples dropped (stochastic depth); x itself without a generator.  Source: Huang et al. 2016."""
    if rng is None or rate == 0:
        return x
    return x * dropout_factors(ops, rng, (x.shape[0],) + (1,) * (x.ndim - 1), rate, x.dtype)
