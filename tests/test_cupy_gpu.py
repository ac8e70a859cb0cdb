"""The CuPy backend on the stand-in for CuPy and, where there is one, on a GPU."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
from conftest import distance, gpu_missing
from cuda_on_cpu import kernels
from cuda_on_cpu.backend import cupy_backend

from minibeit.ops import get_ops, reference
from minibeit.params import Conv

REASON = gpu_missing()
PLACES = [
    pytest.param("stand-in", marks=pytest.mark.skipif(kernels.compiler() is None, reason="no g++")),
    pytest.param("gpu", marks=pytest.mark.skipif(REASON is not None, reason=str(REASON))),
]


@pytest.fixture(params=PLACES)
def part(request):
    """What imports a module of the backend by its name."""

    def named(name: str):
        return import_module(f"minibeit.ops.cupy_gpu.{name}")

    if request.param == "gpu":
        yield named
    else:
        with cupy_backend():
            yield named


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("size", [(40, 40), (7, 9)])
def test_winograd_is_nearly_as_exact_as_the_sum(size, part):
    """Of maps that are positive, as after ReLU: there F(4x4, 3x3) is 6 times as far off, 22 times at the peak."""
    winograd, cupy = part("winograd"), part("device").cupy
    x = np.abs(random(1, *size, 96))
    weight = random(48, 96, 3, 3) / 30
    exact = reference.conv2d(np.float64(x).transpose(0, 3, 1, 2), Conv(np.float64(weight), None))
    own = reference.conv2d(x.transpose(0, 3, 1, 2), Conv(weight, None))
    y = cupy.empty((1, *size, 48), np.float32)
    taps = cupy.asarray(winograd.transformed(weight).astype(np.float32))
    winograd.convolve(cupy.asarray(x), taps, None, y, False, 0)
    found = y.get().transpose(0, 3, 1, 2)
    assert distance(found, exact) < 2.5 * distance(own, exact)
    assert np.abs(found - exact).max() < 5 * np.abs(own - exact).max()


def test_a_single_number_has_no_axes_on_either_side(part):
    ops = get_ops("cupy")
    prediction = ops.asarray(random(3), "float32")
    loss = ops.to_host(ops.mse_loss(prediction, prediction * 2))
    assert loss.shape == ()
