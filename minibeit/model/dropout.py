"""Noise of the training mode: dropout and stochastic depth.  Without a generator nothing is dropped."""

from __future__ import annotations

from typing import Any

from ..ops import Ops

Array = Any


def dropout_factors(ops: Ops, rng: Any, shape: tuple[int, ...], rate: float, dtype: Any) -> Array:
    """Factors 0 (with probability `rate`) or 1 / (1 - rate), so that the expectation is 1; all 0 at rate 1."""
    keep = 1 - rate
    return ops.asarray((rng.random(shape) < keep) * (1 / keep if keep else 0.0), dtype)


def dropout(ops: Ops, rng: Any | None, x: Array, rate: float) -> Array:  # (...) -> (...)
    """x with single elements dropped; x itself without a generator.  Source: Srivastava et al. 2014."""
    if rng is None or rate == 0:
        return x
    return ops.dropout(x, dropout_factors(ops, rng, x.shape, rate, x.dtype))


def branch_factors(
    ops: Ops, rng: Any | None, x: Array, dropout_rate: float, drop_path_rate: float
) -> Array | None:  # (B, N, D) -> broadcasts to (B, N, D)
    """What multiplies a branch before it is added to x: dropout, and for whole images stochastic depth.

    None where nothing is dropped.  Source: Srivastava et al. 2014; Huang et al. 2016.
    """
    if rng is None:
        return None
    B, N, D = x.shape
    factors = []
    if dropout_rate > 0:
        factors.append(dropout_factors(ops, rng, (B, N, D), dropout_rate, x.dtype))
    if drop_path_rate > 0:
        factors.append(dropout_factors(ops, rng, (B, 1, 1), drop_path_rate, x.dtype))
    if len(factors) == 2:
        return ops.dropout(*factors)
    return factors[0] if factors else None
