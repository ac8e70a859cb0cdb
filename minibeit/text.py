"""Makes untrusted text (names, labels, metadata, file names, messages of libraries) safe to show.

Text from a file may hold escape sequences, which a terminal executes, direction marks, which make one name look like
another, markup, formulas, or a million characters.  All code that shows such text uses one of these functions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

LONGEST = 1200  # characters of a message
LONGEST_NAME = 160  # characters of a name in a table or a list
FORMULA = "=+-@\t\r＝＋－＠"  # a cell that begins with one of these is a formula to a spreadsheet
_MARKUP = re.compile(r"[\\`*\[\]|!#~]")


def printable(text: str) -> str:
    """`text` with control (line ends too), format, direction and unassigned characters as backslash escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def one_line(text: Any, longest: int = LONGEST) -> str:
    """`text` as one printable line: white space collapsed, and the middle left out if it is too long."""
    return shortened(printable(" ".join(str(text).split())), longest)


def shown_name(text: Any) -> str:
    """A name for a list or a table cell: one short line."""
    return one_line(text, LONGEST_NAME)


def shortened(text: str, longest: int) -> str:
    """`text`, with its middle replaced by " [...] " if it is longer than `longest`: both ends tell the most."""
    if len(text) <= longest:
        return text
    kept = longest - 7
    return f"{text[: kept - kept // 3]} [...] {text[len(text) - kept // 3 :]}"


def html(text: Any) -> str:
    """For the text and the quoted attributes of HTML."""
    from html import escape

    return escape(one_line(text))


def markdown(text: Any) -> str:
    """For a paragraph or a table's cell of Markdown, whose readers also take HTML."""
    from html import escape

    return escape(_MARKUP.sub(r"\\\g<0>", one_line(text)), quote=False)


def csv_line(values: Iterable[Any]) -> str:
    """A line of CSV; text that a spreadsheet would compute gets an apostrophe in front, as spreadsheets have it."""
    import csv
    import io

    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(_cell(value) for value in values)
    return buffer.getvalue()


def json_text(value: Any, indent: int | None = None, encoding: str | None = None) -> str:
    """`value` as JSON with unprintable characters escaped; ASCII only if `encoding` lacks a character of it.

    NaN and infinities, which JSON lacks, become null.
    """
    text = json.dumps(finite(value), ensure_ascii=False, indent=indent)
    if encoding is not None and not _fits(text, encoding):
        text = json.dumps(finite(value), indent=indent)
    return "\n".join(map(_escaped, text.split("\n")))


def finite(value: Any) -> Any:
    """`value` with NaN and infinities, which JSON lacks, replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return printable(f"'{value}" if value.startswith(tuple(FORMULA)) else value)


def _fits(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _escaped(line: str) -> str:
    """Escapes unprintable characters as \\uXXXX; in JSON they occur only within strings, where that is equivalent."""
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)
