"""What an error usually means: known mistakes are tried on the op, then the pattern of the error is examined."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ops import reference
from ..params import LayerNorm
from . import attention_mistakes, known_mistakes, map_mistakes
from .float64_model import Call
from .known_mistakes import Guess
from .low_precision import stored_as
from .slices import SliceError

EXPLAINED = 0.01  # of the error may be left by a mistake that is named as the cause
ROUNDING = 2.0  # times what rounding leaves may be left as well
ALIKE = 1.5  # times what the best guess leaves, and rounding hides which is meant
SAME = 1 + 1e-6  # times, and the two are one mistake under two names
MOST_ALIKE = 2
NEAR = 0.5  # of the error may be left by the nearest mistake, if it is to be mentioned
DROPPED = 0.02  # of all elements are exactly 0 at least, where dropout is on
MOST_SAMPLES = 16
PATIENCE = 20.0  # seconds; large convolutions are tried only as long as that
FEW = 0.1  # an error is confined if nearly all of it lies in at most this share of an axis

MISTAKES = {**known_mistakes.OPS, **map_mistakes.OPS}

# Where a block has the parameters that these ops take as their second argument.
PLACES = ("norm1", "norm2", "fc1", "fc2", "attention.output")
BY_BLOCK = {name: getattr(reference, name) for name in ("layer_norm", "linear_activation", "linear_residual", "linear")}

USUAL = (
    (".identity", "the weights or bias of the 1x1 convolution, or a ReLU before it, which it does not have"),
    (".path.", "the kernel's layout or padding, its bias, or the ReLU before it"),
    ("blocks.", "the last convolution or the ReLU before it, the gain 1 / (number of blocks)^2, or the identity path"),
    ("pooled", "the pooling: the largest of every 2x2 square"),
    ("enlarged", "the enlargement: every pixel four times, not interpolated"),
    ("coder.input", "other pixels or tokens, the kernel's layout or padding, or a bias"),
    ("tokens", "the axis of the largest logit, the order of rows and columns, or the first number"),
    ("statistics", "the last convolution's weights or bias, or the ReLU before it"),
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


@dataclass(frozen=True)
class Known:
    """What is known beside an array and its ops: the candidate's array before it, {name: fingerprint} of its hidden
    states, all blocks' parameters in float64, the rms of rounding here, and the low precision it may have."""

    before: Any = None
    states: Mapping[str, np.ndarray] = field(default_factory=dict)
    blocks: Sequence[Any] = ()
    noise: float = 0.0
    precision: str | None = None


def diagnose(
    name: str,
    found: np.ndarray,
    exact: np.ndarray,
    calls: list[Call],
    known: Known = Known(),
    only: SliceError | None = None,
) -> str:
    """A sentence on why `found` is not `exact`, the float64 result of `calls`; with `only` one slice is looked at.

    A known mistake is named as the cause if it leaves no more than a hundredth of the error, or than rounding, and as
    the nearest one with what it leaves if it explains half.
    """
    found = found.astype(np.float64)
    if not np.isfinite(found).all():
        return ""
    if only is None:
        return _explained(name, found, exact, calls, known, lambda x: x) or _described(name, found, exact)
    place = f"only {_axis_names(name, exact)[only.axis]} {only.index} is off"
    cause = _explained(name, found, exact, calls, known, lambda x: np.take(x, only.index, only.axis))
    return f"{place}: {cause or 'a few of its weights or its bias, or lower precision beneath larger ones'}"


