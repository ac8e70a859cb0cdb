"""A report as text: the live table, the verdict, Markdown and JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from ..text import json_text, one_line, shown_name
from ..text import markdown as md
from .difference import ULP_EDGES, Difference
from .judging import Row
from .lockstep import Report

STATUS = {
    "ok": "ok",
    "own": "GUILTY",
    "total": "inherits",
    "shape": "SHAPE",
    "missing": "MISSING",
    "extra": "EXTRA",
    "nan": "NAN",
    "nan on both sides": "NAN BOTH",
    "yardstick": "DIFFERS",
}
LONGEST_VERDICT = 4000  # characters
KINDS_SHOWN = 5
HEADER = f"{'array':44} {'own error':>10} {'x':>6} {'total':>10} {'x':>6}  verdict"


def line(row: Row) -> str:
    """One row of the terminal's table: relative rms errors, each in units of the yardstick's."""
    if row.own is None or row.total is None:
        return f"{shown_name(row.name):44} {'':>35}  {STATUS[row.status]}"
    own, total = (
        f"{row.own.rms_rel:10.1e} {times(row.own_ratio)}",
        f"{row.total.rms_rel:10.1e} {times(row.total_ratio)}",
    )
    return f"{shown_name(row.name):44} {own} {total}  {STATUS[row.status]}"


def times(ratio: float) -> str:
    """A ratio in six places."""
    return f"{ratio:6.1f}" if ratio < 1000 else f"{ratio:6.0e}".rjust(6)


def verdict(report: Report) -> str:
    """What the comparison says, in a few sentences."""
    if not report.rows:
        return one_line(f"FAIL: {report.notes[0] if report.notes else 'nothing was compared'}")
    said = " ".join([_praise(report) if report.ok else _blame(report), *_coverage(report)])
    warning = f" But {report.blind}." if report.blind and report.ok else ""
    return one_line(" ".join([said + warning, *(f"Note: {text}." for text in report.notes)]), LONGEST_VERDICT)


def _praise(report: Report) -> str:
    compared = [row for row in report.compared if not row.is_choice] or report.compared
    last, worst = compared[-1], max(compared, key=lambda row: row.own_ratio)
    ok = "OK, as far as these weights can show" if report.blind else "OK"
    count = len(report.compared)
    return (
        f"{ok}: {count} arrays of {report.candidate} are within the error budget. At the end ({last.name}) it "
        f"is {last.total_ratio:.1f}x as far from the truth as {report.yardstick}, {last.total.rms_rel:.1e} relative; "  # type: ignore[union-attr]
        f"no single op is more than {worst.own_ratio:.1f}x ({worst.name})."
    )


def _blame(report: Report) -> str:
    guilty = report.guilty
    if not report.compared and guilty is None:
        return f"FAIL: nothing was compared: {report.candidate} has no array of this model."
    if guilty is None:
        row = next(row for row in report.rows if not row.ok)
        if row.status == "yardstick":
            return f"FAIL: {row.name}: {row.note}."
        return (
            f"FAIL: no array that was judged is out of budget by itself, but {row.name} is {row.total_ratio:.1f}x as "
            f"far from the truth as {report.yardstick}: {_between(row, report)}."
        )
    sentences = [f"FAIL: the first array with an error of its own is {guilty.name}{_made_by(guilty, report)}."]
    if guilty.own is not None:
        limit = guilty.own_limit / guilty.own.rms_rel * guilty.own_ratio if guilty.own.rms_rel else math.nan
        sentences.append(
            f"Fed with its own inputs it is {guilty.own.rms_rel:.1e} from the float64 result, "
            f"{times(guilty.own_ratio).strip()}x as far as {report.yardstick}; the budget is {limit:.1f}x."
            if math.isfinite(guilty.own.rms_rel)
            else "It is not finite."
        )
        if guilty.slice is not None:
            sentences.append(
                f"That is within it, but in one slice, the worst, the error is {times(guilty.slice.ratio).strip()}x as "
                "large as rounding leaves there."
            )
        elif guilty.own.rms_rel <= guilty.own_limit:
            sentences.append(f"That is within it, but single elements are far off: {worst(guilty.own)}.")
    if guilty.note:
        sentences.append(f"Diagnosis: {guilty.note}.")
    others = [row for row in report.rows if row.status == "own" and row is not guilty]
    if others:
        some = ", ".join(row.name for row in others[:3]) + (" ..." if len(others) > 3 else "")
        sentences.append(f"{len(others)} later arrays have errors of their own as well: {some}.")
    inherits = sum(row.status == "total" for row in report.rows)
    if inherits:
        sentences.append(f"{inherits} arrays only inherit it.")
    if report.stopped:
        sentences.append("Stopped there, as asked.")
    return " ".join(sentences)


def _between(row: Row, report: Report) -> str:
    """Where the error of an array without a guilty one before it must have come from."""
    if report.only == ["*"]:
        return "small errors of many ops that add up"
    before = report.rows[: report.rows.index(row)]
    last = next((other.name for other in reversed(before) if other.ok and other.total is not None), "the input")
    return f"the fault lies between {last} and it, in arrays that --only {' '.join(report.only)} leaves out"


def _coverage(report: Report) -> Iterator[str]:
    """What was not looked at."""
    for status, text in (("missing", "are not in it"), ("extra", "of it are none of this model's")):
        names = [row.name for row in report.rows if row.status == status]
        if names:
            kinds = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))
            some = ", ".join(kinds[:KINDS_SHOWN]) + (" ..." if len(kinds) > KINDS_SHOWN else "")
            yield f"Note: {len(names)} arrays {text}: {some}."
    own = [row for row in report.rows if row.status != "extra"]
    if report.compared and own[-1].own is None and own[-1].status == "missing":
        yield f"Nothing after {report.compared[-1].name} was looked at."


def _made_by(row: Row, report: Report) -> str:
    if row.since:
        return f", or one of those between {row.since} and it, which are not there"
    if not row.ops:
        return ""
    return " (" + ", ".join(f"{op} of {report.origins[op]}" if op in report.origins else op for op in row.ops) + ")"


def markdown(report: Report) -> str:
    """The report as a Markdown document."""
    rows = "\n".join(_markdown_row(row) for row in report.rows)
    return f"""# minibeit verify: {md(report.candidate)}

