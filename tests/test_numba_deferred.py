"""The numba backend's jobs may wait until all of Python's work is done: the same results, and no memory lost early."""

from __future__ import annotations

import gc

import numpy as np
import pytest

pytest.importorskip("numba")

from python_threads import call_in_threads

import minibeit
from minibeit.ops import get_ops, numba_cpu, reference
from minibeit.ops.numba_cpu import memory, pool
from minibeit.params import LayerNorm, Linear

OPS = get_ops("numba")


def normal(seed, *shape, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


FC1, FC2 = (OPS.prepare(Linear(normal(i, *shape, scale=0.1), None)) for i, shape in enumerate([(256, 65), (65, 256)]))
NORM = OPS.prepare(LayerNorm(normal(3, 65), normal(4, 65)))


def chain(x, steps=12, activation="gelu"):
    """Layers whose results are dropped as soon as the next op has been called."""
    for _ in range(steps):
        y = OPS.layer_norm(x, NORM, 1e-6)
        x = OPS.linear_residual(OPS.linear_activation(y, FC1, activation), FC2, None, x)
    return x


def scribble():
    """Fills whatever memory is free by now."""
    gc.collect()
    sizes = (1, 65, 256, 70 * 65, *(k << 14 for k in range(1, 9)))  # buffers are multiples of 1 << 14 numbers
    return [np.full(size, np.nan, np.float32) for size in sizes for _ in range(4)]


@pytest.fixture
def expected():
    return chain(normal(5, 70, 65)).copy()


def test_nothing_runs_before_the_block_ends(expected):
    with OPS.queued():
        y = chain(normal(5, 70, 65))
        y[:] = 7
        scribble()
        assert (y == 7).all()
    assert np.array_equal(y, expected)


def test_a_block_that_is_not_wanted_runs_at_once(expected):
    with OPS.queued(False):
        assert np.array_equal(chain(normal(5, 70, 65)), expected)


@pytest.mark.parametrize("layout", [np.asarray, np.asfortranarray, lambda x: np.repeat(x, 2, 0)[::2]])
def test_inputs_of_any_layout_live_until_they_are_read(layout, expected):
    """None of these arrays is referred to by anything else when the kernels read it."""
    with OPS.queued():
        y = chain(layout(normal(5, 70, 65)))
        scribble()
    assert np.array_equal(y, expected)


def test_rows_that_must_be_copied_are_computed_first():
    x = normal(6, 8, 9, 65)
    whole = OPS.linear(OPS.layer_norm(x, NORM, 1e-6)[:, 1:], FC1).copy()
    with OPS.queued():
        y = OPS.linear(OPS.layer_norm(x, NORM, 1e-6)[:, 1:], FC1)
    assert np.array_equal(y, whole)


@pytest.mark.parametrize("op", ["concatenate", "asarray", "to_host", "resize_bilinear", "max_pool2x2", "all_finite"])
def test_other_ops_see_results(op):
    """NumPy's ops read arrays themselves, and so do some fast ones."""
    x = normal(7, 1, 6, 7, 65)

    def maps():
        return OPS.linear(x, FC1).transpose(0, 3, 1, 2)

    arguments = {
        "concatenate": lambda y: ([y, y], 1),
        "asarray": lambda y: (y, "float64"),
        "resize_bilinear": lambda y: (y, (9, 80)),
    }.get(op, lambda y: (y,))
    truth = getattr(reference, op)(*arguments(maps().copy()))
    with OPS.queued():
        y = maps()
        y[:] = np.nan
        found = getattr(OPS, op)(*arguments(y))
        np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-6)
        again = maps()  # waits again
        again[:] = 7
        assert (again == 7).all()
    assert np.array_equal(again, y)


def test_fallbacks_to_numpy_see_results():
    x = normal(5, 70, 65)
    tanh = chain(x, 3, "tanh").copy()
    wide = Linear(normal(0, 256, 65).astype(np.float64), None)
    product = OPS.linear(chain(x), wide).copy()
    with OPS.queued():
        found = chain(x, 3, "tanh")
        assert np.array_equal(OPS.linear(chain(x), wide), product)
    assert np.array_equal(found, tanh)


