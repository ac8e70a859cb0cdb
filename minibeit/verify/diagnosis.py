"""What an error usually means: known mistakes are tried on the op, then the pattern of the error is examined."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..ops import reference
from ..params import LayerNorm
from . import known_mistakes
from .float64_model import Call
from .known_mistakes import Guess

EXPLAINED = 0.25  # a guess is taken if no more than this share of the error is left
PATIENCE = 20.0  # seconds; large convolutions are tried only as long as that
FEW = 0.1  # an error is confined if nearly all of it lies in at most this share of an axis

USUAL = (
    ("embeddings.patches", "other pixels (image, resizing, normalisation) or another layout of the patch weights"),
    ("embeddings", "the CLS token, the mask token or the absolute positions"),
    ("bias_table", "other numbers in the bias table, or another way to resize it to this grid"),
    ("query", "the layout of the joined q, k, v weights, or a bias"),
    ("key", "the layout of the joined q, k, v weights, or a bias, which keys do not have"),
    ("value", "the layout of the joined q, k, v weights, or a bias"),
    ("probs", "the scale 1 / sqrt(d), or the position bias and its index"),
    ("context", "the scale 1 / sqrt(d), the position bias and its index, or the order of the heads"),
    ("residual", "the output projection, its bias, the layer scale or the residual"),
    ("hidden", "the activation, or the weights and bias before it"),
    ("output", "the second linear layer, its bias, the layer scale or the residual"),
    ("norm", "epsilon, or weight and bias of the norm"),
    ("pooler", "which tokens the mean is taken over, or the norm after it"),
    ("feature_maps", "which hidden states feed the head: an index off by one, or the CLS token left in"),
    ("psp_pools", "the cells of the adaptive pooling"),
    ("laterals", "the resizing that joins two levels"),
    ("fpn.", "the transposed convolutions, or the batch norm between them"),
    ("conv", "the kernel's layout, the batch norm and its epsilon, or the resizing before it"),
    ("bottleneck", "the order and resizing of the joined maps, the batch norm and its epsilon"),
    ("logits", "the last layer's weights or bias"),
)


def diagnose(
    name: str, found: np.ndarray, exact: np.ndarray, calls: list[Call], before: Any = None, states: Any = None
) -> str:
    """A sentence on why `found` is not `exact`, the float64 result of `calls`.

    `before` is the candidate's array recorded before this one, `states` {name: fingerprint} of its hidden states.
    """
    found = found.astype(np.float64)
    if not np.isfinite(found).all():
        return ""
    error = _size(found - exact)
    guesses = [*_stored(found), *_by_name(name, found, calls, before, states)]
    best = _best(guesses, found, error)
    if best is None:
        best = _best(_guesses(name, exact, calls), found, error)
    if best is not None:
        return best
    shape = "; ".join(_structure(name, found, exact))
    usual = next((text for key, text in USUAL if key in name), "the layer's weights")
    return f"{shape + '; ' if shape else ''}usual causes here: {usual}"


def fingerprint(x: np.ndarray) -> np.ndarray:
    """A few numbers of hidden states (B, N, D): the first patch of the first image."""
    return np.array(x[0, 1], np.float64)


def _size(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def _best(guesses: Iterable[Guess], found: np.ndarray, error: float) -> str | None:
    """The guess that comes nearest, if it explains the error."""
    best, left = None, EXPLAINED * error
    stop = time.monotonic() + PATIENCE
    for text, value in guesses:
        gap = _size(found - value) if np.shape(value) == found.shape else np.inf
        if gap < left:  # a later guess must be clearly better
            best, left = text, gap / 2
        if time.monotonic() > stop:
            break
    return best


def _stored(found: np.ndarray) -> Iterator[Guess]:
    if found.size >= 16:
        for dtype in ("bfloat16", "float16"):
            if np.array_equal(known_mistakes.half(found, dtype), found):
                yield f"every value is a {dtype} number: the result was stored in half precision", found


def _guesses(name: str, exact: np.ndarray, calls: list[Call]) -> Iterator[Guess]:
    """Guesses of every op that took part; what the model did with an op's result is kept (sums, mostly)."""
    last = name.rpartition(".")[2]
    for call in reversed(calls):
        result = call.result
        if call.op == "project_qkv" and last in ("query", "key", "value"):
            guesses = known_mistakes.project(last)
            result = result[("query", "key", "value").index(last)]
        elif call.op == "attention" and last in ("probs", "context"):
            guesses = known_mistakes.attention(last == "probs")
            result = result[1] if last == "probs" else result[0]
        elif call.op in known_mistakes.OPS:
            guesses = known_mistakes.OPS[call.op]
        else:
            continue
        if result.shape != exact.shape:
            continue
        rest = 0 if result is exact else exact - result
        for text, value in guesses(*call.wide_args(), **call.kwargs):
            yield text, value + rest if np.shape(value) == exact.shape else value


