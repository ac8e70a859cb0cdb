"""The fast `NAME_forward` and `NAME_backward` of ops: only training needs them, so that inference starts without."""

from __future__ import annotations

from . import COMPILED

if COMPILED:
    from .backward import *
    from .backward_maps import *
    from .losses import cross_entropy_backward, cross_entropy_forward
