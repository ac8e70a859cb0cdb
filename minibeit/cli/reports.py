"""The reports of `evaluate` and `compare`: their options, the files they are written to, and what is printed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..file_names import IMAGE_SUFFIXES
from ..text import json_text
from .inputs import check_distinct, check_output, check_outputs
from .terminal import UsageError, not_negative, note, out, positive, table

if TYPE_CHECKING:
    from ..evaluate.evaluation import ClassRow, Evaluation
    from ..evaluate.page import Words

FEW_CLASSES = 25  # more are not all printed


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """--json, --html, --worst, --workers, --seed and --quiet."""
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--html", metavar="FILE", help="write a page with all figures and the worst images")
    parser.add_argument(
        "--worst", type=not_negative, default=24, metavar="N", help="how many images to show (default 24)"
    )
    parser.add_argument(
        "--workers", type=positive, metavar="N",
        help="threads that read images while the model computes (default: one a core, at most 8)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=not_negative, default=0, metavar="N", help="of the resampling behind intervals (default 0)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no notes")


def reports(args: argparse.Namespace) -> list[Path]:
    """The files to write."""
    return [Path(file) for file in (args.json, args.html) if file]


def check_reports(args: argparse.Namespace, inputs: Sequence[str], models: Sequence[str | None]) -> None:
    """Raises UsageError for reports that would take the place of each other, of an image, or of what is read."""
    for path in reports(args):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            raise UsageError(f"{path}: expected the name of a report, such as report.html, found that of an image")
        for model in models:
            check_outputs([path], inputs, model)
        check_output(path)
    check_distinct(reports(args))


def write_reports(args: argparse.Namespace, evaluation: Evaluation, words: Words | None = None) -> None:
    """Writes the files; `words` are those of the page."""
    from ..files import atomic_write

    if args.json:
        with atomic_write(args.json) as file:
            file.write((json_text(evaluation.to_dict(), indent=1) + "\n").encode())
    if args.html:
        from ..evaluate.page import OF_A_MODEL, page

        with atomic_write(args.html) as file:
            file.write(page(evaluation, words or OF_A_MODEL).encode())


def print_figures(evaluation: Evaluation) -> None:
    """Prints the figures of all images."""
    rows = [("", "", "95% interval")]
    rows += [(figure.title, figure.shown(), figure.interval()) for figure in evaluation.figures]
    for text in table(rows, right=(1,)):
        out(text)


def print_rows(title: str, heading: str, rows: Sequence[ClassRow], unit: str) -> None:
    """Prints the figures of classes, or of whatever else a row is of, below a title; nothing where there are none."""
    if not rows:
        return
    out("")
    out(title)
    titles = [figure.title for figure in rows[0].figures]
    head = (heading, "name", unit, *(word for title in titles for word in (title, "95% interval")))
    body = [
        (str(row.index), row.name, str(row.count), *(w for f in row.figures for w in (f.shown(), f.interval())))
        for row in rows
    ]
    for text in table([head, *body], right=(0, 2, 3, 5), longest=60):
        out(f"  {text}")


def print_classes(rows: Sequence[ClassRow], unit: str, which: str = "classes") -> None:
    """Prints the figures of classes, the worst first, and of many only those."""
    shown = sorted(rows, key=lambda row: row.figures[0].value)[:FEW_CLASSES]
    few = len(shown) == len(rows)
    print_rows(
        f"{which}, worst first" if few else f"the worst {len(shown)} of {len(rows)} {which}", "class", shown, unit
    )


def print_notes(evaluation: Evaluation) -> None:
    """Says on stderr what a reader of the figures should know, and how long it took."""
    for sentence in evaluation.notes:
        note(sentence)
    rate = evaluation.images / max(evaluation.seconds, 1e-9)
    note(f"{evaluation.images} images in {evaluation.seconds:.1f} s, {rate:.2f} images/s")
