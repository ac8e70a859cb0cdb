"""What all commands share towards the terminal: results on stdout, everything else on stderr, one line each."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
MANY = 16  # from so many files on there is a progress bar


class UsageError(ValueError):
    """The command was called wrongly: exit code 2."""


def one_line(text: Any) -> str:
    """`text` as one line without control characters, which names and labels of strangers may hold."""
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in words)


def out(line: str) -> None:
    """Prints a line of results, past a progress bar if there is one."""
    _print(line, sys.stdout)


def note(message: str) -> None:
    """Prints one line to stderr, with the name of the program."""
    _print(f"minibeit: {one_line(message)}", sys.stderr)


def _print(line: str, stream: Any) -> None:
    if "tqdm" in sys.modules and sys.stderr.isatty():
        sys.modules["tqdm"].tqdm.write(line, file=stream)
    else:
        print(line, file=stream)


def progress(items: list[Item], quiet: bool) -> Iterator[Item]:
    """The items, with a progress bar on stderr when they are many."""
    if quiet or len(items) < MANY:
        yield from items
        return
    from tqdm import tqdm

    if sys.stderr.isatty():
        yield from tqdm(items, file=sys.stderr, unit="file", leave=False)
    else:
        yield from tqdm(items, file=_Lines(), unit="file", mininterval=10.0)


class _Lines:
    """Where no line can be overwritten, as in a log, each state of a progress bar is a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def print_json(value: Any) -> None:
    """One JSON document; numbers keep every digit."""
    out(json.dumps(value, ensure_ascii=False, indent=2))


def print_json_list(rows: Iterable[dict[str, Any]]) -> None:
    """A JSON array with one line per element, printed as the elements come."""
    last = None
    out("[")
    for row in rows:
        if last is not None:
            out(last + ",")
        last = json.dumps(row, ensure_ascii=False)
    if last is not None:
        out(last)
    out("]")


def table(rows: Sequence[tuple[str, ...]], right: Iterable[int] = ()) -> list[str]:
    """Lines with aligned columns; the columns in `right` are aligned on their right side."""
    rows = [tuple(one_line(cell) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    flush_right = set(right)
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in flush_right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return lines


def positive(text: str) -> int:
    """argparse type: an integer from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 up, found {text!r}")
    return int(text)
