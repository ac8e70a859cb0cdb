"""The page of an exploration: facts as JSON, arrays as packed text, and the files that make them visible."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..text import finite
from ..text import html as escape
from .pack import text_of

FOLDER = Path(__file__).resolve().parent
SCRIPTS = ("data.js", "attention.js", "draw.js", "grid.js", "outcome.js", "app.js")  # in this order


def page(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """The whole page."""
    parts = {
        "title": escape(facts["title"]),
        "style": part("page.css"),
        "facts": as_json(facts),
        "arrays": "\n".join(as_script(name, array) for name, array in arrays.items()),
        "script": "\n".join(map(part, SCRIPTS)),
    }
    text = part("page.html")
    for name, content in parts.items():  # no content holds a mark: names are escaped
        before, _, after = text.partition(f"<!--{name}-->")
        text = before + content + after
    return text


@cache
def part(name: str) -> str:
    """A file of this folder."""
    return (FOLDER / name).read_text(encoding="utf-8")


def as_json(facts: dict[str, Any]) -> str:
    """JSON that may stand within a script element, whatever the names in it are."""
    return json.dumps(finite(facts)).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def as_script(name: str, array: np.ndarray) -> str:
    """A script element that is not run, with the bytes of an array."""
    shape = ",".join(map(str, array.shape))
    return (
        f'<script type="text/plain" data-array="{name}" data-dtype="{array.dtype.name}" data-shape="{shape}">'
        f"{text_of(array)}</script>"
    )
