"""A batch norm as one scale and one shift per channel of the layer before it."""

from __future__ import annotations

import numpy as np

from ..params import BATCH_NORM_EPS, BatchNorm


def fold(bn: BatchNorm, bias: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:  # 2 x (C,)
    """(scale, shift) in float64 with bn(y + bias) = y * scale + shift; `bias` (C,) is the layer's own, if any."""
    scale = bn.weight / np.sqrt(np.float64(bn.running_var) + BATCH_NORM_EPS)
    start = 0 if bias is None else np.float64(bias)
    return scale, (start - bn.running_mean) * scale + bn.bias
