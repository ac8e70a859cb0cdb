"""The `NAME_forward` and `NAME_backward` of ops on maps and of losses: only training needs them.

They take weights that are learned: plain arrays on the device, not prepared ones.  Formulas: `ops/backward`.
"""

from __future__ import annotations

from .learned_losses import *
from .learned_maps import *
