"""The numba backend's jobs are queued until all of Python's work is done: the same results, no memory lost early."""

from __future__ import annotations

import ast
import copy
import gc
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from python_threads import call_in_threads

import minibeit
from minibeit.ops import PositionBias, get_ops, numba_cpu, reference
from minibeit.ops.numba_cpu import memory, operands, pool, queue
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
        again = maps()  # is queued again
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


def test_what_is_queued_keeps_little_memory_alive(expected, monkeypatch):
    monkeypatch.setattr(memory, "_KEPT_BYTES", 0)
    monkeypatch.setattr(queue, "_MOST_HELD", 1_000_000)
    most = 0
    with OPS.queued():
        x = normal(5, 70, 65)
        for _ in range(12):
            x = chain(x, 1)
            most = max(most, queue.kept_alive_bytes())
    assert np.array_equal(x, expected) and 0 < most <= 1_200_000
    assert queue.kept_alive_bytes() == 0


def test_queues_of_several_python_threads(expected):
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
def test_a_model_gives_the_same_bits_whether_its_jobs_are_queued_or_not(threads, monkeypatch):
    monkeypatch.setattr(pool, "usable_cpus", lambda: threads)
    config = minibeit.BeitConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=64, patch_size=16,
        use_relative_position_bias=True,
    )  # fmt: skip
    model = minibeit.BeitModel(config, backend="numba", num_threads=threads)
    x = normal(8, 2, 3, 64, 64)
    queued = model(x).last_hidden_state.copy()
    model.ops.queued = reference.queued
    assert np.array_equal(model(x).last_hidden_state, queued)


# What a job needs lives until it has run --------------------------------------------------------------------------


ADDRESSES = {"ctypes", "__array_interface__", "address", "owner", "buffer_info", "from_buffer", "data_as", "data"}
MAY = {"memory.py", "guard.py", "pool.py", "queue.py", "machine_code.py"}  # these make, check and pass on addresses


def test_only_the_memory_modules_name_addresses():
    """An op's author cannot have an address without its owner."""
    folder = Path(memory.__file__).parent
    drivers = [path for path in folder.glob("*.py") if path.name not in MAY]
    assert {"gemm.py", "attention.py", "norm.py", "spread.py", "winograd.py", "maps.py"} <= {p.name for p in drivers}
    wrong = [
        f"{path.name}:{node.lineno} .{node.attr}"
        for path in drivers
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ADDRESSES
    ]
    assert not wrong


@pytest.mark.parametrize("held", [0, 1 << 16, 1 << 20])
def test_a_long_sum_survives_a_flush_between_its_two_halves(held, monkeypatch):
    monkeypatch.setattr(memory, "_KEPT_BYTES", 0)
    monkeypatch.setattr(queue, "_MOST_HELD", held)
    layer = OPS.prepare(Linear(normal(1, 64, 2048, scale=0.1), normal(2, 64)))
    x, residual = normal(3, 300, 2048), normal(4, 300, 64)
    expected = OPS.linear_residual(x, layer, None, residual).copy()
    with OPS.queued():
        y = OPS.linear_residual(x.copy(), layer, None, residual.copy())
        for _ in range(4):
            scribble()
            y = OPS.linear_residual(x.copy(), layer, None, residual.copy())
    assert np.array_equal(y, expected)


def test_a_batch_whose_hidden_layer_passes_the_limit():
    """Once a segmentation fault; 14 images of 224 pixels and 3072 hidden numbers are 34 MB."""
    config = minibeit.BeitConfig(
        hidden_size=32, num_attention_heads=1, intermediate_size=3072, num_hidden_layers=2, image_size=224
    )
    model = minibeit.BeitForImageClassification(config, backend="numba")
    x = normal(9, 1, 3, 224, 224)
    assert (model(np.repeat(x, 14, 0)).logits == model(x).logits).all()


