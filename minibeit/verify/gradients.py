"""Gradients compared with the float64 truth: of every parameter, and the cotangent of every intermediate array.

The cotangent of an array is the gradient of the loss with respect to it.  Names in a trace: `cotangent.NAME` for the
array that the forward records as NAME, `gradient.NAME` for the parameter of that canonical name.

As in the forward, each raises two questions.  Total error: how far is it from the float64 backward of the whole
network?  Own error: how far is it from what the float64 backward makes of *the candidate's own* cotangents?  A
parameter's own error is thus that of one op, and the first row whose own error is out of budget names the guilty op.
Rows come in the order of the backward, from the loss to the pixels.  All gradients are held in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ..noise import Noise
from ..ops import GPU_BACKENDS
from ..ops.table import TABLE
from ..params import flatten
from ..tape import Node, Tape, mapped
from ..trace import Trace
from ..train.discrete_vae import gumbel_noise
from ..train.gradients import placed, recorded
from .budget import Yardstick, scatters
from .difference import distance, heat_map
from .gradient_diagnosis import diagnose
from .judging import Row, judge
from .kinks import decided, turned, undecided
from .lockstep import Job, Report, larger
from .networks import TOKENIZER, trained_network
from .sum_order import losses
from .trace_names import TOKENS, trace_shapes

COTANGENT, GRADIENT = "cotangent.", "gradient."
PROBS = "attention.probs"  # nothing is computed from attention maps
LOSSES = ("image_classification", "masked_image_modeling", "semantic_segmentation", TOKENIZER)
RELAXED = "relaxed"  # the mixture of tokens that a tokenizer in training has in place of TOKENS
TEMPERATURE, DIVERGENCE = 0.8, 0.1  # of the call whose gradients a tokenizer is judged by
Found = Mapping[str, np.ndarray]


@dataclass
class GradientJob(Job):
    """What is to be verified when it is gradients; the inputs have labels, those of a tokenizer Gumbel noise."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of all cotangents, in the order of the forward, and of the gradients of all parameters."""
        inputs = {name: self.inputs[name].shape for name in ("pixel_values", "bool_masked_pos") if name in self.inputs}
        recorded = trace_shapes(self.config, self.task, inputs)
        if TOKENS in recorded:
            recorded[TOKENS] = recorded["encoder.logits"]
            recorded = {RELAXED if name == TOKENS else name: shape for name, shape in recorded.items()}
        shapes = {COTANGENT + name: shape for name, shape in recorded.items() if not name.endswith(PROBS)}
        learned = {name: array.shape for name, array in self.arrays.items() if ".running_" not in name}
        return shapes | {GRADIENT + name: shape for name, shape in learned.items()}


def with_labels(job: Job, seed: int = 0) -> GradientJob:
    """`job` with seeded random labels among its inputs, where it has none; of a tokenizer noise and settings.

    Raises ValueError for a task without a loss of its own.
    """
    if job.task not in LOSSES:
        raise ValueError(f"gradients: expected a task with a loss ({', '.join(LOSSES)}), found {job.task}")
    if "labels" in job.inputs or "noise" in job.inputs:
        return GradientJob(job.config, job.task, job.arrays, job.inputs)
    if job.task == TOKENIZER:
        return GradientJob(job.config, job.task, job.arrays, {**job.inputs, **_tokenizer_call(job, seed)})
    pixels, rng = job.inputs["pixel_values"], np.random.default_rng(seed)
    if job.task == "image_classification":
        labels = rng.integers(0, job.config.num_labels, len(pixels))
    elif job.task == "semantic_segmentation":
        labels = rng.integers(0, job.config.num_labels, (len(pixels), *pixels.shape[2:]))
    else:
        if "bool_masked_pos" not in job.inputs or not job.inputs["bool_masked_pos"].any():
            raise ValueError("gradients: a model of masked_image_modeling needs a mask with a hidden patch")
        labels = rng.integers(0, job.config.vocab_size, int(job.inputs["bool_masked_pos"].sum()))
    return GradientJob(job.config, job.task, job.arrays, {**job.inputs, "labels": labels})


