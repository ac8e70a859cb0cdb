"""The gradient of every parameter of tiny random BEiTs beside PyTorch's, from a file: no torch needed."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import available_backends, rms
from golden import GRADIENT_CASES, load, load_gradients
from tolerances import (
    EPS32,
    GOLDEN_GRADIENT32,
    GOLDEN_GRADIENT32_BATCH,
    GOLDEN_GRADIENT64,
    GOLDEN_GRADIENT64_BATCH,
    REMAINDER,
)

from minibeit.params import flatten
from minibeit.train.gradients import value_and_grad

CPU = ("numpy", "numba")

# Before a batch norm of two values per channel, which become 1 and -1: what is left of its gradient is rounding.
CANCELLED = ("segmentation_batch", "gradient.decode_head.psp_modules.0.conv.weight")


def compared(case, dtype, backend):
    """{name: distance from PyTorch's}, relative to the gradient, or REMAINDER of the largest if it is smaller."""
    name, batch = GRADIENT_CASES[case]
    golden, truth = load(name), load_gradients(case)
    found = value_and_grad(golden.model(dtype, backend), **golden.inputs, batch_statistics=batch)
    ours = {f"gradient.{key}": g for key, g in flatten(found.grads).items() if g is not None}
    ours |= {f"running.{key}": array for key, array in found.running.items()}
    assert set(truth) - {"loss"} <= set(ours)
    assert {key for key in truth if key.startswith("running.")} == {key for key in ours if key.startswith("running.")}
    assert len(truth) > 20 and abs(found.loss - truth["loss"]) <= 4 * np.finfo(dtype).eps * abs(truth["loss"])
    largest = max(rms(array) for array in truth.values())
    names = [key for key in truth if key != "loss" and (case, key) != CANCELLED]
    return {key: rms(ours[key] - truth[key]) / max(rms(truth[key]), REMAINDER * largest) for key in names}


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_float64_equals_pytorch(case):
    errors = compared(case, "float64", "numpy")
    worst = max(errors, key=errors.get)
    limit = GOLDEN_GRADIENT64_BATCH if GRADIENT_CASES[case][1] else GOLDEN_GRADIENT64
    assert errors[worst] <= limit, (worst, errors[worst])


@pytest.mark.parametrize("backend", [name for name in available_backends() if name in CPU])
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_float32_is_close(case, backend):
    errors = compared(case, "float32", backend)
    worst = max(errors, key=errors.get)
    limit = GOLDEN_GRADIENT32_BATCH if GRADIENT_CASES[case][1] else GOLDEN_GRADIENT32
    assert errors[worst] <= limit * EPS32, (worst, errors[worst] / EPS32)