def test_weights_that_are_collected_while_queued():
    weight, x = normal(1, 256, 65, scale=0.1), normal(5, 70, 65)
    layers = [OPS.prepare(Linear(weight, None)), OPS.prepare(LayerNorm(normal(3, 65), normal(4, 65)))]
    expected = OPS.linear(OPS.layer_norm(x, layers[1], 1e-6), layers[0]).copy()
    with OPS.queued():
        y = OPS.linear(OPS.layer_norm(x, layers[1], 1e-6), layers[0])
        layers.clear()
        scribble()
    assert np.array_equal(y, expected)


def test_bias_tables_and_constants_that_are_forgotten_while_queued():
    qkv = [normal(i, 2, 3, 5, 8) for i in range(3)]
    table = normal(4, 12, 3)  # of a grid of 2x2
    joined = np.stack(qkv).transpose(1, 3, 0, 2, 4).copy().transpose(2, 0, 3, 1, 4)
    expected = OPS.attention(*joined, PositionBias(table, (2, 2))).copy()
    with OPS.queued():
        y = OPS.attention(*joined.copy(order="K"), PositionBias(table.copy(), (2, 2)))
        operands.scalar.cache_clear()
        scribble()
    assert np.array_equal(y, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_prepared_weights_has_addresses_of_its_own(copied):
    x = normal(5, 70, 65)
    layer, norm = OPS.prepare(Linear(normal(1, 256, 65), None)), OPS.prepare(LayerNorm(normal(3, 65), normal(4, 65)))
    expected = OPS.linear(OPS.layer_norm(x, norm, 1e-6), layer).copy()
    layer, norm = copied((layer, norm))
    scribble()
    assert np.array_equal(OPS.linear(OPS.layer_norm(x, norm, 1e-6), layer), expected)
    assert layer.operands[0].array is layer.panels


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_with_jobs_queued_runs_them_too(expected):
    with OPS.queued():
        y = chain(normal(5, 70, 65))
        child = os.fork()
        if child == 0:
            queue.flush()
            os._exit(0 if np.array_equal(y, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0 and np.array_equal(y, expected)


def test_after_an_exception_in_the_middle_nothing_is_queued(expected):
    with pytest.raises(KeyError), OPS.queued():
        chain(normal(5, 70, 65))
        with OPS.queued():
            chain(normal(5, 70, 65))
            raise KeyError
    assert queue.kept_alive_bytes() == 0
    assert np.array_equal(chain(normal(5, 70, 65)), expected)


def test_interrupts_land_between_the_slices_of_a_flush(monkeypatch):
    """Once Ctrl-C waited for all that was queued."""
    monkeypatch.setattr(queue, "_MOST_HELD", 1 << 40)
    layer, x = OPS.prepare(Linear(normal(1, 1024, 1024), None)), normal(2, 1024, 1024)
    expected, late = OPS.linear(x, layer).copy(), []
    start = time.process_time()
    OPS.linear(x, layer)
    every = 400 * (time.process_time() - start)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for threads in (1, 2):
            with numba_cpu.num_threads(threads), pytest.raises(KeyboardInterrupt), OPS.queued():
                for _ in range(400):
                    OPS.linear(x, layer)
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                start = time.process_time()
                queue.flush()
            late.append(time.process_time() - start)
            assert pool._pool.running is None and np.array_equal(OPS.linear(x, layer), expected)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert max(late) < every / 5  # on a machine that does nothing else 0.1 of some 16 seconds


def test_a_signal_handler_may_run_a_model_in_the_middle_of_a_flush(expected):
    layer, x = OPS.prepare(Linear(normal(1, 512, 512), None)), normal(2, 512, 512)
    product, found, products = OPS.linear(x, layer).copy(), [], []

    def handle(number, frame):
        with OPS.queued():
            y = chain(normal(5, 70, 65))
        found.append(np.array_equal(y, expected))
        if not products:  # again, but not while this still runs, as on an emulated CPU
            signal.setitimer(signal.ITIMER_REAL, 0.02)

    handler = signal.signal(signal.SIGALRM, handle)
    try:
        with OPS.queued():
            made = [OPS.linear(x, layer) for _ in range(100)]
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            queue.flush()
            products += made
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert found and all(found)
    assert all(np.array_equal(y, product) for y in products)
