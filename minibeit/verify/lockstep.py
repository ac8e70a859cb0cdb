"""The heart of the verifier: the truth, the candidate and the yardsticks advance through the network in lockstep."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ..config import BeitConfig
from ..ops.table import TABLE
from . import budget
from .budget import Yardstick
from .diagnosis import diagnose, fingerprint
from .difference import Difference, difference, distance, heat_map
from .engine_arithmetic import draws
from .float64_model import Call, Log, float32_model, truth_model
from .informative import blind_spots, sentence
from .release_memory import Unused
from .streams import RunSource, Source, Stream
from .trace_names import trace_shapes

SAME_OP = ("attention.key", "attention.value", "attention.context")  # made by the op of the record before
MORE_FROM_THIS_OP = ("attention.query", "attention.key", "attention.probs")
NOTED = ("missing", "extra")  # not compared, which convicts nobody: what is there is judged over longer steps
DIAGNOSED = 3  # guilty arrays that are looked into; later ones are rarely faults of their own


@dataclass
class Row:
    """One recorded array: what was found and what it means.

    `status`: "ok"; "own" (its own error is out of budget); "total" (only what it inherits is); "shape" (it could not be
    compared); "missing" and "extra" (the same, and no fault); "nan"; "nan on both sides"; "yardstick" (PyTorch departs
    from the reference).
    """

    name: str
    status: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    ops: tuple[str, ...] = ()  # the ops that made it
    since: str = ""  # the array from which the truth started, where the candidate lacks some between; "input" at first
    own: Difference | None = None
    total: Difference | None = None
    inherited: float = math.nan  # relative rms: the truth's op on the candidate's inputs beside the truth
    own_yard: Yardstick | None = None
    total_yard: Yardstick | None = None
    own_limit: float = math.nan
    total_limit: float = math.nan
    own_ratio: float = math.nan  # times the yardstick's error
    total_ratio: float = math.nan
    note: str = ""
    heat: np.ndarray | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok" or self.status in NOTED


@dataclass
class Report:
    """All rows, in the order of the network, and what was compared with what."""

    candidate: str
    yardstick: str
    config: BeitConfig
    task: str
    inputs: dict[str, tuple[int, ...]]
    rows: list[Row] = field(default_factory=list)
    stopped: bool = False  # at the first row out of budget, as asked
    notes: list[str] = field(default_factory=list)
    blind: str = ""  # what these weights cannot show, a sentence
    seconds: float = 0.0
    origins: dict[str, str] = field(default_factory=dict)  # op -> the code that serves it

    def add(self, row: Row, progress: Callable[[Row], Any] | None, fail_fast: bool) -> None:
        """Appends a row and tells `progress`; with `fail_fast` the first that is not ok sets `stopped`."""
        self.rows.append(row)
        if progress is not None:
            progress(row)
        self.stopped = self.stopped or (fail_fast and not row.ok)

    @property
    def ok(self) -> bool:
        """Whether something was compared and all of it is within budget."""
        return bool(self.compared) and all(row.ok for row in self.rows)

    @property
    def compared(self) -> list[Row]:
        """The rows with numbers."""
        return [row for row in self.rows if row.own is not None]

    @property
    def guilty(self) -> Row | None:
        """The first array whose own error is out of budget, or that could not be compared."""
        return next((row for row in self.rows if not row.ok and row.status not in ("total", "yardstick")), None)


@dataclass
class Job:
    """What is to be verified: the model as it should be, and the arrays of one call."""

    config: BeitConfig
    task: str
    arrays: Mapping[str, np.ndarray]  # float32 weights by canonical name
    inputs: Mapping[str, np.ndarray]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of everything the call records."""
        return trace_shapes(self.config, self.task, {name: array.shape for name, array in self.inputs.items()})


def model_source(job: Job, model: Any, label: str, leave_out: str | tuple[str, ...] = ()) -> RunSource:
    """A minibeit model as a source, with the names of its own config and head but those that `leave_out` matches."""
    inputs = {name: array.shape for name, array in job.inputs.items()}
    patterns = (leave_out,) if isinstance(leave_out, str) else leave_out
    chosen = [name for name in trace_shapes(model.config, model.task, inputs) if not _matches(name, patterns)]
    return RunSource(label, chosen, lambda trace: model(**job.inputs, trace=trace))


