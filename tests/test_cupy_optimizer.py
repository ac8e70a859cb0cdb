"""The device's AdamW, clipping and loss scale, and copies that nobody waits for, on the stand-in for CuPy."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
from cuda_on_cpu import kernels
from cuda_on_cpu.backend import cupy_backend
from cuda_on_cpu.world import counted

from minibeit.ops import reference

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no g++")
BETAS, EPS = (0.9, 0.999), 1e-8
PLACES = [(0, 5, 1.0, 0.05), (64, 64 + 700, 0.5, 0.0), (768, 769, 0.25, 0.1)]  # first, end, factor of the rate, decay
SIZE = 832


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def cupy(request):
    with cupy_backend(backwards=request.param) as module:
        yield module


def optimizer(cupy, dtype="float32", **options):
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(SIZE).astype(dtype)
    module = import_module("minibeit.ops.cupy_gpu.optimizer")
    return module.DeviceAdamW(cupy.asarray(weights), PLACES, BETAS, EPS, **options), weights


def gradients(steps: int, dtype="float32"):
    return np.random.default_rng(1).standard_normal((steps, SIZE)).astype(dtype)


def expected(weights, gradients, seen, rates, largest):
    """Weights after the definition's steps, parameter by parameter, and the norms."""
    weights, norms = np.float64(weights), []
    mean, square, count = np.zeros_like(weights), np.zeros_like(weights), [0] * len(PLACES)
    for gradient, there, rate in zip(np.float64(gradients), seen, rates):
        own = [slice(first, end) for first, end, *_ in PLACES]
        norms.append(np.sqrt(sum(np.square(gradient[s]).sum() for s, here in zip(own, there) if here)))
        factor = min(1.0, largest / (norms[-1] + 1e-6))
        for i, (first, end, share, decay) in enumerate(PLACES):
            if there[i]:
                count[i] += 1
                views = (array[first:end] for array in (weights, mean, square))
                w, m, v = views
                reference.adamw(w, gradient[first:end] * factor, m, v, (rate * share, decay, BETAS, EPS), count[i])
    return weights, norms, count


