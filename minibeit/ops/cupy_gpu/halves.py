"""The `NAME_forward` and `NAME_backward` of ops: only training needs them.

They take weights that are learned: plain arrays on the device, not prepared ones.  Those named in `OF_DTYPE` take the
model's dtype first.  Formulas: `ops/backward`, some of whose functions serve arrays on a device as they are.
"""

from __future__ import annotations

from ..backward.arrays import (
    add_backward,
    concatenate_backward,
    dropout_backward,
    reshape_backward,
    transpose_backward,
)
from ..backward.losses import gumbel_softmax_backward
from ..backward.maps import upsample2x2_backward
from .learned import *
from .learned import __all__ as _rows
from .learned_attention import *
from .learned_attention import __all__ as _attention
from .learned_losses import *
from .learned_maps import *

OF_DTYPE = (*_rows, *_attention)  # the names of those that take the model's dtype first