{md(verdict(report))}

- yardstick: {md(report.yardstick)}
- model: {md(report.task)}, {md(", ".join(f"{name} {list(shape)}" for name, shape in report.inputs.items()))}
{_notes(report)}
Errors are root mean squares relative to the float64 truth's; `x` is in units of the yardstick's error.
Own: the float64 op on the same inputs. Total: the float64 run of the whole network.

| array | shape | own | x | total | x | largest difference | verdict |
|---|---|---:|---:|---:|---:|---|---|
{rows}
"""


def _notes(report: Report) -> str:
    said = [*report.notes, *([report.blind] if report.blind else [])]
    return "".join(f"- {md(text)}\n" for text in said)


def _markdown_row(row: Row) -> str:
    shape = "x".join(map(str, row.shape))
    note = f": {md(row.note)}" if row.note else ""
    if row.own is None or row.total is None:
        return f"| {md(row.name)} | {shape} | | | | | | {STATUS[row.status]}{note} |"
    return (
        f"| {md(row.name)} | {shape} | {row.own.rms_rel:.1e} | {row.own_ratio:.1f} | {row.total.rms_rel:.1e} | "
        f"{row.total_ratio:.1f} | {md(worst(row.own))} | {STATUS[row.status]}{note} |"
    )


def worst(d: Difference) -> str:
    """Where two arrays differ most, with both values."""
    if not d.size or d.max_abs == 0:
        return "none"
    at = ", ".join(map(str, d.worst))
    return f"{d.max_abs:.2e} at [{at}]: {d.worst_found:.9g} for {d.worst_truth:.9g}"


def as_json(report: Report) -> str:
    """Everything that was measured, as JSON; numbers that are not finite become null."""
    rows = [_row_dict(row) for row in report.rows]
    values = {
        "ok": report.ok,
        "verdict": verdict(report),
        "candidate": report.candidate,
        "yardstick": report.yardstick,
        "task": report.task,
        "config": report.config.to_dict(),
        "inputs": {name: list(shape) for name, shape in report.inputs.items()},
        "origins": report.origins,
        "notes": report.notes,
        "hidden_by_weights": report.blind,
        "guilty": [row.name for row in report.rows if row.guilty],
        "precision": report.precision,
        "seconds": round(report.seconds, 2),
        "ulp_edges": list(ULP_EDGES),
        "rows": rows,
    }
    return json_text(values, indent=1) + "\n"


def _row_dict(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "status": row.status,
        "note": row.note,
        "shape": list(row.shape),
        "dtype": row.dtype,
        "ops": list(row.ops),
        "since": row.since,
        "own": None if row.own is None else vars(row.own),
        "total": None if row.total is None else vars(row.total),
        "inherited": row.inherited,
        "own_yardstick": None if row.own_yard is None else vars(row.own_yard),
        "total_yardstick": None if row.total_yard is None else vars(row.total_yard),
        "own_ratio": row.own_ratio,
        "own_limit": row.own_limit,
        "slice": None if row.slice is None else vars(row.slice),
        "total_ratio": row.total_ratio,
        "total_limit": row.total_limit,
    }
