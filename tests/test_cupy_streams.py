"""The backend for GPUs on streams of the stand-in for CuPy: its calls are ordered, whichever stream the caller uses."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import random_weights, tiny_config
from cuda_on_cpu import kernels
from cuda_on_cpu.backend import cupy_backend, outputs
from cuda_on_cpu.queues import HazardError

from minibeit import BeitForImageClassification, BeitForSemanticSegmentation
from minibeit.ops import get_ops

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no g++ to compile CUDA C++ with")
CONFIG = tiny_config(use_relative_position_bias=True)
PIXELS = np.random.default_rng(0).standard_normal((2, 3, 12, 8)).astype(np.float32)
LARGER = np.random.default_rng(1).standard_normal((2, 3, 20, 16)).astype(np.float32)


@pytest.fixture
def cupy():
    with cupy_backend() as module:
        yield module


def classifier(**options):
    arrays = random_weights(CONFIG, "image_classification", 0, "float32")
    return BeitForImageClassification(CONFIG, arrays=arrays, backend="cupy", **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_waiting_changes_no_bit(dtype):
    config = tiny_config(use_relative_position_bias=True, num_hidden_layers=3, out_indices=[0, 1, 2, 3])
    arrays = random_weights(config, "semantic_segmentation", 0, "float32")
    found = []
    for asynchronous in (False, True):
        with cupy_backend(asynchronous=asynchronous):
            model = BeitForSemanticSegmentation(config, arrays=arrays, backend="cupy", dtype=dtype)
            found.append(outputs(model, {"pixel_values": PIXELS}, output_hidden_states=True))
    assert set(found[0]) == set(found[1])
    assert all(np.array_equal(array, found[1][name]) for name, array in found[0].items())


def test_calls_on_a_stream_of_the_callers(cupy):
    model, truth = classifier(), None
    for stream in (cupy.cuda.Stream.null, cupy.cuda.Stream(), *(cupy.cuda.Stream(non_blocking=True) for _ in "ab")):
        with stream:
            for pixels in (PIXELS, LARGER, PIXELS):
                logits = model(pixels).logits
            truth = logits if truth is None else truth
            assert np.array_equal(logits, truth)
            x = cupy.asarray(PIXELS) * 2
            assert np.array_equal(model(x / 2).logits, truth)
            x *= 3  # CuPy gives its memory out in the order of this stream alone
            assert cupy.cuda.get_current_stream().ptr == stream.ptr


def test_a_call_that_fails_is_over_before_the_callers_stream_goes_on(cupy):
    model, stream = classifier(), cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = cupy.asarray(PIXELS)
        with pytest.raises(ValueError, match="labels"):
            model(x, labels=np.array([0, 99]))
        x *= 2
        assert np.array_equal(x.get(), 2 * PIXELS)


class Interrupted(BaseException):
    pass


def interrupted_call(cupy, model):
    """A call on a stream of its own that ends before it waits for anything that its kernels make."""

    def interrupt(x):
        raise Interrupted

    to_host, model.ops.to_host = model.ops.to_host, interrupt
    with cupy.cuda.Stream(non_blocking=True), pytest.raises(Interrupted):
        model(PIXELS)
    model.ops.to_host = to_host


def test_what_the_backend_keeps_may_come_from_a_call_on_another_stream(cupy):
    model = classifier()
    interrupted_call(cupy, model)  # the index of the position bias is only queued
    with cupy.cuda.Stream(non_blocking=True):
        logits = model(PIXELS).logits
    assert np.array_equal(logits, model(PIXELS).logits)


def test_a_model_may_go_while_a_call_that_failed_is_still_at_its_weights(cupy):
    model = classifier()
    interrupted_call(cupy, model)
    del model
    gc.collect()
    for _ in range(50):
        cupy.zeros(1)


def test_ops_on_any_stream_after_preparing(cupy):
    ops, params = get_ops("cupy"), classifier().params
    with cupy.cuda.Stream(non_blocking=True):
        x = ops.asarray(np.ones((1, 2, CONFIG.hidden_size)), "float32")
        assert np.isfinite(ops.to_host(ops.linear(x, params.classifier))).all()


@pytest.mark.parametrize("own_streams", [False, True])
def test_threads_share_a_model(own_streams, cupy):
    model, failed = classifier(), []
    truths = [(x, model(x).logits) for x in (PIXELS, LARGER)]
    model = classifier()  # whose kept arrays are made by whichever thread comes first

    def work(number):
        try:
            with cupy.cuda.Stream(non_blocking=True) if own_streams else cupy.cuda.Stream.null:
                for x, truth in truths[:: 1 - 2 * (number % 2)] * 2:
                    assert np.array_equal(model(x).logits, truth)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize("stop", [None, 2])
def test_a_large_upload_waits_before_its_pinned_memory_is_free(stop, cupy, monkeypatch):
    ops, x = get_ops("cupy"), np.ones((3 << 20) + 5, np.float32)
    from minibeit.ops.cupy_gpu import arrays

    pieces = arrays._piece_by_piece

    def until(work, size, piece):
        for count, done in enumerate(pieces(work, size, piece)):
            if count == stop:
                raise Interrupted
            yield done

    monkeypatch.setattr(arrays, "_piece_by_piece", until)
    if stop is None:
        assert np.array_equal(ops.to_host(ops.asarray(x, "float32")), x)
    else:
        with pytest.raises(Interrupted):
            ops.asarray(x, "float32")
    cupy.cuda.alloc_pinned_memory(x.nbytes)
    cupy.cuda.Device().synchronize()


def test_an_upload_that_does_not_wait_is_reported(cupy, monkeypatch):
    from minibeit.ops.cupy_gpu import arrays

    stream = SimpleNamespace(synchronize=lambda: None, queue=cupy.cuda.Stream.null.queue)
    monkeypatch.setattr(arrays.cupy.cuda, "get_current_stream", lambda: stream)
    y = get_ops("cupy").asarray(np.ones(3 << 20, np.float32), "float32")
    with pytest.raises(HazardError, match="host memory was changed or freed before its upload"):
        y.get(stream=cupy.cuda.Stream.null)
