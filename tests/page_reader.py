"""Reads the explorer's page back, as its scripts do: facts, arrays, and the probabilities that follow from them."""

from __future__ import annotations

import base64
import json
import re
import zlib

import numpy as np

ATTRIBUTES = r'data-array="(\w+)" data-dtype="(\w+)" data-shape="([\d,]+)"'
ARRAY = re.compile(rf'<script type="text/plain" {ATTRIBUTES}>([^<]*)</script>')
FACTS = re.compile(r'<script type="application/json" id="facts">([^<]*)</script>')


def facts_in(page: str) -> dict:
    """The facts, of which a page has one script."""
    (text,) = FACTS.findall(page)
    return json.loads(text)


def arrays_in(page: str) -> dict[str, np.ndarray]:
    """The arrays by name."""
    arrays = {}
    for name, dtype, shape, text in ARRAY.findall(page):
        data = zlib.decompress(base64.b64decode(text))
        arrays[name] = np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(*map(int, shape.split(",")))
    return arrays


def whole(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Integers times the scale of their row."""
    return arrays[name] * arrays[f"{name}_scale"][..., None].astype(np.float64)


def rollout_in(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Squares of bytes times the scale of their row."""
    return (arrays["rollout"] / 255.0) ** 2 * arrays["rollout_scale"][..., None]


def row_of_bias(grid: tuple[int, int], query: int, key: int) -> int:
    """The row of the bias table for two tokens, 0 being [CLS]."""
    gh, gw = grid
    rows = (2 * gh - 1) * (2 * gw - 1)
    if not query or not key:
        return rows + (2 if query == key else 0 if not query else 1)
    (y, x), (v, u) = divmod(query - 1, gw), divmod(key - 1, gw)
    return (y - v + gh - 1) * (2 * gw - 1) + x - u + gw - 1


def probabilities_in(page: str, bias: bool = True) -> np.ndarray:  # -> (L', H, N, N)
    """All probabilities, with the position bias or without it."""
    facts, arrays = facts_in(page), arrays_in(page)
    query, key = whole(arrays, "query"), whole(arrays, "key")
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
    if bias and "table" in arrays:
        tokens = range(scores.shape[-1])
        index = np.array([[row_of_bias(facts["grid"], a, b) for b in tokens] for a in tokens])
        scores = scores + whole(arrays, "table")[..., index]
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
