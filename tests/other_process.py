"""A Python process of its own, for what is decided once in each, and a small product for it to compute."""

from __future__ import annotations

import os
import subprocess
import sys

SMALL = """
import numpy as np
from minibeit.ops import get_ops, reference
from minibeit.params import Linear
ops = get_ops("numba")
layer = Linear(np.random.default_rng(0).standard_normal((50, 30), dtype="f4"), None)
x = np.random.default_rng(1).standard_normal((19, 30), dtype="f4")
assert np.abs(ops.linear(x, ops.prepare(layer)) - reference.linear(x, layer)).max() < 1e-5
"""


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done
