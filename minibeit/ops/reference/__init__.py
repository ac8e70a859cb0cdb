"""Every op of the seam, defined in NumPy.  Fast backends use the same names and signatures and are tested against
these.  All ops keep the dtype of their input (float32 or float64) and change no argument.

arrays.py       arrays made, moved, joined and checked          maps.py      convolutions, pooling and resizing
transformer.py  tokens: norms, linear layers, attention         losses.py    one number for a batch
optimizer.py    a step of the optimizer

Letters: B batch, N tokens, D width, H heads, d head size, K classes, R rows of the bias table, C channels, h x w map.
"""

from .arrays import *
from .losses import *
from .maps import *
from .optimizer import *
from .transformer import *