def _tokenizer_call(job: Job, seed: int) -> dict[str, np.ndarray]:
    """What a tokenizer in training is given beside pixels.  Raises ValueError for one without a decoder."""
    if job.config.n_init is None:
        raise ValueError("gradients: expected a tokenizer with a decoder, which its loss needs, found an encoder alone")
    shapes = trace_shapes(job.config, job.task, {"pixel_values": job.inputs["pixel_values"].shape})
    settings = {"temperature": TEMPERATURE, "divergence_weight": DIVERGENCE}
    return {
        "noise": gumbel_noise(Noise(seed), shapes["encoder.logits"]),
        **{name: np.array(value, np.float32) for name, value in settings.items()},
    }


@dataclass
class Made:
    """What one backward made: arrays by name in the order of the backward, and the ops that each came from."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    ops: dict[str, tuple[str, ...]] = field(default_factory=dict)
    in_order: dict[str, tuple[float, float]] = field(default_factory=dict)  # see `sum_order`, by name
    undecided: dict[str, np.ndarray] = field(default_factory=dict)  # see `kinks`: masks, by name
    turned: dict[str, tuple[float, float]] = field(default_factory=dict)  # rms and peak of `kinks.turned`, by name
    leeway: dict[str, float] = field(default_factory=dict)  # the widest error budget of the forward up to there


def model_gradients(job: Job, model: Any, given: Found | None = None) -> Made:
    """All cotangents and gradients that `model` makes of the job's input and labels.

    With `given`, the backward goes on with these cotangents in place of its own: each array is then what the ops since
    the last given one make of it.  Raises ValueError for a backend without gradients.
    """
    if model.ops.backend not in ("numpy", *GPU_BACKENDS):
        raise ValueError(f"gradients: expected a model of the backend 'numpy' or 'cupy', found {model.ops.backend!r}")
    tape, inputs = _Probed(model.ops, given or {}), dict(job.inputs)
    with model.ops.num_threads(model.num_threads):
        watched = tape.watch(placed(model.plain_params, model))
        tape.parameters = {name: leaf for name, leaf in flatten(watched).items() if isinstance(leaf, Node)}
        output = recorded(model, tape, watched).forward(inputs.pop("pixel_values"), trace=tape.trace, **inputs)
        tape.backward(output["loss"], np.ones_like(output["loss"].value))
        tape.note_parameters()
        return _complete(tape)


def _complete(tape: _Probed) -> Made:
    """What was noted; parameters with a part in several ops have their sum only at the end."""
    for name, node in tape.parameters.items():
        if node.gradient is not None:
            tape.made.arrays[GRADIENT + name] = np.asarray(tape.base.to_host(node.gradient))
    return tape.made


class _Probed(Tape):
    """A tape that notes the cotangent of every array that the forward records, and which backward made it."""

    def __init__(self, ops: Any, given: Found) -> None:
        super().__init__(ops)
        self.given, self.made, self.op = given, Made(), ""
        self.origins: dict[int, list[str]] = {}  # id of a node -> the ops that its cotangent came through
        self.kinks: dict[int, np.ndarray] = {}
        self.turned: dict[int, np.ndarray] = {}
        self.leeways: dict[int, float] = {}
        self.widest = 1.0  # error budget of the ops so far
        self.parameters: dict[str, Node] = {}
        self.trace = _Probes(self)

    def note_parameters(self) -> None:
        """Gives a place to the parameters that got a gradient since the last time."""
        for name, node in self.parameters.items():
            if node.gradient is not None and GRADIENT + name not in self.made.arrays:
                self._keep(GRADIENT + name, node.gradient, node)

    def probe(self, name: str, node: Node) -> Node:
        """The node again, whose cotangent is noted on its way back, and replaced if another is given."""

        def backward(g: np.ndarray, saved: None, x: np.ndarray) -> tuple[np.ndarray]:
            self.note_parameters()
            self._keep(name, g, out)
            other = self.given.get(name)
            return (g if other is None or other.shape != g.shape else self.base.asarray(other, g.dtype.name),)

        out = super()._note(backward, (node,), {}, None, node.value)
        return out

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        self.op = name
        self.widest = max(self.widest, TABLE[name].error_budget if name in TABLE else 1.0)
        return super().call(name, *args, **options)

    def _look(self, op: str, args: tuple[Any, ...], given: tuple[Any, ...]) -> None:
        """Notes what an op leaves undecided, and what its parameters' gradients lose by the order of their sums."""
        mask = undecided(op, *given[2:]) if isinstance(args[0], Node) else None
        if mask is not None:
            self.kinks[id(args[0])] = mask | self.kinks.get(id(args[0]), False)
        for node, change in _pairs(args, turned(op, given) or ()):
            self.turned[id(node)] = change + self.turned.get(id(node), 0)
        names = {id(node): name for name, node in self.parameters.items()}
        for node, loss in _pairs(args, losses(op, given)):
            if id(node) in names:
                name = GRADIENT + names[id(node)]
                self.made.in_order[name] = larger(loss, self.made.in_order.get(name))

    def _keep(self, name: str, array: np.ndarray, node: Node) -> None:
        self.made.arrays[name] = self.base.to_host(array)
        self.made.ops[name] = tuple(dict.fromkeys(self.origins.get(id(node), ())))
        self.made.leeway[name] = self.leeways.get(id(node), 1.0)
        if id(node) in self.kinks:
            self.made.undecided[name] = self.kinks[id(node)]
        if id(node) in self.turned:
            self.made.turned[name] = distance(array + self.turned[id(node)], array)

    def _note(self, backward: Callable[..., Any], args: tuple[Any, ...], options: Any, saved: Any, made: Any) -> Any:
        op, leeway = self.op, self.widest

        def note(node: Node, chain: list[str]) -> None:
            self.origins.setdefault(id(node), []).extend(chain)
            self.leeways[id(node)] = max(leeway, self.leeways.get(id(node), 1.0))

        def noted(*given: Any, **options: Any) -> Any:
            outs = out if isinstance(out, tuple) else (out,)
            chain = [op, *(origin for node in outs for origin in self.origins.get(id(node), ()))]
            mapped(args, lambda node: note(node, chain))
            if self.base.backend == "numpy" and _is_double(given[0]):  # the runs that others are judged by
                self._look(op, args, given)
            return backward(*given, **options)

        out = super()._note(noted, args, options, saved, made)
        return out


