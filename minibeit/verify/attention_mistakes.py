"""Common mistakes in attention: projections, heads, scores, softmax, masks and the position bias."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..ops import reference
from ..params import Attention
from .known_mistakes import ROUNDED, Guess, faults
from .low_precision import half, int8


def project(which: str) -> Callable[..., Iterator[Guess]]:
    """Guesses for one of "query", "key", "value"."""

    def guesses(x: Any, p: Attention, num_heads: int) -> Iterator[Guess]:
        B, N, D = x.shape

        def heads(layer: Any, x: Any = x) -> np.ndarray:
            return reference.linear(x, layer).reshape(B, N, num_heads, -1).transpose(0, 2, 1, 3)

        own = getattr(p, which)
        for text, inputs, faulty in faults(x, own):
            yield text, heads(faulty, inputs)
        for other in ("query", "key", "value"):
            layer = getattr(p, other)
            if other != which:
                yield f"the {other} projection is used for the {which}", heads(layer)
            if own.bias is None and layer.bias is not None:
                yield f"a bias is added, that of the {other}; keys have none", heads(replace(own, bias=layer.bias))
        mixed = reference.linear(x, own).reshape(B, N, -1, num_heads).transpose(0, 3, 1, 2)
        yield "heads are taken from the wrong axis: (d, H) instead of (H, d)", mixed
        plain = reference.linear(x, own).reshape(B, num_heads, N, -1)
        yield "the reshape to heads lacks its transpose", plain
        yield "the scale 1 / sqrt(d) is already applied", heads(own) * (num_heads / D) ** 0.5

    return guesses


def attention(probs: bool) -> Callable[..., Iterator[Guess]]:
    """Guesses for the probabilities or for the context."""

    def guesses(q: Any, k: Any, v: Any, bias: Any, return_probs: bool = False, keep: Any = None) -> Iterator[Guess]:
        B, H, N, d = q.shape

        good_table: Any = None
        good_index: Any = None
        if bias is not None:
            good_table, good_index = bias.table, reference.relative_position_index(bias.grid)

        def attend(factor: float = 1.0, table: Any = good_table, index: Any = good_index) -> Any:
            return reference.attend(q * factor, k, v, table, index, return_probs=True)[1 if probs else 0]

        root = float(d) ** 0.5
        yield "the scores are not divided by sqrt(d)", attend(root)
        yield "the scores are divided by sqrt(d) twice", attend(1 / root)
        yield "the scores are divided by sqrt(D), the width, not by that of a head", attend(H**-0.5)
        if bias is not None:
            table, index, R = bias.table, good_index, bias.table.shape[0]
            yield "the position bias is missing", attend(table=None)
            yield "the position bias is transposed: query and key offsets swapped", attend(index=index.T)
            for one, two in itertools.combinations((R - 3, R - 2, R - 1), 2):
                swapped = index.copy()
                swapped[index == one], swapped[index == two] = two, one
                yield (
                    f"rows {one} and {two} of the bias table (pairs with the CLS token) are swapped",
                    attend(index=swapped),
                )
            yield "the rows for the CLS token are taken from the table's start", attend(index=_cls_first(index, R))
            for text, other in _turned(index, bias.grid):
                yield text, attend(index=other)
            yield (
                "the position bias is added before the scores are divided by sqrt(d)",
                attend(table=table / root),
            )
            for dtype in ROUNDED:
                yield (
                    f"the position bias is rounded to {dtype}",
                    attend(table=half(table, dtype)),
                )
        if not probs:
            good_context, good_probs = reference.attention(q, k, v, bias, return_probs=True)
            split = good_context.reshape(B, N, H, d)
            yield "heads are joined in the order (d, H) instead of (H, d)", split.swapaxes(2, 3).reshape(B, N, -1)
            yield (
                "the transpose before the heads are joined is missing",
                np.ascontiguousarray(split.transpose(0, 2, 1, 3)).reshape(B, N, -1),
            )
            yield "the heads are in reverse order", split[:, :, ::-1].reshape(B, N, -1)
            for dtype in ROUNDED:
                joined = (half(good_probs, dtype) @ v).transpose(0, 2, 1, 3).reshape(B, N, -1)
                yield f"the probabilities are rounded to {dtype}", joined
        for dtype in ROUNDED:
            context, p = reference.attention(half(q, dtype), half(k, dtype), half(v, dtype), bias, return_probs=True)
            yield f"queries, keys and values are rounded to {dtype}", p if probs else context
        context, p = reference.attention(int8(q), int8(k), int8(v), bias, return_probs=True)
        yield "queries, keys and values are rounded to 8 bits", p if probs else context
        for text, p in _other_softmax(q, k, good_table, good_index):
            yield text, p if probs else (p @ v).transpose(0, 2, 1, 3).reshape(B, N, -1)

    return guesses


def another_scale(found: np.ndarray, q: Any, k: Any, v: Any, bias: Any, *_: Any, **__: Any) -> Iterator[Guess]:
    """Probabilities of scores and a position bias that have the factors which fit `found` (B, H, N, N) best.

    log p is a sum of both, but for a constant in each row.  Nothing for factors of which `attention` has the cause.
    """
    if found.shape != (*q.shape[:3], k.shape[2]) or not (found > 0).all():
        return
    parts = [q @ k.swapaxes(2, 3) / q.shape[3] ** 0.5]
    if bias is not None and bias.table.any():
        parts.append(np.broadcast_to(bias.table.T[:, reference.relative_position_index(bias.grid)], found.shape))
    centred = [x - x.mean(-1, keepdims=True) for x in (*parts, np.log(found))]
    columns = np.stack([x.reshape(-1) for x in centred], 1)
    factors = np.linalg.lstsq(columns[:, :-1], columns[:, -1], rcond=None)[0]
    said = [
        f"{what} multiplied by {f:.4g}"
        for what, f in zip(("the scores are", "the position bias is"), factors)
        if _off(f)
    ]
    root = q.shape[3] ** 0.5
    named = (
        not _off(factors[0] / root) or not _off(factors[0] * root) or (len(factors) > 1 and not _off(1 + factors[1]))
    )
    if said and not named:
        yield " and ".join(said), reference.softmax(sum(f * x for f, x in zip(factors, parts)))


def _off(factor: float) -> bool:
    return abs(factor - 1) > 1e-3


def _other_softmax(q: Any, k: Any, table: Any, index: Any) -> Iterator[Guess]:
    """Probabilities (B, H, N, N) of a softmax over another axis or of fewer keys."""
    N = q.shape[2]
    scores = q @ k.swapaxes(2, 3) / q.shape[3] ** 0.5
    if table is not None:
        scores += table.T[:, index]

    def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
        e = np.exp(x - x.max(axis, keepdims=True))
        return e / e.sum(axis, keepdims=True)

    yield "the softmax runs over the queries instead of the keys", softmax(scores, -2)
    yield "the softmax runs over the heads instead of the keys", softmax(scores, 1)
    if N < 2:
        return
    later = np.triu(np.ones((N, N), bool), 1)
    yield "a causal mask hides later tokens", softmax(np.where(later, -np.inf, scores))
    for key, what in ((0, "the CLS token"), (N - 1, "the last patch")):
        hidden = np.arange(N) == key
        yield f"{what} is masked as a key", softmax(np.where(hidden, -np.inf, scores))


def _turned(index: np.ndarray, grid: tuple[int, int]) -> Iterator[tuple[str, np.ndarray]]:
    """The index of patches with offsets of another sign, or of height and width swapped; rows with CLS as they are."""
    gh, gw = grid
    row, column = np.divmod(np.arange(gh * gw), gw)
    down, right = row[:, None] - row, column[:, None] - column

    def moved(rows: np.ndarray) -> np.ndarray:
        other = index.copy()
        other[1:, 1:] = rows
        return other

    def usual(down: np.ndarray, right: np.ndarray) -> np.ndarray:
        return moved((down + gh - 1) * (2 * gw - 1) + right + gw - 1)

    if gh > 1:
        yield "the vertical offsets of the position bias have the wrong sign", usual(-down, right)
    if gw > 1:
        yield "the horizontal offsets of the position bias have the wrong sign", usual(down, -right)
    if gh > 1 and gw > 1:
        yield "all offsets of the position bias have the wrong sign, but not the CLS token's", usual(-down, -right)
    if gh != gw:
        swapped = moved((right + gw - 1) * (2 * gh - 1) + down + gh - 1)
        yield "the bias table is read with height and width swapped", swapped
    else:
        yield "vertical and horizontal offsets of the position bias are swapped", usual(right, down)


def _cls_first(index: np.ndarray, R: int) -> np.ndarray:
    moved = (index + 3) % R
    return moved.astype(index.dtype)
