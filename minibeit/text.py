"""Text of strangers (names, labels, metadata, file names, messages of libraries) made fit to be shown.

Whatever comes out of a file may hold escape sequences, which a terminal obeys, direction marks, which show one name as
another, markup, formulas, or a million characters.  Every place that shows such text goes through one of these.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

LONGEST = 1200  # characters of a message
LONGEST_NAME = 160  # characters of a name in a table or a list
FORMULA = "=+-@\t\r＝＋－＠"  # what makes a spreadsheet take a cell for a formula
_MARKUP = re.compile(r"[\\`*\[\]|!#~]")


def printable(text: str) -> str:
    """`text` with every control, format, direction and unassigned character, line ends too, as a backslash escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def one_line(text: Any, longest: int = LONGEST) -> str:
    """`text` as one printable line, runs of white space as one space, the middle left out where it is too long."""
    return shortened(printable(" ".join(str(text).split())), longest)


def shown_name(text: Any) -> str:
    """A name as it may stand in a list or a cell: one short line."""
    return one_line(text, LONGEST_NAME)


def shortened(text: str, longest: int) -> str:
    """`text` with " [...] " for its middle where it is longer than `longest`: beginnings and ends tell the most."""
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
    """JSON that says exactly the same with nothing unprintable in it, all in ASCII if `encoding` lacks a character.

    NaN and infinities, which JSON does not have, become null.
    """
    text = json.dumps(finite(value), ensure_ascii=False, indent=indent)
    if encoding is not None and not _fits(text, encoding):
        text = json.dumps(finite(value), indent=indent)
    return "\n".join(map(_escaped, text.split("\n")))


def finite(value: Any) -> Any:
    """`value` with NaN and infinities, which JSON does not have, as None."""
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
    """What is not printable stands within strings of JSON, where \\uXXXX means the same."""
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)