class _Probes(Trace):
    """Puts a probe behind every recorded node; attention maps, which nothing is computed from, are not asked for."""

    def __init__(self, tape: _Probed) -> None:
        super().__init__("*")
        self._tape = tape

    def wants(self, name: str) -> bool:
        return not name.endswith(PROBS)

    def record(self, name: str, array: Any) -> Any:
        return self._tape.probe(COTANGENT + name, array) if isinstance(array, Node) else array


def _is_double(g: Any) -> bool:
    """Whether a cotangent, or the first one there is of several, is float64."""
    parts = g if isinstance(g, tuple) else (g,)
    return next(part.dtype for part in parts if part is not None) == np.float64


def _pairs(x: Any, changes: Any) -> Iterator[tuple[Node, Any]]:
    """(node, array) for every node in `x` and what stands in its place in `changes`."""
    if isinstance(x, Node) and changes is not None:
        yield x, changes
    elif isinstance(x, (list, tuple)) and changes is not None:
        for part, change in zip(x, changes):
            yield from _pairs(part, change)
    elif is_dataclass(x) and changes is not None:
        for f in fields(x):
            yield from _pairs(getattr(x, f.name), getattr(changes, f.name))


def model_of(job: Job, dtype: str) -> Any:
    """The NumPy reference of the job in this precision."""
    arrays = {name: np.asarray(array, dtype) for name, array in job.arrays.items()}
    return trained_network(job.config, job.task, arrays, dtype=dtype, backend="numpy")