def _explained(
    name: str, found: np.ndarray, exact: np.ndarray, calls: list[Call], known: Known, part: Callable[..., Any]
) -> str:
    """The known mistake that comes nearest to that part of the array; nothing if none explains half of the error."""
    error = _size(part(found) - part(exact))
    guesses = itertools.chain(
        _stored(found) if known.precision is None and name != "tokens" else (),
        _by_name(name, found, exact, calls, known),
        _guesses(name, exact, calls),
        _other_blocks(exact, calls, known.blocks),
    )
    tried = _tried(guesses, found, NEAR * error, part)
    if not tried:
        return ""
    text, left = min(tried, key=lambda guess: guess[1])
    certain = max(EXPLAINED * error, ROUNDING * known.noise)
    if left > certain:
        return f"nearest known mistake: {text}, which leaves {left / error:.0%} of the error"
    alike = [other for other, gap in tried if SAME * left < gap <= min(ALIKE * left, certain)]
    return ", or ".join([text, *alike[:MOST_ALIKE]])


def _described(name: str, found: np.ndarray, exact: np.ndarray) -> str:
    shape = "; ".join(_structure(name, found, exact))
    usual = next((text for key, text in USUAL if key in name), "the layer's weights")
    return f"{shape + '; ' if shape else ''}usual causes here: {usual}"


def fingerprint(x: np.ndarray) -> np.ndarray:
    """A few numbers of hidden states (B, N, D): the first patch of the first image."""
    return np.array(x[0, 1], np.float64)


