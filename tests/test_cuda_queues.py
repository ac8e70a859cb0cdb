"""Work that waits in streams on the stand-in for CuPy: each planted mistake is reported, its right form is not."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_on_cpu import cublas, kernels, samples
from cuda_on_cpu.fake_cupy import pretend
from cuda_on_cpu.kernels import KernelError
from cuda_on_cpu.queues import HazardError
from cuda_on_cpu.world import CUDARuntimeError

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no g++ to compile CUDA C++ with")
N = 5000
HOST = np.arange(N, dtype=np.float32)
UNORDERED = "nothing orders the two"
SCALE = """
extern "C" __global__ void twice(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = 2 * x[i];
}
"""


@pytest.fixture
def gpu():
    """The module, two streams that no other waits for, arrays that are ready on a stream, and a kernel: y = 2 x."""
    with pretend() as cupy:
        kernel = cupy.RawModule(code=SCALE).get_function("twice")

        def twice(x, y, n=N):
            kernel((-(-n // 256),), (256,), (x, y, n))

        def on(stream, *hosts):
            with stream:
                made = [cupy.zeros(N, "float32") if host is None else cupy.asarray(host) for host in hosts]
            stream.synchronize()
            return made

        a, b = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        yield SimpleNamespace(cupy=cupy, a=a, b=b, on=on, twice=twice)


RIGHT = pytest.mark.parametrize("right", [False, True])


def told(right: bool, words: str = UNORDERED, error: type[Exception] = HazardError):
    """Expects an error with these words unless all is right."""
    return nullcontext() if right else pytest.raises(error, match=words)


# Planted mistakes -----------------------------------------------------------------------------------------------------


@RIGHT
def test_freed_memory_is_given_out_again_while_another_stream_reads_it(gpu, right):
    (x,), (y,) = gpu.on(gpu.a, HOST), gpu.on(gpu.b, None)
    with gpu.b:
        gpu.twice(x, y)
    if right:
        gpu.a.wait_event(gpu.b.record())
    del x
    with (
        told(right, f"the pool, giving out freed memory again, on .* writes memory that kernel twice .*{UNORDERED}"),
        gpu.a,
    ):
        gpu.cupy.zeros(N, "float32")
    assert not right or np.array_equal(y.get(gpu.b), 2 * HOST)


@RIGHT
def test_smaller_pieces_of_freed_memory_too(gpu, right):
    (x,), (y,) = gpu.on(gpu.a, HOST), gpu.on(gpu.b, None)
    with gpu.b:
        gpu.twice(x, y)
    if right:
        gpu.b.synchronize()
    del x
    with told(right), gpu.a:
        gpu.cupy.empty(3, "float32")


@RIGHT
def test_another_thread_uses_what_a_thread_has_only_queued(gpu, right):
    x, y = gpu.on(gpu.a, HOST, None)
    (z,) = gpu.on(gpu.b, None)

    def work():
        with gpu.a as stream:
            gpu.twice(x, y)
            if right:
                stream.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with told(right, f"kernel twice on .* reads memory that kernel twice on .*{UNORDERED}"), gpu.b:
        gpu.twice(y, z)
        assert np.array_equal(z.get(), 4 * HOST)


@RIGHT
@pytest.mark.parametrize("how", ["changed", "freed", "freed and given to another"])
def test_pinned_memory_of_an_upload_that_has_not_run(gpu, how, right):
    with gpu.a:
        x = gpu.cupy.empty(N, "float32")
        pinned = gpu.cupy.cuda.alloc_pinned_memory(x.nbytes)
        np.frombuffer(pinned, np.float32, N)[:] = HOST
        x.data.copy_from_host_async(pinned.ptr, x.nbytes, gpu.a)
        if right:
            gpu.a.synchronize()
        if how == "changed":
            np.frombuffer(pinned, np.float32, N)[-1] = 7
        else:
            del pinned
        if how == "freed and given to another":
            np.frombuffer(gpu.cupy.cuda.alloc_pinned_memory(x.nbytes), np.float32, N)[:] = 1
        with told(
            right, r"host memory was changed or freed before its upload had run \(asked for at .*test_cuda_queues"
        ):
            assert np.array_equal(x.get(), HOST)


@RIGHT
@pytest.mark.parametrize("how", ["changed", "freed"])
def test_pageable_memory_of_an_upload_that_has_not_run(gpu, how, right):
    x, host = gpu.cupy.empty(1 << 20, "float32"), np.ones(1 << 20, np.float32)  # so large that freeing unmaps it
    x.data.copy_from_host_async(host.ctypes.data, x.nbytes)
    if right:
        gpu.cupy.cuda.Device().synchronize()
    if how == "changed":
        host[5] = 2
    del host
    with told(right, "host memory was changed or freed before its upload"):
        assert (x.get() == 1).all()


@RIGHT
@pytest.mark.parametrize("how", ["kernel", "cuBLAS", "with an offset"])
def test_an_address_is_kept_longer_than_its_array(gpu, how, right):
    x, y = gpu.cupy.asarray(HOST), gpu.cupy.zeros(N, "float32")
    address, kept = x.data.ptr, x if right else None
    del x
    other = gpu.cupy.zeros(N, "float32")  # takes the freed memory: the address would be good again
    assert (other.data.ptr == address) is not right
    one, nought = (np.array(v, np.float32) for v in (1, 0))
    with told(right, r"an address is used whose array is gone \(at .*test_cuda_queues.py:\d+\)"):
        if how == "cuBLAS":
            args = (one.ctypes.data, address, 0, 1, address, 0, 1, nought.ctypes.data, y.data.ptr, 0, 1, 68, -1)
            cublas.gemmEx(1, 0, 0, 1, 1, 1, *args)
        else:
            gpu.twice(address + 4 if how == "with an offset" else address, y, N - 1)
    del kept


@RIGHT
def test_a_result_is_read_before_it_is_there(gpu, right):
    x, y = gpu.on(gpu.a, HOST, None)
    with gpu.a:
        gpu.twice(x, y)
        result = y.get(blocking=False)
        if right:
            gpu.a.synchronize()
        assert np.isnan(result).all() is np.bool_(not right)
        gpu.a.synchronize()
        assert np.array_equal(result, 2 * HOST)


@RIGHT
@pytest.mark.parametrize("how", ["changed", "dropped"])
def test_the_target_of_a_download_that_has_not_run(gpu, how, right):
    x = gpu.cupy.asarray(HOST)
    result = x.get(blocking=right)
    if how == "changed":
        result[3] = 0
    else:
        del result
    with told(right, r"host memory was changed or freed before a download \(asked for at .*test_cuda_queues"):
        gpu.cupy.cuda.Stream.null.synchronize()


@RIGHT
def test_pinned_memory_of_a_download_that_has_not_run(gpu, right):
    x, pinned = gpu.cupy.asarray(HOST), gpu.cupy.cuda.alloc_pinned_memory(HOST.nbytes)
    place = np.frombuffer(pinned, np.float32, N)
    x.data.copy_to_host_async(pinned.ptr, x.nbytes)
    assert np.isnan(place).all()
    if right:
        gpu.cupy.cuda.Stream.null.synchronize()
        assert np.array_equal(place, HOST)
    place[0] = 5
    with told(right, "host memory was changed or freed before a download"):
        gpu.cupy.cuda.Stream.null.synchronize()


@pytest.mark.parametrize("how", ["never", "too early", "in another stream", "right"])
def test_an_event_that_stands_for_less_than_is_needed(gpu, how):
    x, y = gpu.on(gpu.a, HOST, None)
    (z,) = gpu.on(gpu.b, None)
    event = gpu.cupy.cuda.Event()
    if how == "too early":
        event.record(gpu.a)
    with gpu.a:
        gpu.twice(x, y)
    if how == "in another stream":
        event.record(gpu.b)
    if how == "right":
        event.record(gpu.a)
    gpu.b.wait_event(event)
    with told(how == "right"), gpu.b:
        gpu.twice(y, z)
        assert np.array_equal(z.get(), 4 * HOST)


@RIGHT
def test_a_stream_writes_what_another_still_reads(gpu, right):
    (x, y), (z,) = gpu.on(gpu.a, HOST, None), gpu.on(gpu.b, HOST)
    with gpu.a:
        gpu.twice(x, y)
    if right:
        gpu.a.synchronize()
    with told(right, f"writes memory that kernel twice on .* reads, and {UNORDERED}"), gpu.b:
        gpu.twice(z, x)


@RIGHT
def test_work_of_numpy_functions_and_of_cublas_is_ordered_too(gpu, right):
    x, y = gpu.on(gpu.a, np.eye(8, dtype=np.float32), np.zeros((8, 8), np.float32))
    one, nought = (np.array(v, np.float32) for v in (1, 0))
    with gpu.a:
        x *= 3
    if right:
        gpu.b.wait_event(gpu.a.record())
    with told(right, "a product of cuBLAS on .* reads memory that multiply on "), gpu.b:
        args = (one.ctypes.data, x.data.ptr, 0, 8, x.data.ptr, 0, 8, nought.ctypes.data, y.data.ptr, 0, 8, 68, -1)
        cublas.gemmEx(1, 0, 0, 8, 8, 8, *args)
        assert np.array_equal(y.get(), 9 * np.eye(8))


@pytest.mark.parametrize("extra", [19, 20, 24])
def test_out_of_bounds_by_one_is_told_with_the_launch(gpu, extra):
    x = gpu.cupy.zeros(20, "float32")
    launch = gpu.cupy.RawModule(code=samples.MISTAKES).get_function("writes_behind")
    launch((1,), (1,), (x, np.int32(extra)))
    y = gpu.cupy.ones(3)
    right = extra == 19
    with told(right, r"(wrote just outside|behind the end of an array).*; launched at .*test_cuda_queues", KernelError):
        assert x.get()[-1] == 1
    gpu.cupy.cuda.Device().synchronize()  # what waited behind the mistake is lost, and the next work runs
    assert np.isnan(y.get()).all() is np.bool_(not right)
    assert (gpu.cupy.ones(3).get() == 1).all()


def test_an_elapsed_time_is_known_when_both_events_have_happened(gpu):
    start, end = gpu.a.record(), gpu.a.record()
    with pytest.raises(CUDARuntimeError, match="cudaErrorNotReady"):
        gpu.cupy.cuda.get_elapsed_time(start, end)
    end.synchronize()
    assert 0 <= gpu.cupy.cuda.get_elapsed_time(start, end) < 60_000
    with pytest.raises(CUDARuntimeError, match="cudaErrorInvalidValue"):
        gpu.cupy.cuda.get_elapsed_time(start, gpu.cupy.cuda.Event())


# What is right --------------------------------------------------------------------------------------------------------


def test_nothing_runs_before_the_host_waits(gpu):
    x, y = gpu.on(gpu.a, HOST, None)
    with gpu.a:
        gpu.twice(x, y)
        event = gpu.a.record()
        gpu.twice(y, x)
    assert (y._host == 0).all()  # the device's memory itself
    assert not event.done
    event.synchronize()
    assert np.array_equal(y._host, 2 * HOST)
    assert np.array_equal(x._host, HOST)
    assert event.done
    gpu.cupy.cuda.Device().synchronize()
    assert np.array_equal(x._host, 4 * HOST)


def test_who_asks_an_event_again_and_again_gets_there(gpu):
    x = gpu.cupy.asarray(HOST)
    for _ in range(5):
        x += 1
    event = gpu.cupy.cuda.Stream.null.record()
    asked = 0
    while not event.done:
        asked += 1
    assert 0 < asked < 10
    assert np.array_equal(x._host, HOST + 5)


def test_one_stream_takes_its_own_freed_memory_at_once(gpu):
    y = gpu.cupy.zeros(N, "float32")
    x = gpu.cupy.asarray(HOST)
    address = int(x.data.ptr)
    gpu.twice(x, y)
    del x
    z = gpu.cupy.full(N, 3, "float32")
    assert int(z.data.ptr) == address
    assert np.array_equal(y.get(), 2 * HOST)
    assert (z.get() == 3).all()


def test_freed_memory_is_spoilt_before_it_is_given_out_again(gpu):
    x = gpu.cupy.asarray(HOST)
    address = int(x.data.ptr)
    del x
    y = gpu.cupy.empty(N, "float32")
    assert int(y.data.ptr) == address
    assert np.isnan(y.get()).all()


def test_a_blocking_stream_and_the_null_stream_wait_for_each_other(gpu):
    blocking = gpu.cupy.cuda.Stream()
    x, y = gpu.cupy.asarray(HOST), gpu.cupy.zeros(N, "float32")
    with blocking:
        gpu.twice(x, y)
    gpu.twice(y, x)
    with blocking:
        assert np.array_equal(x.get(), 4 * HOST)
        gpu.twice(x, y)
    with gpu.b, pytest.raises(HazardError, match="reads memory that kernel twice on"):
        y.get()


def test_streams_may_share_an_array_if_not_its_bytes(gpu):
    (x,) = gpu.on(gpu.a, HOST)
    half = N // 2
    for stream, part in ((gpu.a, x[:half]), (gpu.b, x[half:])):
        with stream:
            part *= 2
    gpu.cupy.cuda.Device().synchronize()
    assert np.array_equal(x.get(), 2 * HOST)
    for stream, part in ((gpu.a, x[:half]), (gpu.b, x[half:])):
        with stream:
            y = part + 1
            assert np.array_equal(y.get(), part.get() + 1)


def test_events_order_through_a_third_stream(gpu):
    x, y = gpu.on(gpu.a, HOST, None)
    third = gpu.cupy.cuda.Stream(non_blocking=True)
    with gpu.a:
        gpu.twice(x, y)
    gpu.b.wait_event(gpu.a.record())
    third.wait_event(gpu.b.record())
    with third:
        assert np.array_equal(y.get(), 2 * HOST)


def test_each_thread_has_a_stream_and_a_device_of_its_own(gpu):
    seen = []
    with gpu.cupy.cuda.Device(1), gpu.cupy.cuda.Stream():
        current = lambda: (gpu.cupy.cuda.runtime.getDevice(), gpu.cupy.cuda.get_current_stream().ptr == 0)  # noqa: E731
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
        seen.append(current())
    assert [*seen, current()] == [(0, True), (1, False), (0, True)]