def test_an_inner_block_ends_with_its_results_there(expected):
    with OPS.queued():
        with OPS.queued():
            y = chain(normal(5, 70, 65))
            y[:] = 7
        assert np.array_equal(y, expected)


def test_an_inner_block_that_is_not_wanted_runs_at_once(expected):
    with OPS.queued():
        y = chain(normal(5, 70, 65))
        with OPS.queued(False):
            assert np.array_equal(y, expected)
            y = chain(normal(5, 70, 65))
            assert np.array_equal(y, expected)
        y = chain(normal(5, 70, 65))
        y[:] = 7
    assert np.array_equal(y, expected)


def test_memory_of_dropped_results_is_used_again_before_the_jobs_have_run():
    x = normal(5, 70, 65)
    with OPS.queued():
        addresses = {OPS.layer_norm(x, NORM, 1e-6).ctypes.data for _ in range(20)}
    assert len(addresses) <= 2


def test_jobs_of_a_block_that_raised_are_dropped(expected):
    y = memory.padded((70, 256))
    y[:] = 7
    with pytest.raises(KeyError), OPS.queued():
        OPS.linear_residual(normal(5, 70, 65), FC1, None, y)
        raise KeyError
    assert np.array_equal(chain(normal(5, 70, 65)), expected) and (y == 7).all()


@pytest.mark.parametrize("kept", [0, 300_000, 600_000])
def test_memory_that_is_not_kept_for_later_lives_long_enough(kept, monkeypatch):
    """Results too large to be kept, and buffers that make place for others while jobs still need them."""
    inputs = [normal(5, count, 65) for count in (70, 20, 140, 240, 3)]
    expected = [chain(x, 2).copy() for x in inputs]
    monkeypatch.setattr(memory, "_KEPT_BYTES", kept)
    with OPS.queued():
        found = [chain(x, 2) for x in inputs]
        scribble()
    assert all(map(np.array_equal, found, expected))


def test_results_that_nobody_wants_are_not_written_into_freed_memory(monkeypatch):
    monkeypatch.setattr(memory, "_KEPT_BYTES", 0)
    x, layer = normal(5, 700, 65), OPS.prepare(Linear(normal(7, 256, 65), None))
    with OPS.queued():
        for _ in range(4):
            OPS.linear(x, layer)
        sizes = 700 * 257 * 4, 700 * 272 * 4, 1 << 16, 1 << 20
        others = [np.full(size // 8, 7.0) for size in sizes for _ in range(9)]
    assert all((other == 7).all() for other in others)


def test_what_waits_holds_little_memory(expected, monkeypatch):
    monkeypatch.setattr(memory, "_KEPT_BYTES", 0)
    monkeypatch.setattr(pool, "_MOST_HELD", 1_000_000)
    most = 0
    with OPS.queued():
        x = normal(5, 70, 65)
        for _ in range(12):
            x = chain(x, 1)
            most = max(most, memory.held_bytes())
    assert np.array_equal(x, expected) and 0 < most <= 1_200_000
    assert memory.held_bytes() == 0


def test_blocks_in_several_python_threads(expected):
    wrong = []

    def call():
        for _ in range(30):
            with numba_cpu.num_threads(2), OPS.queued():
                y = chain(normal(5, 70, 65))
            if not np.array_equal(y, expected):
                wrong.append(1)

    call_in_threads(call)
    assert not wrong


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_model_gives_the_same_bits_whether_its_jobs_wait_or_not(threads):
    config = minibeit.BeitConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=64, patch_size=16,
        use_relative_position_bias=True,
    )  # fmt: skip
    model = minibeit.BeitModel(config, backend="numba", num_threads=threads)
    x = normal(8, 2, 3, 64, 64)
    waited = model(x).last_hidden_state.copy()
    model.ops.queued = reference.queued
    assert np.array_equal(model(x).last_hidden_state, waited)