def _size(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def _tried(
    guesses: Iterable[Guess], found: np.ndarray, most: float, part: Callable[..., Any]
) -> list[tuple[str, float]]:
    """(guess, the rms that it leaves) of all that leave less than `most`."""
    near, mine = [], part(found)
    stop = time.monotonic() + PATIENCE
    for text, value in guesses:
        gap = _size(mine - part(value)) if np.shape(value) == found.shape else np.inf
        if gap < most:
            near.append((text, gap))
        if time.monotonic() > stop:
            break
    return near


def _stored(found: np.ndarray) -> Iterator[Guess]:
    if (dtype := stored_as(found)) is not None:
        yield f"every value is a {dtype} number: the result was stored in half precision", found


def _guesses(name: str, exact: np.ndarray, calls: list[Call]) -> Iterator[Guess]:
    """Guesses of every op that took part; what the model did with an op's result is kept (sums, mostly)."""
    last = name.rpartition(".")[2]
    for call in reversed(calls):
        result = call.result
        if call.op == "project_qkv" and last in ("query", "key", "value"):
            guesses = attention_mistakes.project(last)
            result = result[("query", "key", "value").index(last)]
        elif call.op == "attention" and last in ("probs", "context"):
            guesses = attention_mistakes.attention(last == "probs")
            result = result[1] if last == "probs" else result[0]
        elif call.op in MISTAKES:
            guesses = MISTAKES[call.op]
        else:
            continue
        if result.shape != exact.shape:
            continue
        rest = 0 if result is exact else exact - result
        for text, value in guesses(*call.wide_args(), **call.kwargs):
            yield text, value + rest if np.shape(value) == exact.shape else value


def _by_name(name: str, found: np.ndarray, exact: np.ndarray, calls: list[Call], known: Known) -> Iterator[Guess]:
    if name == "pooler" and known.before is not None:
        x = known.before.astype(np.float64)
        yield from _pooling(x)
        for call in calls:
            if call.op == "layer_norm":
                yield from _normed_pooling(x, *call.args[1:])
    if name.startswith("feature_maps"):
        mine = found[0, :, 0, 0] if found.ndim == 4 else found[0, 1]
        for state, numbers in known.states.items():
            if np.allclose(numbers, mine, rtol=1e-4, atol=1e-6) and numbers.shape == mine.shape:
                yield f"this is {state}, another hidden state than the config asks for", found
    if name.endswith("norm1") and calls and calls[-1].op == "layer_norm":
        yield from _another_state(found, calls[-1], known.states)
    if name == "logits" and exact.ndim == 2:
        e = np.exp(exact - exact.max(-1, keepdims=True))
        yield "the logits went through a softmax", e / e.sum(-1, keepdims=True)
        yield "the logits went through a log-softmax", exact - np.log(np.exp(exact).sum(-1, keepdims=True))
        yield "the logits went through a sigmoid", 1 / (1 + np.exp(-exact))
    for call in calls:
        if call.op == "attention" and name.endswith("probs"):
            yield from attention_mistakes.another_scale(found, *call.wide_args(), **call.kwargs)
        if call.op == "relu_conv2d_residual":
            yield from map_mistakes.another_gain(found, *call.wide_args())
    yield from _dropped(found, exact, calls)


def _another_state(found: np.ndarray, call: Call, states: Mapping[str, np.ndarray]) -> Iterator[Guess]:
    for state, numbers in list(states.items())[:-1]:  # the last is the right one
        vector = reference.layer_norm(numbers, *call.args[1:])
        if np.allclose(vector, found[0, 1], rtol=1e-3, atol=1e-4):
            yield f"the norm is that of {state}, another hidden state", found


def _dropped(found: np.ndarray, exact: np.ndarray, calls: list[Call]) -> Iterator[Guess]:
    """Dropout left on: some elements of a branch are 0, the others larger by one factor."""
    call = next((call for call in reversed(calls) if call.op == "linear_residual"), None)
    rest = 0 if call is None or np.shape(call.args[3]) != exact.shape else np.asarray(call.args[3], np.float64)
    mine, true = found - rest, exact - rest
    tiny = 1e-5 * _size(true)
    gone = (np.abs(mine) <= tiny) & (np.abs(true) > 100 * tiny)
    share = float(gone.mean()) if gone.size else 0.0
    if not DROPPED < share < 0.98:
        return
    kept = np.where(gone, 0, true)
    factor = float(np.vdot(kept, mine) / max(np.vdot(kept, kept), 1e-300))
    if factor > 1 + DROPPED:
        text = f"dropout is on: {share:.0%} of the elements are 0, the others {factor:.3g} times as large"
        yield text, kept * factor + rest


def _other_blocks(exact: np.ndarray, calls: list[Call], blocks: Sequence[Any]) -> Iterator[Guess]:
    """The same op with the parameters that another block has in that place."""
    if not calls or calls[-1].op not in BY_BLOCK:
        return
    call = calls[-1]
    own = next(((i, path) for i, b in enumerate(blocks) for path in PLACES if _leaf(b, path) is call.args[1]), None)
    if own is None or isinstance(call.result, tuple) or call.result.shape != exact.shape:
        return
    args, place = list(call.wide_args()), own[1]
    for i, block in enumerate(blocks):
        if i != own[0]:
            args[1] = _leaf(block, place)
            yield f"the parameters are those of block {i}", BY_BLOCK[call.op](*args, **call.kwargs)


def _leaf(block: Any, path: str) -> Any:
    for word in path.split("."):
        block = getattr(block, word)
    return block


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
    exchanged = _exchanged(found, exact)
    if exchanged:
        yield f"the samples of the batch are exchanged: {exchanged}"
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


def _axis_names(name: str, x: np.ndarray) -> tuple[str, ...]:
    if name == "tokens":
        return ("sample", "row", "column")
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
    if count > max(2 if n >= 8 else 1, FEW * n) or n < 2:
        return ""
    return ", ".join(str(i) for i in sorted(order[:count])[:6]) + (" ..." if count > 6 else "")


def _exchanged(found: np.ndarray, exact: np.ndarray) -> str:
    """Which sample each one is, if the batch is in another order."""
    if found.ndim < 2 or not 2 <= len(found) <= MOST_SAMPLES:
        return ""
    size = _size(found - exact)
    gaps = np.array([[_size(mine - true) for true in exact] for mine in found])
    order = gaps.argmin(1)
    if sorted(order) != list(range(len(found))) or gaps.min(1).max() > EXPLAINED * size:
        return ""
    return ", ".join(f"{i} is {j}" for i, j in enumerate(order) if i != j)


def _same_numbers(found: np.ndarray, exact: np.ndarray) -> bool:
    if found.size > 1 << 22:
        return False
    gap = np.sort(found, axis=None) - np.sort(exact, axis=None)
    return _size(gap) < 1e-3 * _size(found - exact)
