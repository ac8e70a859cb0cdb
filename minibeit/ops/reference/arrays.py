"""Ops that make, move, join and check arrays, and those that control how other ops run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from ...foreign import as_real
from ...params import table_rows


def prepare(params: Any) -> Any:
    """The parameters in this backend's layout; here unchanged.  Fast backends pack, join and fold them, once."""
    return params


def dump(params: Any) -> tuple[str, dict[str, np.ndarray]]:
    """(layout, {name: array}) of prepared parameters, for a file.  Raises ValueError if the backend packs nothing."""
    raise ValueError("this backend prepares nothing that could be stored; use the backend 'numba'")


def restore(shapes: Any, layout: str, arrays: Mapping[str, np.ndarray]) -> Any:
    """The prepared parameters of a model with these `shapes`, from what `dump` returned.  Raises ValueError."""
    raise ValueError(f"was prepared as '{layout}', which this backend cannot read; load the original checkpoint")


def num_threads(count: int | None) -> AbstractContextManager[Any]:
    """Context of a call; `count` is ignored here, since NumPy's BLAS has its own settings.

    Within it underflow is no error, whatever the caller's `np.errstate`: softmax rounds small probabilities to zero.
    """
    return np.errstate(under="ignore")


def queued(wanted: bool = True) -> AbstractContextManager[Any]:
    """Context in which, if `wanted`, a backend may queue its kernels until it ends; here ops run at once.

    Within it, only ops may read the elements of an array that an op returned.
    """
    return nullcontext()


def recompute(function: Callable[..., Any], ops: Any, args: tuple[Any, ...]) -> Any:
    """function(ops, *args).  A tape may save only the arguments and run it again for the gradients."""
    return function(ops, *args)


def stage(x: Any, dtype: str) -> np.ndarray:
    """A caller's array converted to that dtype, not yet uploaded, so that it can be checked before `asarray`."""
    return as_real(x, dtype)


def asarray(x: Any, dtype: str) -> np.ndarray:
    """`x` as an array of this backend with that dtype; not copied if it is one already."""
    return np.asarray(x, dtype=dtype)


def to_host(x: np.ndarray) -> np.ndarray:
    """`x` as a NumPy array in main memory."""
    return x


def concatenate(arrays: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """The arrays joined along `axis`; a first axis of size 1 is broadcast, unless it is `axis` itself."""
    if axis != 0:
        batch = max(array.shape[0] for array in arrays)
        arrays = [np.broadcast_to(array, (batch, *array.shape[1:])) for array in arrays]
    return np.concatenate(arrays, axis)


def all_finite(x: np.ndarray, most: float | None = None) -> bool:
    """Whether every element is finite and, if `most` is given, within -most ... most."""
    if most is None or not x.size:
        return bool(np.isfinite(x).all())
    return bool(-most <= x.min() and x.max() <= most)  # either is NaN if any element is


def tokens_to_map(x: np.ndarray, grid: tuple[int, int]) -> np.ndarray:  # (B, N, D) -> (B, D, gh, gw)
    """Patch tokens as a feature map; the CLS token is left out."""
    B, _, D = x.shape
    return x[:, 1:].transpose(0, 2, 1).reshape(B, D, *grid)


def argmax_channels(x: np.ndarray) -> np.ndarray:  # (B, C, h, w) -> (B, h, w) int64
    """The channel of the largest element of every pixel, the first of equal ones."""
    return x.argmax(1).astype(np.int64, copy=False)


def masked_patches(x: np.ndarray, mask: np.ndarray) -> np.ndarray:  # (B, P, D), (B, P) -> (n, D)
    """The rows of the patches that the boolean mask marks, image by image."""
    return x[mask]


def relative_position_index(grid: tuple[int, int]) -> np.ndarray:  # -> (N, N) int32
    """The row of the bias table for every pair of tokens (query, key).

    For patches at (ha, wa) and (hb, wb): (ha - hb + gh - 1) (2 gw - 1) + (wa - wb + gw - 1).  The last three rows are
    for [CLS] to a patch (R - 3), a patch to [CLS] (R - 2) and [CLS] to itself (R - 1).
    Source: BEiT appendix A; Attention in microsoft/unilm beit/modeling_finetune.py.
    """
    gh, gw = grid
    P, R = gh * gw, table_rows(grid)
    row, column = np.divmod(np.arange(P, dtype=np.int32), np.int32(gw))  # (P,) each
    row_difference = row[:, None] - row[None, :] + gh - 1  # (P, P), 0 ... 2 gh - 2
    column_difference = column[:, None] - column[None, :] + gw - 1
    index = np.empty((P + 1, P + 1), np.int32)
    index[1:, 1:] = row_difference * (2 * gw - 1) + column_difference
    index[0, :] = R - 3
    index[:, 0] = R - 2
    index[0, 0] = R - 1
    return index
