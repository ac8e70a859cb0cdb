"""The heart of the verifier: the truth, the candidate and the yardsticks advance through the network in lockstep."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ..ops.table import TABLE
from . import budget, tokens
from .budget import Yardstick
from .diagnosis import Known, diagnose, fingerprint
from .difference import distance, heat_map
from .engine_arithmetic import attended, convolved, draws
from .float64_model import Call, Log, float32_model, truth_model
from .informative import blind_spots, sentence
from .judging import Row, judge
from .low_precision import HALVES, half, imitations, stored_as
from .networks import blocks_of
from .release_memory import Unused
from .streams import RunSource, Source, Stream
from .trace_names import TOKENS, trace_shapes

SAME_OP = ("attention.key", "attention.value", "attention.context")  # made by the op of the record before
MORE_FROM_THIS_OP = ("attention.query", "attention.key", "attention.probs")
FEW_WEIGHTS, ORDERS = 1 << 18, 3  # a model of so few is run in more orders of summation: one may be a lucky one
DIAGNOSED = 5  # kinds of guilty arrays of which the first is looked into; later ones are rarely faults of their own


@dataclass
class Report:
    """All rows, in the order of the network, and what was compared with what."""

    candidate: str
    yardstick: str
    config: Any  # of a model or a tokenizer
    task: str
    inputs: dict[str, tuple[int, ...]]
    rows: list[Row] = field(default_factory=list)
    stopped: bool = False  # at the first row out of budget, as asked
    notes: list[str] = field(default_factory=list)
    only: list[str] = field(default_factory=lambda: ["*"])  # globs of the names that were judged
    precision: str | None = None  # that the candidate is allowed
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
        return next((row for row in self.rows if row.guilty), None)


@dataclass
class Job:
    """What is to be verified: the model as it should be, and the arrays of one call."""

    config: Any  # of a model or a tokenizer
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
    precision: str | None = None,
) -> Report:
    """Compares every array of `candidate` with the float64 truth, and its errors with those of float32.

    `yardstick` is another float32 implementation (PyTorch); without one NumPy's float32 run takes its place.  `only`
    are globs of the names to judge, `leave_out` of those the candidate is known not to have.  `heat` keeps heat maps.
    `first` is a row that was judged before (the pixels), `notes` go with the verdict.  With `precision`, one of
    `low_precision.PRECISIONS`, the yardstick is a run that imitates it.  Sources are closed at the end.
    Raises ValueError for a precision together with another yardstick.
    """
    if precision is not None and yardstick is not None:
        raise ValueError(f"precision: {precision} is measured by a run that imitates it, not by {yardstick.label}")
    only = [only] if isinstance(only, str) else list(only)
    leave_out = (leave_out,) if isinstance(leave_out, str) else leave_out
    report = Report(
        candidate.label,
        yardstick.label if yardstick else f"an imitation of {precision}" if precision else "NumPy float32",
        job.config,
        job.task,
        {name: array.shape for name, array in job.inputs.items()},
        only=only,
        precision=precision,
        blind=sentence(blind_spots(job.arrays), len(job.arrays)),
    )

    def wanted(name: str) -> bool:
        return _matches(name, only) and not _matches(name, leave_out)

    report.notes += notes or []
    if first is not None:
        report.rows.append(first)
    start = time.monotonic()
    run = _Run(job, candidate, yardstick, wanted, precision)
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

    def __init__(
        self,
        job: Job,
        candidate: Source,
        yardstick: Source | None,
        wanted: Callable[[str], bool],
        precision: str | None,
    ) -> None:
        self.job, self.candidate, self.yardstick, self.wanted = job, candidate, yardstick, wanted
        # Everything else is an input of what is judged; the largest arrays of all are inputs of nothing.
        names = tuple(name for name in job.shapes() if wanted(name) or not name.endswith("attention.probs"))
        self.names = names
        self.unused = Unused(job.arrays)
        self.log = Log()
        truth = truth_model(job.config, job.task, job.arrays)
        replayed = truth_model(job.config, job.task, job.arrays, self.log)
        if precision is None:
            single = free = float32_model(job.config, job.task, job.arrays)
        else:
            single, free = imitations(job.config, job.task, job.arrays, precision)
        self.truth = _stream(job, truth, names)
        self.replay = _stream(job, replayed, names)  # the truth's ops on the candidate's arrays
        self.replay32 = _stream(job, single, names)  # NumPy's float32 ops on the candidate's arrays
        # The yardstick: PyTorch and the truth's ops on its arrays; where it has none, a free run of NumPy.
        self.yard_replay = _stream(job, truth, names) if yardstick else None
        complete = yardstick is not None and set(names) <= set(yardstick.names)
        self.numpy = None if complete else _stream(job, free, names)
        few = precision is None and sum(array.size for array in job.arrays.values()) <= FEW_WEIGHTS
        orders = [float32_model(job.config, job.task, job.arrays, seed) for seed in range(ORDERS * few)]
        self.others = [_stream(job, model, names) for model in orders]
        self.found: Any = None  # the candidate's and the yardstick's arrays of the record before
        self.theirs: Any = None
        self.diagnosed: set[str] = set()
        self.precision = precision
        self.blocks = blocks_of(replayed.params)
        self.steady = 0.0, 0.0  # the yardstick's total error at the last array that is not tiny
        self.leeway = 1.0  # the widest error budget of the ops so far
        self.calls: list[Call] = []  # of the last record that an op made
        self.gap: set[str] = set()  # ops of arrays that the candidate lacks, since the last one that it has
        self.since = "input"  # the last array that it has
        self.before: Any = None  # the candidate's array before this one
        self.value: Any = None  # the candidate's values, until its context has come
        self.states: dict[str, np.ndarray] = {}  # fingerprints of the candidate's hidden states
        self.sound = False  # whether the array before was judged and is within budget
        self.measured = False  # whether engines' ways of a convolution were, so that it needs no leeway
        self.undecided = 0.0  # how far apart two logits of the array before may be and be exchanged by rounding
        # A choice between numbers that are nearly equal has no error budget: all runs go on with the candidate's.
        self.chosen: Any = None

    def close(self) -> None:
        runs = (self.truth, self.replay, self.replay32, self.yard_replay, self.numpy, *self.others, self.candidate)
        for stream in runs:
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
        self.found = found = tokens.whole(self.candidate.take(name)) if name == TOKENS else self.candidate.take(name)
        self.unused.give_back()
        their_exact = _next(self.yard_replay, their_before) if self.yard_replay else None
        exact = _next(self.replay, before)
        truth = _next(self.truth, self.chosen)
        free = [_next(run, self.chosen) for run in ([self.numpy] if self.numpy else []) + self.others]
        single = _next(self.replay32, before if before is None or self.chosen is not None else _single(before))
        if theirs is not None and theirs.shape != truth.shape:
            label = self.yardstick.label if self.yardstick else ""
            raise ValueError(f"{name}: {label} gives shape {theirs.shape}, expected {truth.shape}")
        self._take_calls(name)
        row = None
        other = convolved(self.calls) if self.precision is None and self.wanted(name) else None
        self.measured = other is not None
        if other is not None and distance(other, exact) > distance(single, exact):
            single = other
        if name.endswith("logits"):
            self.undecided = tokens.undecided(found, exact, single, self.candidate.dtypes.get(name))
        if self.precision in HALVES and found is not None and self._is_stored(name, found):
            single = half(single, self.precision)
        if self.wanted(name):
            yards = self._yards(single, exact, free, truth, theirs, their_exact)
            row = self._row(name, found, exact, truth, yards, single, heat)
            if row.status == "total" and self.sound and budget.scatters(truth):
                row.status = "ok"  # right inputs and a right op: a few numbers cancel, and enlarge what they inherit
        self.sound = row is not None and row.own is not None and row.ok
        if found is not None and not self._fits(name, found, truth):
            self.found = None
        self._mind_the_gap(name)
        self._remember(name)
        return row

    def _fits(self, name: str, found: np.ndarray, truth: np.ndarray) -> bool:
        """Whether a run can go on with this array."""
        if name == TOKENS:
            return tokens.usable(found, truth.shape, self.job.config.vocab_size)
        return found.shape == truth.shape

    def _is_stored(self, name: str, found: np.ndarray) -> bool:
        """Whether the candidate keeps this array in its low precision."""
        return self.precision in (self.candidate.dtypes.get(name), found.dtype.name, stored_as(found))

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
        self.chosen = self.found if name == TOKENS else None
        if not name.endswith(MORE_FROM_THIS_OP):
            self.calls = []
        if name.endswith("attention.value"):
            self.value = self.found
        elif name.endswith("attention.context"):
            self.value = None
        if self.found is not None and (name == "embeddings" or name.endswith(".output")) and self.found.ndim == 3:
            self.states[name] = fingerprint(self.found)

    def _yards(
        self, single: Any, exact: Any, free: list[Any], truth: Any, theirs: Any, their_exact: Any
    ) -> tuple[Yardstick, Yardstick]:
        numpy_own = distance(single, exact)
        # One vector, or a few large probabilities, are one draw, and NumPy's a lucky one.
        for drawn in itertools.chain(draws(self.calls), attended(self.calls, exact.ndim == 4)):
            numpy_own = larger(numpy_own, distance(drawn.reshape(exact.shape), exact))
        total = first = distance(free[0] if theirs is None else theirs, truth)
        for other in free:
            total = larger(total, distance(other, truth))
        if not budget.scatters(truth):
            self.steady = total
        else:  # a few numbers are right by luck now and then: the array before says what is usual here
            total = larger(larger(total, self.steady), numpy_own)
        if theirs is None:
            return Yardstick(numpy_own), Yardstick(total)
        return Yardstick(numpy_own, distance(theirs, their_exact)), Yardstick(total, first)

    def _row(
        self,
        name: str,
        found: Any,
        exact: Any,
        truth: Any,
        yards: tuple[Yardstick, Yardstick],
        single: Any,
        heat: bool,
    ) -> Row:
        ops = tuple(dict.fromkeys(call.op for call in self.calls if TABLE[call.op].is_arithmetic))
        if found is None:
            return Row(name, "missing", ops=ops, note=f"{self.candidate.label} has no array of this name")
        since = self.since if self.gap else ""
        row = Row(name, "ok", found.shape, self.candidate.dtypes.get(name, found.dtype.name), ops, since)
        if name == TOKENS:
            call = next(call for call in self.calls if call.op == "argmax_channels")
            tokens.judge(row, found, call.wide_args()[0], truth, self.undecided)
            if row.status == "own":
                row.note += "; " + diagnose(name, found, exact, self.calls)
            return row
        if found.shape != truth.shape:
            row.status, row.note = "shape", f"expected shape {truth.shape}, found {found.shape}"
            return row
        leeway = max((TABLE[op].error_budget for op in {*row.ops, *self.gap}), default=1.0)
        self.leeway = max(self.leeway, leeway)
        if self.measured and not self.gap:
            leeway = 1.0
        held_to = "float32" if self.precision else None
        slices = None if self.precision == "int8" else single  # a scale for several features is coarse for the small
        judge(row, found, exact, truth, yards, (leeway, self.leeway), slices, held_to)
        if row.status == "own" and name.endswith("context") and self._follows(found, row):
            row.status, row.note = "total", "it is what the probabilities before it give"
        if row.status == "yardstick" and self.yardstick:
            row.note = f"{self.yardstick.label} {row.note}"
        if heat:
            row.heat = heat_map(found, exact)
        kind = re.sub(r"\d+", "*", name)
        if row.status in ("own", "nan") and kind not in self.diagnosed and len(self.diagnosed) < DIAGNOSED:
            self.diagnosed.add(kind)
            known = Known(self.before, self.states, self.blocks, self._noise(row), self.precision)
            row.note = diagnose(name, found, exact, self.calls, known, row.slice) or row.note
        return row

    def _follows(self, found: np.ndarray, row: Row) -> bool:
        """Whether a context out of budget is the product of the candidate's own probabilities and values."""
        probs = self.before
        if self.value is None or probs is None or probs.ndim != 4 or not np.isfinite(found).all():
            return False
        product = probs.astype(np.float64) @ self.value.astype(np.float64)
        context = product.transpose(0, 2, 1, 3).reshape(found.shape)
        return distance(found, context)[0] <= row.own_limit

    @staticmethod
    def _noise(row: Row) -> float:
        """What rounding leaves in this array, an rms."""
        if row.own is None or row.own_yard is None:
            return 0.0
        return max(row.own_yard.rms, budget.FLOOR * budget.EPS32) * row.own.rms_truth

    def _extra(self) -> Iterator[Row]:
        for name in self.candidate.names:
            if name not in self.names and not name.startswith("input.") and self.wanted(name):
                yield Row(name, "extra", note="the model of this config and task makes no array of this name")


def _matches(name: str, patterns: list[str] | tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def larger(a: tuple[float, float], b: tuple[float, float] | None) -> tuple[float, float]:
    """The larger rms and the larger peak of two errors; `a` where there is no other."""
    return a if b is None else (max(a[0], b[0]), max(a[1], b[1]))


def _single(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32, copy=False)


def _next(stream: Stream, reply: Any = None) -> Any:
    item = stream.advance(reply)
    assert item is not None, "all runs of one model record the same names"
    return item[1]


def _stream(job: Job, model: Any, names: tuple[str, ...]) -> Stream:
    return Stream(lambda trace: model(**job.inputs, trace=trace), names)
