"""The errors a user can cause.  Each message is one sentence: what, where, expected, found, what to do."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint, its config or one of its tensors cannot be used as it is."""


class ImageError(ValueError):
    """A picture cannot be read or has values that no model can take."""


class DeviceError(OSError):
    """A GPU, its driver or its libraries are missing."""