def check_gradients(
    job: Job,
    candidate: Found,
    label: str,
    yardstick: tuple[str, Found] | None = None,
    only: str | list[str] = "*",
    heat: bool = False,
    progress: Callable[[Row], Any] | None = None,
    partial: bool = False,
    fail_fast: bool = False,
) -> Report:
    """Compares every gradient and cotangent of `candidate` with the float64 truth.

    `job` has labels (`with_labels`).  `yardstick` is (label, arrays) of another float32 implementation; without one
    NumPy's float32 takes its place.  With `partial` cotangents that the candidate does not have are left out: errors of
    its own then go back to the last one that it has.
    """
    only = [only] if isinstance(only, str) else list(only)
    start = time.monotonic()
    shapes = {name: array.shape for name, array in job.inputs.items()}
    report = Report(label, yardstick[0] if yardstick else "NumPy float32", job.config, job.task, shapes)
    double, single = model_of(job, "float64"), model_of(job, "float32")
    truth, free = model_gradients(job, double), model_gradients(job, single)
    exact, exact32 = model_gradients(job, double, candidate), model_gradients(job, single, candidate)
    theirs = yardstick[1] if yardstick else {}
    diagnosed, steady, widest, jumps = False, (0.0, 0.0), 1.0, 0
    for name, true in truth.arrays.items():
        absent = partial and name not in candidate and name.startswith(COTANGENT)
        if absent or not any(fnmatchcase(name, pattern) for pattern in only):
            continue
        row = Row(name, "missing", ops=truth.ops[name], note=f"{label} has no array of this name")
        if name in candidate:
            own = Yardstick(larger(distance(exact32.arrays[name], exact.arrays[name]), exact.in_order.get(name)))
            numpy = larger(distance(free.arrays[name], true), truth.in_order.get(name))
            if not scatters(true):
                steady = numpy
            else:  # a few numbers are right by luck now and then: the array before says what is usual here
                numpy = larger(larger(numpy, steady), own.numpy)
            widest = max(widest, truth.leeway[name])
            other = distance(theirs[name], true) if name in theirs and theirs[name].shape == true.shape else None
            yards = own, Yardstick(numpy, other)
            found, jumped = decided(candidate[name], exact.arrays[name], truth.undecided.get(name))
            jumps += jumped
            row = _row(name, found, exact.arrays[name], true, yards, (truth.leeway[name], widest))
            if row.status == "own" and name in exact.turned:
                yards = Yardstick(larger(own.numpy, exact.turned[name])), yards[1]
                row = _row(name, found, exact.arrays[name], true, yards, (truth.leeway[name], widest))
                jumps += row.status != "own"
            sound = scatters(true) and all(other.ok for other in report.rows)  # a few numbers enlarge what they inherit
            if row.status == "total" and (jumps or sound):
                row.status = "ok"
            row.ops = truth.ops[name]
            if heat and row.own is not None:
                row.heat = heat_map(candidate[name], exact.arrays[name])
            if row.status == "own" and not diagnosed:
                diagnosed = True
                row.note = diagnose(name, candidate, exact.arrays[name])
        report.add(row, progress, fail_fast)
        if report.stopped:
            break
    for name in candidate:
        known = name in truth.arrays or not name.startswith((COTANGENT, GRADIENT))
        if not known and not report.stopped and any(fnmatchcase(name, pattern) for pattern in only):
            report.rows.append(Row(name, "extra", note="the loss of this model does not depend on such an array"))
    report.seconds = time.monotonic() - start
    if jumps:
        report.notes.append(
            f"at {jumps} places a ReLU, a maximum or an absolute value lies within rounding of where its gradient "
            "jumps, and was taken on the other side; total errors behind them were not judged, nor errors of a "
            "convolution's gradients that such a ReLU explains"
        )
    if not report.rows:
        report.notes.append(f"nothing was compared: no gradient of this model matches {' '.join(only)}")
    return report


def _row(
    name: str,
    found: np.ndarray,
    exact: np.ndarray,
    true: np.ndarray,
    yards: tuple[Yardstick, Yardstick],
    leeway: tuple[float, float],
) -> Row:
    row = Row(name, "ok", found.shape, found.dtype.name)
    if found.shape != true.shape:
        row.status, row.note = "shape", f"expected shape {true.shape}, found {found.shape}"
        return row
    judge(row, found, exact, true, yards, leeway)
    return row
