"""What the CuPy backend does for speed, on the stand-in for CuPy and, where there is one, on a GPU."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
from conftest import distance, gpu_missing
from cuda_on_cpu import kernels
from cuda_on_cpu.backend import cupy_backend
from cuda_on_cpu.world import counted

from minibeit.ops import PositionBias, get_ops, reference
from minibeit.params import Attention, Conv, Linear, table_rows

REASON = gpu_missing()
PLACES = [
    pytest.param("stand-in", marks=pytest.mark.skipif(kernels.compiler() is None, reason="no g++")),
    pytest.param("gpu", marks=pytest.mark.skipif(REASON is not None, reason=str(REASON))),
]
STEP = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
H, d = 2, 64


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


def heads(ops, tokens: int):
    """q, k and v of two images, as a model's `project_qkv` gives them."""
    D = H * d
    names = ("query", "key", "value", "output")
    layers = {n: Linear(random(D, D, seed=i) * np.float32(D**-0.5), random(D, seed=i)) for i, n in enumerate(names)}
    layers["key"] = Linear(layers["key"].weight, None)
    x = 2 * random(2, tokens, D, seed=tokens)
    return ops.project_qkv(ops.asarray(x, "float32"), ops.prepare(Attention(**layers)), H)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 5), (7, 9), (8, 8), (8, 16), (11, 13)])
@pytest.mark.parametrize("dtype", STEP)
def test_attention_in_one_kernel(dtype, grid, biased, part):
    ops = get_ops("cupy", dtype=dtype)
    tokens = 1 + grid[0] * grid[1]
    qkv = heads(ops, tokens)
    bias, host_bias = None, None
    if biased:
        table = random(table_rows(grid), H, seed=9)
        bias = PositionBias(ops.asarray(table, "float32"), grid)
        host_bias = PositionBias(table.astype(np.float64), grid)
    assert part("attention").suit(*qkv)
    with counted() as seen:
        found = ops.to_host(ops.attention(*qkv, bias))
        assert not seen.launches or "attend" in seen.launches  # a GPU counts nothing
    truth = reference.attention(*(np.float64(ops.to_host(x)) for x in qkv), host_bias)
    assert distance(found, truth) < STEP[dtype]
    by_scores, probs = ops.attention(*qkv, bias, return_probs=True)
    assert distance(found, ops.to_host(by_scores)) < STEP[dtype]
    assert probs.shape == (2, H, tokens, tokens)


@pytest.mark.parametrize("dtype", ["float32", *STEP])
def test_rows_of_scores_longer_than_a_block_keeps(dtype, part, monkeypatch):
    """More tokens than threads hold in registers: the rest of a row is read again, and written over with care."""
    monkeypatch.setattr(part("kernels"), "THREADS", 64)
    ops, grid = get_ops("cupy", dtype=dtype), (21, 29)
    assert part("attention").SCORES_OF_A_THREAD * 64 < 1 + 21 * 29
    q, k, v = (random(1, 1, 610, 16, seed=i) for i in range(3))
    table = random(table_rows(grid), 1, seed=9)
    bias = PositionBias(ops.asarray(table, "float32"), grid)
    host_bias = PositionBias(table.astype(np.float64), grid)
    up = part("kernels").to_storage
    found = ops.to_host(ops.attention(*(up(ops.asarray(x, "float32"), dtype) for x in (q, k, v)), bias))
    truth = reference.attention(*map(np.float64, (q, k, v)), host_bias)
    assert distance(found, truth) < STEP.get(dtype, 5e-7)


def test_attention_passes_nan_on(part):
    ops = get_ops("cupy", dtype="float16")
    q, k, v = heads(ops, 70)
    q[1, 0, 68, 3] = np.nan
    found = ops.to_host(ops.attention(q, k, v, None))
    wrong = np.isnan(found)
    assert wrong[1, 68, :d].all()
    assert wrong.sum() == d


def test_heads_that_the_kernel_cannot_read(part):
    ops = get_ops("cupy", dtype="float16")
    q, k, v = heads(ops, 9)
    suit = part("attention").suit
    assert suit(q, k, v)
    assert not suit(q, k, v.copy())
    assert not suit(*(x[..., ::2] for x in (q, k, v)))
    copies = [x.reshape(2, H, 9, 2 * 32)[..., :32].copy() for x in (q, k, v)]
    assert not suit(*copies)
    assert distance(ops.to_host(ops.attention(q, k, v.copy(), None)), ops.to_host(ops.attention(q, k, v, None))) < 2e-3


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


@pytest.mark.parametrize("count", [1 << 20, (5 << 20) // 4 + 3])
def test_large_arrays_go_up_in_pieces(count, part):
    ops, arrays = get_ops("cupy"), part("arrays")
    x = random(count)
    with counted() as seen:
        found = ops.asarray(x, "float32")
        assert all(copy.nbytes <= arrays.PIECE_BYTES for copy in seen.copies)
    assert np.array_equal(ops.to_host(found), x)
    assert np.array_equal(ops.to_host(ops.asarray(x[::-1], "float64")), x[::-1].astype(np.float64))


@pytest.mark.parametrize("place", [0, 1_200_000, -1])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_found(wrong, place, part):
    ops, x = get_ops("cupy"), random(1_500_000)
    assert ops.all_finite(x)
    x[place] = wrong
    assert not ops.all_finite(x)


def test_sums_that_overflow_are_finite(part, recwarn):
    ops = get_ops("cupy")
    assert ops.all_finite(np.full(1_500_000, 3e38, np.float32))
    assert ops.all_finite(np.full(50, 3e38, np.float32))
    assert not ops.all_finite(np.array([np.inf, -np.inf], np.float32))
    assert not [w for w in recwarn if w.category is RuntimeWarning]


def test_a_single_number_has_no_axes_on_either_side(part):
    ops = get_ops("cupy")
    prediction = ops.asarray(random(3), "float32")
    loss = ops.to_host(ops.mse_loss(prediction, prediction * 2))
    assert loss.shape == ()