def check(
    job: Job,
    candidate: Source,
    yardstick: Source | None = None,
    only: str | list[str] = "*",
    fail_fast: bool = False,
    heat: bool = False,
    progress: Callable[[Row], Any] | None = None,
    leave_out: str | tuple[str, ...] = (),
    first: Row | None = None,
    notes: list[str] | None = None,
) -> Report:
    """Compares every array of `candidate` with the float64 truth, and its errors with those of float32.

    `yardstick` is another float32 implementation (PyTorch); without one NumPy's float32 run takes its place.  `only`
    are globs of the names to judge, `leave_out` of those the candidate is known not to have.  `heat` keeps heat maps.
    `first` is a row that was judged before (the pixels), `notes` go with the verdict.  Sources are closed at the end.
    """
    only = [only] if isinstance(only, str) else list(only)
    leave_out = (leave_out,) if isinstance(leave_out, str) else leave_out
    report = Report(
        candidate.label,
        yardstick.label if yardstick else "NumPy float32",
        job.config,
        job.task,
        {name: array.shape for name, array in job.inputs.items()},
        blind=sentence(blind_spots(job.arrays), len(job.arrays)),
    )

    def wanted(name: str) -> bool:
        return _matches(name, only) and not _matches(name, leave_out)

    report.notes += notes or []
    if first is not None:
        report.rows.append(first)
    start = time.monotonic()
    run = _Run(job, candidate, yardstick, wanted)
    try:
        for row in run.rows(heat):
            report.add(row, progress, fail_fast)
            if report.stopped:
                break
    finally:
        run.close()
    report.seconds = time.monotonic() - start
    if not report.rows:
        report.notes.append(f"nothing was compared: no name of this model matches {' '.join(only)}")
    return report


class _Run:
    """All runs in lockstep."""

    def __init__(self, job: Job, candidate: Source, yardstick: Source | None, wanted: Callable[[str], bool]) -> None:
        self.job, self.candidate, self.yardstick, self.wanted = job, candidate, yardstick, wanted
        # Everything else is an input of what is judged; the largest arrays of all are inputs of nothing.
        names = tuple(name for name in job.shapes() if wanted(name) or not name.endswith("attention.probs"))
        self.names = names
        self.unused = Unused(job.arrays)
        self.log = Log()
        truth = truth_model(job.config, job.task, job.arrays)
        replayed = truth_model(job.config, job.task, job.arrays, self.log)
        single = float32_model(job.config, job.task, job.arrays)
        self.truth = _stream(job, truth, names)
        self.replay = _stream(job, replayed, names)  # the truth's ops on the candidate's arrays
        self.replay32 = _stream(job, single, names)  # NumPy's float32 ops on the candidate's arrays
        # The yardstick: PyTorch and the truth's ops on its arrays; where it has none, a free run of NumPy.
        self.yard_replay = _stream(job, truth, names) if yardstick else None
        complete = yardstick is not None and set(names) <= set(yardstick.names)
        self.numpy = None if complete else _stream(job, single, names)
        self.found: Any = None  # the candidate's and the yardstick's arrays of the record before
        self.theirs: Any = None
        self.diagnosed = 0
        self.steady = 0.0, 0.0  # the yardstick's total error at the last array that is not tiny
        self.leeway = 1.0  # the widest error budget of the ops so far
        self.calls: list[Call] = []  # of the last record that an op made
        self.gap: set[str] = set()  # ops of arrays that the candidate lacks, since the last one that it has
        self.since = "input"  # the last array that it has
        self.before: Any = None  # the candidate's array before this one
        self.states: dict[str, np.ndarray] = {}  # fingerprints of the candidate's hidden states

    def close(self) -> None:
        for stream in (self.truth, self.replay, self.replay32, self.yard_replay, self.numpy, self.candidate):
            if stream is not None:
                stream.close()
        if self.yardstick is not None:
            self.yardstick.close()

    def rows(self, heat: bool) -> Iterator[Row]:
        for name in self.names:
            row = self._step(name, heat)
            if row is not None:
                yield row
        yield from self._extra()

    def _step(self, name: str, heat: bool) -> Row | None:
        """Takes every run to its array of that name; the replays go on with the arrays of the record before.

        The order is that of what the runs need beside their results, so that the largest come before many are alive.
        """
        before, their_before = self.found, self.theirs
        self.unused.give_back()
        self.theirs = theirs = self.yardstick.take(name) if self.yardstick else None
        self.found = found = self.candidate.take(name)
        self.unused.give_back()
        their_exact = _next(self.yard_replay, their_before) if self.yard_replay else None
        exact = _next(self.replay, before)
        truth = _next(self.truth)
        free = _next(self.numpy) if self.numpy else None
        single = _next(self.replay32, None if before is None else before.astype(np.float32, copy=False))
        if theirs is not None and theirs.shape != truth.shape:
            label = self.yardstick.label if self.yardstick else ""
            raise ValueError(f"{name}: {label} gives shape {theirs.shape}, expected {truth.shape}")
        self._take_calls(name)
        row = None
        if self.wanted(name):
            yards = self._yards(single, exact, free, truth, theirs, their_exact)
            row = self._row(name, found, exact, truth, yards, heat)
        if found is not None and found.shape != truth.shape:
            self.found = None
        self._mind_the_gap(name)
        self._remember(name)
        return row

    def _take_calls(self, name: str) -> None:
        calls = self.log.take()
        if calls or not name.endswith(SAME_OP):
            self.calls = calls

    def _mind_the_gap(self, name: str) -> None:
        if self.found is None:
            self.gap |= {call.op for call in self.calls}
        else:
            self.gap, self.since = set(), name

    def _remember(self, name: str) -> None:
        self.before = self.found
        if not name.endswith(MORE_FROM_THIS_OP):
            self.calls = []
        if self.found is not None and (name == "embeddings" or name.endswith(".output")):
            self.states[name] = fingerprint(self.found)

    def _yards(
        self, single: Any, exact: Any, free: Any, truth: Any, theirs: Any, their_exact: Any
    ) -> tuple[Yardstick, Yardstick]:
        numpy_own = distance(single, exact)
        for drawn in draws(self.calls):  # one vector is one draw, and NumPy's a lucky one
            numpy_own = _larger(numpy_own, distance(drawn.reshape(exact.shape), exact))
        total = distance(free if theirs is None else theirs, truth)
        if truth.size >= budget.FEW:
            self.steady = total
        else:  # a few numbers are right by luck now and then: the array before says what is usual here
            total = _larger(total, self.steady)
        if theirs is None:
            return Yardstick(numpy_own), Yardstick(total)
        return Yardstick(numpy_own, distance(theirs, their_exact)), Yardstick(total, total)

    def _row(
        self, name: str, found: Any, exact: Any, truth: Any, yards: tuple[Yardstick, Yardstick], heat: bool
    ) -> Row:
        ops = tuple(dict.fromkeys(call.op for call in self.calls if TABLE[call.op].is_arithmetic))
        if found is None:
            return Row(name, "missing", ops=ops, note=f"{self.candidate.label} has no array of this name")
        since = self.since if self.gap else ""
        row = Row(name, "ok", found.shape, self.candidate.dtypes.get(name, found.dtype.name), ops, since)
        if found.shape != truth.shape:
            row.status, row.note = "shape", f"expected shape {truth.shape}, found {found.shape}"
            return row
        leeway = max((TABLE[op].error_budget for op in {*row.ops, *self.gap}), default=1.0)
        self.leeway = max(self.leeway, leeway)
        judge(row, found, exact, truth, yards, (leeway, self.leeway))
        if row.status == "yardstick" and self.yardstick:
            row.note = f"{self.yardstick.label} {row.note}"
        if heat:
            row.heat = heat_map(found, exact)
        if row.status in ("own", "nan") and self.diagnosed < DIAGNOSED:
            self.diagnosed += 1
            row.note = diagnose(name, found, exact, self.calls, self.before, self.states) or row.note
        return row

    def _extra(self) -> Iterator[Row]:
        for name in self.candidate.names:
            if name not in self.names and not name.startswith("input.") and self.wanted(name):
                yield Row(name, "extra", note="the model of this config and task makes no array of this name")


