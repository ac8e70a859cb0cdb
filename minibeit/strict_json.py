"""Untrusted JSON: the cost of reading it is bounded, and whatever is refused is refused in one sentence."""

from __future__ import annotations

import json
import math
import re
import reprlib
from pathlib import Path
from typing import Any

LARGEST = 8 << 20  # bytes; a config takes a few thousand, with 21,841 class names two million
MOST_VALUES = 300_000  # those class names, as id2label and label2id, come to 124,000 by `_at_most`
DEEPEST = 64  # levels; well within what writing, copying and printing a value can recurse
LONGEST_INTEGER = 19  # digits, those of 64 bits: converting a long run of digits takes quadratic time
LONGEST_FLOAT = 400  # characters; the longest plain notation of a double before the point has 309

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SHOWN = 200  # characters


def read_json(path: Path) -> Any:
    """The content of a file of settings; see `parse_json`.  The ValueError does not name the file."""
    with open(path, "rb") as file:
        return parse_json(file.read(LARGEST + 1))


def parse_json(text: bytes | str, largest: int = LARGEST, most_values: int = MOST_VALUES) -> Any:
    """The value of a JSON text, at a cost of at most half a second and 100 MB whatever it holds.

    Raises ValueError for a text of more than `largest` bytes, `most_values` values or DEEPEST levels, for what is not
    UTF-8 or not JSON (NaN and infinity included), and for what no program writes on purpose: repeated keys, integers
    beyond 64 bits, halves of surrogate pairs.
    """
    text = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(text) > largest:
        raise ValueError(f"has more than the {largest:,} bytes that are read")
    if _at_most(text) > most_values:
        raise ValueError(f"has more than the {most_values:,} values that are read")
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
        _check_depth(value)
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"is nested too deeply: more than {DEEPEST} levels") from None
    if _SURROGATE.search(text):
        _check_text(value)
    return value


def brief(value: Any) -> str:
    """A stranger's value as it may stand in a message: on one line, escaped and short, however large it is."""
    text = " ".join(_REPR.repr(value).split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _at_most(text: bytes) -> int:
    """No fewer than the values of a JSON text: each but the first comes after one of these signs."""
    return sum(map(text.count, (b",", b"[", b"{", b":")))


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise RecursionError
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [child for children in inner for child in children if isinstance(child, (dict, list))]


def _check_text(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is not valid text") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"has the key {brief(twice)} twice")
    return result


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > LONGEST_INTEGER:
        raise ValueError(f"has an integer of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    if len(digits) > LONGEST_FLOAT:
        raise ValueError(f"has a number of {len(digits)} characters")
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"has the number {brief(digits)}, beyond the range of a double")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"has the value {name}, which is not JSON")


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict = 3, 4
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxfrozenset = 12
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
