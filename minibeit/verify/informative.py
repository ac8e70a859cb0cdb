"""What a checkpoint can show: a parameter that is 0, 1 or constant hides what is done with it.

A freshly initialised model is the extreme case.  Its biases and position tables are 0, its norms 1, its layer scales
0.1: an implementation that leaves all of them out computes the same numbers, and no verifier can tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from .networks import TOKENIZER, shapes_of

# Least effect that a fault must have to be told from rounding with certainty, relative to the array it acts on.
FAINT = 1e-5
MOST_KINDS = 4  # that a sentence lists

# (globs of names, value that has no effect or None, what cannot be seen if it has that value, what if it is constant)
KINDS: tuple[tuple[tuple[str, ...], float | None, str, str], ...] = (
    (
        ("*bias_table",),
        0.0,
        "the position bias, its index and its rows",
        "the position bias: softmax ignores a constant",
    ),
    (("*.position_embeddings",), 0.0, "the absolute positions", "the order of the absolute positions"),
    (("*.cls_token", "*.mask_token"), 0.0, "the CLS or mask token", "the order of the CLS or mask token's numbers"),
    (("*lambda_1", "*lambda_2"), 1.0, "the layer scale", "which of its numbers the layer scale applies where"),
    (("*running_mean",), 0.0, "the running mean of batch norms", "the order of the running means"),
    (("*running_var",), 1.0, "the running variance of batch norms", "the order of the running variances"),
    (("*norm*.weight", "*pooler.weight", "*bn.weight"), 1.0, "the weight of norms", "the order of the norms' weights"),
    (("*.bias",), 0.0, "biases", "the order of the biases' numbers"),
    (("*.weight",), 0.0, "whole layers", "which weight is which"),
)


@dataclass(frozen=True)
class Blind:
    """Parameters of one kind that hide something: their names, their state and what it hides."""

    names: tuple[str, ...]
    state: str  # "0", "1", "one number each", "the same in every block"
    hides: str

    def __str__(self) -> str:
        return f"{self.hides} ({_few(self.names)}: {self.state})"


def blind_spots(arrays: Mapping[str, np.ndarray]) -> list[Blind]:
    """What weights by canonical name cannot show, widest first; nothing for weights that are informative throughout."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, array in arrays.items():
        spot = _spot(name, array)
        if spot is not None:
            found.setdefault(spot, []).append(name)
    hidden = {name for names in found.values() for name in names}
    for name in _repeated({name: array for name, array in arrays.items() if name not in hidden}):
        found.setdefault(("the same in every block", "which block's parameters are used"), []).append(name)
    spots = [Blind(tuple(names), state, hides) for (state, hides), names in found.items()]
    return sorted(spots, key=lambda spot: -len(spot.names))


def sentence(spots: list[Blind], total: int) -> str:
    """The warning beside a verdict; empty where there is nothing to warn of."""
    if not spots:
        return ""
    count = sum(len(spot.names) for spot in spots)
    listed = "; ".join(map(str, spots[:MOST_KINDS])) + (
        f"; and {len(spots) - MOST_KINDS} more kinds" if len(spots) > MOST_KINDS else ""
    )
    return (
        f"{count} of the {total} parameters of this checkpoint hide what is done with them, so faults there "
        f"pass unseen: {listed}. `--test-weights DIR` makes a checkpoint of the same config that shows them"
    )


def informative_weights(config: Any, task: str, seed: int = 0) -> dict[str, np.ndarray]:
    """{canonical name: float32 array} in which every parameter matters and no two blocks are alike.

    Norms scatter around 1 by 0.2, layer scales lie in 0.5 to 1.5 with either sign, biases and tokens have a root mean
    square of 0.3, tables of relative positions of 1, matrices the size that keeps their result near 1, those of queries
    and keys somewhat more, so that attention has an opinion.  In a tokenizer the last convolution of a path makes up
    for the gain behind it, so that the path counts beside the identity.
    """
    rng = np.random.default_rng(seed)
    arrays = {name: _drawn(rng, name, shape) for name, shape in shapes_of(config, task).items()}
    if task == TOKENIZER:
        for name, array in arrays.items():
            if name.endswith("path.3.weight"):
                array /= np.float32(config.gain)
    return arrays


def _drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = rng.standard_normal(shape, dtype=np.float32)
    last = name.rpartition(".")[2]
    if last in ("lambda_1", "lambda_2"):
        return np.sign(noise) * rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if last == "running_var":
        return np.float32(0.8) + np.abs(noise)
    if last.endswith("bias_table"):
        return noise
    if len(shape) == 1 and last == "weight":
        return 1 + np.float32(0.2) * noise
    if len(shape) == 1 or last in ("cls_token", "mask_token", "position_embeddings"):
        return np.float32(0.3) * noise
    gain = 1.5 if name.endswith(("query.weight", "key.weight")) else 1.0
    fan_in = shape[0] if "deconv" in name else int(np.prod(shape[1:]))
    return np.float32(gain * fan_in**-0.5) * noise


def _spot(name: str, array: np.ndarray) -> tuple[str, str] | None:
    """(state, what it hides) of a parameter that hides something."""
    globs, neutral, effect, order = next(kind for kind in KINDS if any(fnmatchcase(name, glob) for glob in kind[0]))
    if array.size == 0:
        return None
    low, high = float(array.min()), float(array.max())
    if neutral is not None and max(abs(low - neutral), abs(high - neutral)) < FAINT:
        return f"{neutral:g}", effect
    if array.size > 1 and high - low <= FAINT * max(abs(low), abs(high)):
        return "one number each", order
    return None


def _repeated(arrays: Mapping[str, np.ndarray]) -> Iterable[str]:
    """Parameters of blocks that are those of an earlier block."""
    first: dict[tuple[str, bytes], list[tuple[str, np.ndarray]]] = {}
    for name, array in arrays.items():
        block, _, rest = name.removeprefix("beit.encoder.").partition(".")
        if not (name.startswith("beit.encoder.") and block.isdigit()):
            continue
        alike = first.setdefault((rest, np.ascontiguousarray(array).reshape(-1)[:16].tobytes()), [])
        if any(np.array_equal(array, other) for _, other in alike):
            yield name
        else:
            alike.append((name, array))


def _few(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:2])
    return shown if len(names) <= 2 else f"{shown} and {len(names) - 2} more"
