"""The errors a user can cause.  Each message is one sentence: what, where, expected, found, what to do."""

from __future__ import annotations

from typing import Any

from .text import one_line


class Shown(Exception):
    """Its message may quote a stranger's file: it is made one short printable line when the error is made."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(one_line(arg) if isinstance(arg, str) else arg for arg in args))


class CheckpointError(Shown, ValueError):
    """A checkpoint, its config or one of its tensors cannot be used as it is."""


class ImageError(Shown, ValueError):
    """A picture cannot be read or has values that no model can take."""


class DeviceError(Shown, OSError):
    """A GPU, its driver or its libraries are missing."""
