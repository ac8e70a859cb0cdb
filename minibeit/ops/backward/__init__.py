"""The backward of every op of the seam, in NumPy: `NAME_backward(cotangent, saved, *args)`.

The cotangent of an array x is the gradient of one number, the loss, with respect to x: an array of x's shape.  Given
that of an op's result, `NAME_backward` gives those of its positional arguments, each in the structure of the argument
(a `Linear` for a `Linear`, a list for a list) and None for what has no gradient.  `saved` is what `NAME_forward`, where
there is one, kept besides the arguments; elsewhere it is None.  No argument is changed.

Sums over many rows are made in float64, in a fixed order.  Letters as in `reference`; g is the cotangent.
"""

from __future__ import annotations

from .arrays import *
from .losses import *
from .maps import *
from .transformer import *
