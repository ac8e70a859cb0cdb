"""Two checkpoints, tensor by tensor, whatever dialect or format each is in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoint.load import Checkpoint, Match, match_names, open_checkpoint, read_arrays
from ..params import param_shapes
from ..text import one_line, shown_name
from ..tokenizer.files import read_tokenizer
from .networks import TOKENIZER


@dataclass
class TensorPair:
    """One parameter in both checkpoints."""

    name: str
    status: str  # "equal bits", "differs", "shape", "only in A", "only in B"
    shape: tuple[int, ...] = ()
    max_abs: float = 0.0
    max_rel: float = 0.0
    note: str = ""


@dataclass
class WeightsReport:
    """All parameters of both."""

    a: str
    b: str
    task: str
    pairs: list[TensorPair]
    config_notes: list[str]

    @property
    def ok(self) -> bool:
        """Whether both hold the same numbers, bit for bit, and there are any."""
        return bool(self.pairs) and all(pair.status == "equal bits" for pair in self.pairs)


def compare_weights(a: str | os.PathLike[str], b: str | os.PathLike[str], task: str | None = None) -> WeightsReport:
    """Compares what both hold of a model of `task`, by default the one A was made for.

    Names of tensors that such a model has no place for stand as "only in A" or "only in B".
    """
    one, two = open_checkpoint(a), open_checkpoint(b)
    task = task or one.task or "model"
    places = [match_names(c.tensors, c.config, task, c.naming) for c in (one, two)]
    shapes = [param_shapes(c.config, task) for c in (one, two)]
    pairs = []
    for name in {**shapes[0], **shapes[1]}:  # one tensor of each is in memory at a time
        held = [_read(c, m, name) for c, m in zip((one, two), places)]
        if held[0] is not None or held[1] is not None:
            pairs.append(_pair(name, *held))
    for match, side in zip(places, "AB"):
        pairs += [TensorPair(name, f"only in {side}") for name in match.unexpected]
    return WeightsReport(str(a), str(b), task, pairs, _config_notes(one.config, two.config))


def compare_tokenizers(a: str | os.PathLike[str], b: str | os.PathLike[str], task: str | None = None) -> WeightsReport:
    """The same of two tokenizers, whichever names their files have; `task` is theirs, whatever is given."""
    (one, arrays), (two, others) = read_tokenizer(a), read_tokenizer(b)
    names = {**arrays, **others}
    pairs = [_pair(name, arrays.get(name), others.get(name)) for name in names]
    return WeightsReport(str(a), str(b), TOKENIZER, pairs, _config_notes(one, two))


def _read(checkpoint: Checkpoint, match: Match, name: str) -> np.ndarray | None:
    """A parameter, in whatever shape the file has it; None if it has none."""
    if name in match.found:
        return read_arrays(checkpoint, {name: match.found[name]})[name]
    if name in match.mismatched:
        return np.asarray(checkpoint.tensors[match.mismatched[name].split(":")[0]], np.float32)
    return None


def _pair(name: str, a: Any, b: Any) -> TensorPair:
    if a is None or b is None:
        present = b if a is None else a
        return TensorPair(name, "only in B" if a is None else "only in A", present.shape)
    if a.shape != b.shape:
        return TensorPair(name, "shape", a.shape, note=f"A has {a.shape}, B has {b.shape}")
    if np.array_equal(a.view(np.uint32), b.view(np.uint32)):
        return TensorPair(name, "equal bits", a.shape)
    gap = np.abs(a.astype(np.float64) - b)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(gap > 0, gap / np.abs(a.astype(np.float64)), 0)
    return TensorPair(name, "differs", a.shape, float(gap.max()), float(relative.max()), _explain(a, b))


def _explain(a: np.ndarray, b: np.ndarray) -> str:
    """What usually makes two versions of one tensor differ."""
    if a.ndim == 2 and a.shape[0] == a.shape[1] and np.array_equal(a, b.T):
        return "one is the transpose of the other"
    if np.array_equal(np.sort(a, axis=None), np.sort(b, axis=None)):
        return "the same numbers in another order"
    for one, two, which in ((a, b, "B"), (b, a, "A")):
        with np.errstate(over="ignore"):
            if np.array_equal(one.astype(np.float16).astype(np.float32), two):
                return f"{which} is rounded to float16"
        bits = np.ascontiguousarray(one).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        if np.array_equal(rounded.view(np.float32), two):
            return f"{which} is rounded to bfloat16"
    return ""


def _config_notes(a: Any, b: Any) -> list[str]:
    left, right = a.to_dict(), b.to_dict()
    skip = {"id2label", "label2id", "architectures", *getattr(a, "extra", ()), *getattr(b, "extra", ())}
    return [f"{k}: {left.get(k)} in A, {right.get(k)} in B" for k in left if k not in skip and left[k] != right.get(k)]


def describe(report: WeightsReport) -> str:
    """The comparison as text: differing tensors, then the sum of it."""
    lines = [f"config: {one_line(note)}" for note in report.config_notes]
    for pair in report.pairs:
        if pair.status == "equal bits":
            continue
        numbers = f"max abs {pair.max_abs:.3e}, max rel {pair.max_rel:.3e}" if pair.status == "differs" else pair.status
        lines.append(f"{shown_name(pair.name):50} {numbers}{'; ' + pair.note if pair.note else ''}")
    equal = sum(pair.status == "equal bits" for pair in report.pairs)
    if not report.pairs:
        lines.append("FAIL: nothing was compared: the checkpoints hold no parameter of this task")
    elif report.ok:
        lines.append(f"OK: all {equal} tensors of {report.task} are equal, bit for bit")
    else:
        lines.append(
            f"FAIL: {len(report.pairs) - equal} of {len(report.pairs)} tensors differ, {equal} have equal bits"
        )
    return "\n".join(lines)
