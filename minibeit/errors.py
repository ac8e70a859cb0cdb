"""The errors a user can cause.  Each message is one sentence: what, where, expected, found, what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .text import one_line


class Shown(Exception):
    """Its message may quote a stranger's file: it is made one short printable line when the error is made."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(one_line(arg) if isinstance(arg, str) else arg for arg in args))


class CheckpointError(Shown, ValueError):
    """A checkpoint, its config or one of its tensors cannot be used as it is."""


class ImageError(Shown, ValueError):
    """An image cannot be read or has values that no model can take."""


class DeviceError(Shown, OSError):
    """A GPU, its driver or its libraries are missing."""


def nearest(name: str, known: Iterable[str], likeness: float = 0.6) -> list[str]:
    """The one of `known` that is most like `name`, in a list; an empty list where none is like it."""
    from difflib import get_close_matches  # rarely needed

    return get_close_matches(name, known, 1, likeness)


def unknown_keywords(
    function: str, unknown: Iterable[str], known: Iterable[str], hints: Mapping[str, str] | None = None
) -> TypeError:
    """The error for keywords that a function does not have; each is told with the nearest one that it has."""
    known, told = list(known), []
    for name in unknown:
        near = nearest(name, known)
        hint = (hints or {}).get(name) or (f"did you mean {near[0]}?" if near else "")
        told.append(f"{name!r}" + (f" ({hint})" if hint else ""))
    alone = "" if all("(" in text for text in told) else f"; it takes {', '.join(sorted(known))}"
    return TypeError(f"{function}: unknown keyword {', '.join(told)}{alone}")