def _by_name(name: str, found: np.ndarray, calls: list[Call], before: Any, states: Any) -> Iterator[Guess]:
    if name == "pooler" and before is not None:
        x = before.astype(np.float64)
        yield from _pooling(x)
        for call in calls:
            if call.op == "layer_norm":
                yield from _normed_pooling(x, *call.args[1:])
    if name.startswith("feature_maps") and states:
        mine = found[0, :, 0, 0] if found.ndim == 4 else found[0, 1]
        for state, numbers in states.items():
            if np.allclose(numbers, mine, rtol=1e-4, atol=1e-6) and numbers.shape == mine.shape:
                yield f"this is {state}, another hidden state than the config asks for", found


def _pooling(x: np.ndarray) -> Iterator[Guess]:  # (B, N, D) -> (B, D)
    yield "the pooled vector is the CLS token", x[:, 0]
    yield "the pooled vector is the mean of the patches, without a norm", x[:, 1:].mean(1)
    yield "the pooled vector is the mean of all tokens, without a norm", x.mean(1)


def _normed_pooling(x: np.ndarray, norm: LayerNorm, eps: float) -> Iterator[Guess]:
    for text, vector in (
        ("the mean is taken over all tokens, CLS included", x.mean(1)),
        ("the CLS token is normalised instead of the mean of the patches", x[:, 0]),
        ("the last patch is left out of the mean", x[:, 1:-1].mean(1)),
        ("the largest value instead of the mean", x[:, 1:].max(1)),
    ):
        yield text, reference.layer_norm(vector, norm, eps)
    normed = reference.layer_norm(x, norm, eps)
    yield "the tokens are normalised before the mean instead of after it", normed[:, 1:].mean(1)


# The error's shape --------------------------------------------------------------------------------------------------


def _structure(name: str, found: np.ndarray, exact: np.ndarray) -> Iterator[str]:
    error = found - exact
    size, truth = _size(error), _size(exact)
    slope = float(np.vdot(found, exact) / max(np.vdot(exact, exact), 1e-300))
    if size and _size(found - slope * exact) < 0.02 * size:
        yield f"everything is {slope:.4g} times what it should be"
        return
    axes = _axis_names(name, exact)
    for axis, label in enumerate(axes):
        confined = _confined(error, axis)
        if confined:
            yield f"the error is confined to {label} {confined}"
    if exact.size > 8 and truth and _same_numbers(found, exact):
        yield "the right numbers in the wrong order: a swap, a transpose or a reshape too many or too few"
        return
    along = tuple(i for i, label in enumerate(axes) if label in ("sample", "token", "row", "column"))
    if along and exact.ndim > 1:
        common = error.mean(along, keepdims=True)
        if _size(error - common) < 0.02 * size and error.size > common.size:
            yield "the same vector is added everywhere: a bias that is missing, extra or another"
    if truth and 2.0**-10 < size / truth < 2.0**-7:
        yield "an error of this size comes from bfloat16 somewhere"
    elif truth and 2.0**-14 < size / truth <= 2.0**-10:
        yield "an error of this size comes from float16 or TF32 somewhere"


def _axis_names(name: str, x: np.ndarray) -> tuple[str, ...]:
    if name.endswith("bias_table"):
        return ("row of the table", "head")
    if name.endswith("probs"):
        return ("sample", "head", "query", "key")
    if name.endswith(("query", "key", "value")) and x.ndim == 4:
        return ("sample", "head", "token", "feature")
    if x.ndim == 4:
        return ("sample", "channel", "row", "column")
    return {3: ("sample", "token", "feature"), 2: ("sample", "feature")}.get(x.ndim, ("",) * x.ndim)


def _confined(error: np.ndarray, axis: int) -> str:
    """The few indices of an axis that hold nearly all of the error, or nothing."""
    n = error.shape[axis]
    energy = np.square(error).sum(tuple(i for i in range(error.ndim) if i != axis))
    order = np.argsort(energy)[::-1]
    count = int(np.searchsorted(np.cumsum(energy[order]), 0.999 * energy.sum())) + 1
    if count > max(2 if n >= 8 else 1, FEW * n) or n < 3:
        return ""
    return ", ".join(str(i) for i in sorted(order[:count])[:6]) + (" ..." if count > 6 else "")


def _same_numbers(found: np.ndarray, exact: np.ndarray) -> bool:
    if found.size > 1 << 22:
        return False
    gap = np.sort(found, axis=None) - np.sort(exact, axis=None)
    return _size(gap) < 1e-3 * _size(found - exact)
