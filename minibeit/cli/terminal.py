"""All output of the commands: results on stdout, everything else on stderr, one line each.

No other module of the command line prints; the output contains no control characters, whatever file it came from.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from ..text import LONGEST_NAME, csv_line, json_text, one_line, printable

Item = TypeVar("Item")
MANY = 16  # files from which on there is a progress bar


class UsageError(ValueError):
    """The command was called wrongly: exit code 2."""


class OutputError(Exception):
    """Results cannot be printed; `gone` if the reader of a pipe has closed it, as `head` does."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {error.strerror}")
        # Windows calls a closed pipe an invalid argument.
        self.gone = error.errno == errno.EPIPE or (sys.platform == "win32" and error.errno == errno.EINVAL)


def out(text: str) -> None:
    """Prints results, above a progress bar if there is one; `text` may contain only line ends that we added."""
    try:
        _print("\n".join(map(printable, text.split("\n"))), sys.stdout)
    except OSError as error:
        raise OutputError(error) from None


def flush() -> None:
    """Raises OutputError if printed text cannot be written."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        raise OutputError(error) from None


def give_up_output() -> None:
    """Discards all further output, also what is still buffered at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def note(message: str) -> None:
    """Prints one line to stderr, with the name of the program."""
    with suppress(OSError):  # the work continues even if nobody reads notes
        _print(f"minibeit: {one_line(message)}", sys.stderr)


def show_traceback() -> None:
    """Prints the traceback of the current error, for debugging."""
    import traceback

    with suppress(OSError):
        _print("\n".join(map(printable, traceback.format_exc().rstrip().split("\n"))), sys.stderr)


def _print(text: str, stream: Any) -> None:
    if stream is None:  # the program was started with this stream closed
        return
    if "tqdm" in sys.modules and sys.stderr is not None and sys.stderr.isatty():
        sys.modules["tqdm"].tqdm.write(text, file=stream)
    else:
        print(text, file=stream)


def progress(items: Iterable[Item], count: int, quiet: bool) -> Iterator[Item]:
    """The items, `count` of them, with a progress bar on stderr if there are many."""
    if quiet or count < MANY or sys.stderr is None:
        yield from items
        return
    from tqdm import tqdm

    if sys.stderr.isatty():
        yield from tqdm(items, total=count, file=sys.stderr, unit="file", leave=False)
    else:
        yield from tqdm(items, total=count, file=_Lines(), unit="file", mininterval=10.0)


@contextmanager
def counter(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr for images that are done in no order; yields what is told how many more are done."""
    if quiet or total < MANY or sys.stderr is None:
        yield lambda count: None
        return
    from tqdm import tqdm

    live = sys.stderr.isatty()
    stream, often = (sys.stderr, 0.1) if live else (_Lines(), 10.0)
    with tqdm(total=total, file=stream, unit="image", leave=False, mininterval=often) as bar:
        yield bar.update


class _Lines:
    """A stream for logs, where lines cannot be overwritten: each state of a progress bar is a new line."""

    def write(self, text: str) -> None:
        if text.strip():
            with suppress(OSError):
                print(text.strip(), file=sys.stderr)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


class StatusLine:
    """A line on stderr that is overwritten; where no line can be, as in a log, a new one every ten seconds."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet or sys.stderr is None
        self.live = not self.quiet and sys.stderr.isatty()
        self.last, self.width = 0.0, 0

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def show(self, text: str) -> None:
        """Shows `text`, unless something was shown a moment ago."""
        now = time.monotonic()
        if self.quiet or now - self.last < (0.1 if self.live else 10.0):
            return
        self.last = now
        if self.live:
            import shutil

            text = one_line(text)[: shutil.get_terminal_size().columns - 1]
            self._write("\r" + text.ljust(self.width))
            self.width = len(text)
        else:
            note(text)

    def close(self) -> None:
        """Clears the line."""
        if self.width:
            self._write("\r" + " " * self.width + "\r")
            self.width = 0

    def _write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "ascii"


def print_json(value: Any) -> None:
    """One JSON document; numbers keep every digit, names every character."""
    out(json_text(value, indent=2, encoding=_encoding()))


def print_json_line(value: Any) -> None:
    """One JSON document in one line."""
    out(json_text(value, encoding=_encoding()))


def print_json_list(rows: Iterable[dict[str, Any]]) -> None:
    """A JSON array with one line per element, printed as the elements come."""
    last = None
    out("[")
    for row in rows:
        if last is not None:
            out(last + ",")
        last = json_text(row, encoding=_encoding())
    if last is not None:
        out(last)
    out("]")


def print_csv_line(values: Iterable[Any]) -> None:
    """One line of CSV that no spreadsheet takes for a formula."""
    out(csv_line(values))


def table(rows: Sequence[tuple[str, ...]], right: Iterable[int] = (), longest: int = LONGEST_NAME) -> list[str]:
    """Lines with aligned columns, right-aligned for those in `right`; cells are cut to `longest` characters."""
    rows = [tuple(one_line(cell, longest) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    flush_right = set(right)
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in flush_right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return lines


def not_negative(text: str) -> int:
    """argparse type: 0 or a positive integer."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, found {text!r}")
    return int(text)


def positive(text: str) -> int:
    """argparse type: a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, found {text!r}")
    return int(text)