def judge(
    row: Row,
    found: np.ndarray,
    exact: np.ndarray,
    truth: np.ndarray,
    yards: tuple[Yardstick, Yardstick],
    leeway: tuple[float, float] = (1.0, 1.0),
) -> None:
    """Gives `row` its numbers and status: `found` beside `exact`, the float64 op on the candidate's own inputs, and
    beside `truth`, the float64 run.

    `yards` and `leeway`, factors of the budget, are those of the own and of the total error.
    """
    row.own, row.total = difference(found, exact), difference(found, truth)
    row.inherited = distance(exact, truth)[0]
    row.own_yard, row.total_yard = yards
    row.own_limit = budget.own_limit(row.own_yard, found.size, row.dtype, leeway[0])
    row.own_ratio = budget.ratio(row.own.rms_rel, row.own_yard.shown, found.size, row.dtype)
    row.total_limit = budget.total_limit(row.total_yard, found.size, row.dtype, leeway[1])
    row.total_ratio = budget.ratio(row.total.rms_rel, row.total_yard.shown, found.size, row.dtype)
    if not row.own.finite:
        _judge_special(row, row.own)
    elif row.own.rms_rel > row.own_limit or row.own.peak_rel > budget.peak_limit(row.own_yard, row.dtype, leeway[0]):
        row.status = "own"
    elif row.own_yard.suspicious:
        row.status = "yardstick"
        row.note = (
            f"itself departs from the float64 reference here by {row.own_yard.shown:.1e}, more than rounding can: "
            "the two define this step differently"
        )
    elif row.total.rms_rel > row.total_limit:
        row.status = "total"


def _judge_special(row: Row, d: Difference) -> None:
    if (d.nan_found, d.inf_found) == (d.nan_truth, d.inf_truth):
        row.status = "nan on both sides"
        row.note = (
            f"{d.nan_found} NaN and {d.inf_found} infinite values on both sides: weights or input are not finite, "
            "so nothing can be said about the implementation"
        )
    else:
        row.status = "nan"
        row.note = (
            f"{d.nan_found} NaN and {d.inf_found} infinite values where the float64 op has {d.nan_truth} and "
            f"{d.inf_truth}: an overflow, a division by zero or memory that was never written"
        )


def _matches(name: str, patterns: list[str] | tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _larger(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return max(a[0], b[0]), max(a[1], b[1])


def _next(stream: Stream, reply: Any = None) -> Any:
    item = stream.advance(reply)
    assert item is not None, "all runs of one model record the same names"
    return item[1]


def _stream(job: Job, model: Any, names: tuple[str, ...]) -> Stream:
    return Stream(lambda trace: model(**job.inputs, trace=trace), names)