@pytest.mark.parametrize(("dtype", "close"), [("float32", 2e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("largest", [np.inf, 3.0])
def test_steps_are_those_of_the_definition(cupy, dtype, close, largest, monkeypatch):
    monkeypatch.setattr(import_module("minibeit.ops.cupy_gpu.optimizer"), "CHUNK", 256)
    made, weights = optimizer(cupy, dtype)
    g, rates = gradients(4, dtype), [1e-2, 3e-2, 2e-2, 0.0]
    seen = [(True, True, True), (True, False, True), (True, True, True), (True, True, True)]
    g[1, 64:764] = np.nan  # whatever lies where there is no gradient
    loss = cupy.asarray(np.array([0.5], dtype))
    told = [made.step(cupy.asarray(x), loss, there, rate, largest).get() for x, there, rate in zip(g, seen, rates)]
    wanted, norms, count = expected(weights, g, seen, rates, largest)
    learned = np.r_[0:5, 64:764, 768]
    assert np.abs(made.weights.get() - wanted)[learned].max() < close
    others = np.setdiff1d(np.arange(SIZE), learned)
    assert np.array_equal(made.weights.get()[others], weights[others])
    np.testing.assert_allclose([row[1] for row in told], norms, rtol=1e-6)
    assert made.steps.get().tolist() == count
    assert all(row[0] == 0.5 and row[4] == 1 for row in told)


def test_a_step_is_three_launches_and_no_copy(cupy):
    made, _ = optimizer(cupy)
    g, loss = cupy.asarray(gradients(1)[0]), cupy.asarray(np.zeros(1, np.float32))
    with counted() as seen:
        made.step(g, loss, (True,) * 3, 1e-2, 1.0)
        assert seen.launches == ["sums_of_squares", "plan", "adamw"] and not seen.copies


def test_the_loss_scale_is_halved_by_an_overflow_and_recovers(cupy):
    made, weights = optimizer(cupy, interval=2, scale=1024.0)
    g, seen, finite = gradients(6) * 1024, (True,) * 3, cupy.asarray(np.zeros(1, np.float32))
    scales, flags = [], []
    for i in range(5):
        g[i] *= np.float32(made.control.get()[0] / 1024)  # as a backward of the scaled loss would
        if i == 1:
            g[i, 100] = np.nan
        before = made.weights.get()
        told = made.step(cupy.asarray(g[i]), finite, seen, 1e-2, np.inf).get()
        scales.append(told[2])
        flags.append(told[4])
        assert np.array_equal(before, made.weights.get()) == (i == 1)
    assert scales == [1024, 512, 512, 1024, 1024] and flags == [1, 0, 1, 1, 1]
    good = [0, 2, 3, 4]
    wanted, *_ = expected(weights, gradients(6)[good], [seen] * 4, [1e-2] * 4, np.inf)
    assert np.abs(made.weights.get() - wanted)[:5].max() < 2e-6
    assert made.steps.get().tolist() == [4, 4, 4]


@pytest.mark.parametrize(("interval", "where"), [(0, "gradient"), (0, "loss"), (2, "loss")])
def test_nothing_changes_any_more_after_a_step_that_is_not_finite(cupy, interval, where):
    """Unless its gradients may have overflowed: a loss does not depend on its scale."""
    made, weights = optimizer(cupy, interval=interval)
    g, losses = gradients(2), np.zeros((2, 1), np.float32)
    (g if where == "gradient" else losses)[0, 0] = np.inf
    told = [
        made.step(cupy.asarray(x), cupy.asarray(loss), (True,) * 3, 1e-2, np.inf).get() for x, loss in zip(g, losses)
    ]
    assert [row[4] for row in told] == [0, 1]
    assert np.array_equal(made.weights.get(), weights) and not made.steps.get().any() and not made.mean.get().any()


def test_the_average_of_weights(cupy):
    module = import_module("minibeit.ops.cupy_gpu.optimizer")
    a, w = np.random.default_rng(2).standard_normal((2, 700)).astype(np.float32)
    average = cupy.asarray(a)
    module.update_average(average, cupy.asarray(w), 0.75)
    np.testing.assert_allclose(average.get(), 0.75 * a + 0.25 * w, rtol=1e-6, atol=1e-7)


# Copies ---------------------------------------------------------------------------------------------------------------


def test_batches_go_up_while_others_are_used(cupy):
    """The stand-in reports memory that is written before its last reader, or read before it has been written."""
    uploads = import_module("minibeit.ops.cupy_gpu.transfers").Uploads()
    batches = np.random.default_rng(3).standard_normal((6, 40)).astype(np.float32)
    sums = []
    for i, batch in enumerate(batches):
        there = uploads.upload(batch)
        sums.append((there * 2).sum())
        batch[...] = np.nan  # has been copied: the caller may do what it likes
        if i == 3:
            there = uploads.upload(np.zeros(3, np.float32))  # of another shape
            sums.append(there.sum())
    found = [float(x) for x in sums]
    wanted = np.random.default_rng(3).standard_normal((6, 40)).astype(np.float32).sum(1) * 2
    np.testing.assert_allclose(found, np.insert(wanted, 4, 0), rtol=1e-5, atol=1e-5)


def test_downloads_are_what_was_there_when_they_were_asked_for(cupy):
    downloads = import_module("minibeit.ops.cupy_gpu.transfers").Downloads
    x = cupy.asarray(np.arange(6.0).reshape(2, 3))
    asked = downloads([x.T, x.sum(), x[:0]])
    x[...] = 0
    turned, total, nothing = asked.wait()
    assert np.array_equal(turned, np.arange(6.0).reshape(2, 3).T) and total == 15 and nothing.shape == (0, 3)
