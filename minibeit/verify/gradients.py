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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ..ops import GPU_BACKENDS
from ..params import flatten
from ..tape import Node, Tape, mapped
from ..tasks import task_class
from ..trace import Trace
from ..train.gradients import placed, recorded
from .budget import Yardstick
from .difference import distance, heat_map
from .gradient_diagnosis import diagnose
from .judging import Row, judge
from .lockstep import Job, Report
from .trace_names import trace_shapes

COTANGENT, GRADIENT = "cotangent.", "gradient."
PROBS = "attention.probs"  # nothing is computed from attention maps
LOSSES = ("image_classification", "masked_image_modeling", "semantic_segmentation")
Found = Mapping[str, np.ndarray]


@dataclass
class GradientJob(Job):
    """What is to be verified when it is gradients; the inputs have labels."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of all cotangents, in the order of the forward, and of the gradients of all parameters."""
        inputs = {name: array.shape for name, array in self.inputs.items() if name != "labels"}
        recorded = trace_shapes(self.config, self.task, inputs)
        shapes = {COTANGENT + name: shape for name, shape in recorded.items() if not name.endswith(PROBS)}
        learned = {name: array.shape for name, array in self.arrays.items() if ".running_" not in name}
        return shapes | {GRADIENT + name: shape for name, shape in learned.items()}


def with_labels(job: Job, seed: int = 0) -> GradientJob:
    """`job` with seeded random labels among its inputs, where it has none.

    Raises ValueError for a task without a loss of its own.
    """
    if job.task not in LOSSES:
        raise ValueError(f"gradients: expected a task with a loss ({', '.join(LOSSES)}), found {job.task}")
    if "labels" in job.inputs:
        return GradientJob(job.config, job.task, job.arrays, job.inputs)
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


@dataclass
class Made:
    """What one backward made: arrays by name in the order of the backward, and the ops that each came from."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    ops: dict[str, tuple[str, ...]] = field(default_factory=dict)


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
        return super().call(name, *args, **options)

    def _keep(self, name: str, array: np.ndarray, node: Node) -> None:
        self.made.arrays[name] = self.base.to_host(array)
        self.made.ops[name] = tuple(dict.fromkeys(self.origins.get(id(node), ())))

    def _note(self, backward: Callable[..., Any], args: tuple[Any, ...], options: Any, saved: Any, made: Any) -> Any:
        op = self.op

        def noted(*given: Any, **options: Any) -> Any:
            outs = out if isinstance(out, tuple) else (out,)
            chain = [op, *(origin for node in outs for origin in self.origins.get(id(node), ()))]
            mapped(args, lambda node: self.origins.setdefault(id(node), []).extend(chain))
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


def model_of(job: Job, dtype: str) -> Any:
    """The NumPy reference of the job in this precision."""
    arrays = {name: np.asarray(array, dtype) for name, array in job.arrays.items()}
    return task_class(job.task)(job.config, arrays=arrays, dtype=dtype, backend="numpy")


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
    diagnosed = False
    for name, true in truth.arrays.items():
        absent = partial and name not in candidate and name.startswith(COTANGENT)
        if absent or not any(fnmatchcase(name, pattern) for pattern in only):
            continue
        row = Row(name, "missing", ops=truth.ops[name], note=f"{label} has no array of this name")
        if name in candidate:
            own = Yardstick(distance(exact32.arrays[name], exact.arrays[name]))
            numpy = distance(free.arrays[name], true)
            other = distance(theirs[name], true) if name in theirs and theirs[name].shape == true.shape else None
            row = _row(name, candidate[name], exact.arrays[name], true, (own, Yardstick(numpy, other)))
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
    if not report.rows:
        report.notes.append(f"nothing was compared: no gradient of this model matches {' '.join(only)}")
    return report


def _row(name: str, found: np.ndarray, exact: np.ndarray, true: np.ndarray, yards: tuple[Yardstick, Yardstick]) -> Row:
    row = Row(name, "ok", found.shape, found.dtype.name)
    if found.shape != true.shape:
        row.status, row.note = "shape", f"expected shape {true.shape}, found {found.shape}"
        return row
    judge(row, found, exact, true, yards)
    return row
