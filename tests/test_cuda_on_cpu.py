"""The stand-in for CuPy itself: rounding, barriers, shuffles, reported mistakes, refused arguments, counted copies."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_on_cpu import cublas, fake_cupy, kernels, samples
from cuda_on_cpu.fake_cupy import pretend
from cuda_on_cpu.kernels import KernelError
from cuda_on_cpu.world import CUDADriverError, CUDARuntimeError, OutOfMemoryError, counted, world

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no g++ to compile CUDA C++ with")
ORDERS = pytest.mark.parametrize("backwards", [False, True])


@pytest.fixture
def cupy():
    with pretend(memory=1 << 26) as module:
        yield module


def randoms(*shape, dtype="float32"):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


# Kernels ------------------------------------------------------------------------------------------------------------


def awkward_floats() -> np.ndarray:
    """Every float16, the floats halfway between neighbours and their neighbours, random bits, and the edges."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    middle = (finite[1:] + finite[:-1]) / 2
    brain = (np.arange(65536, dtype=np.uint32) << 16 | 0x8000).view(np.float32)  # halfway between two bfloat16
    bits = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    edges = np.array([65504, 65519.996, 65520, 1e9, 3.4e38, np.inf, 0.0, 2**-25, 2**-24, 1e-45], np.float32)
    parts = [halves, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf), brain, bits, edges, -edges]
    return np.concatenate(parts)


def test_conversions_round_to_nearest_even(cupy):
    module = cupy.RawModule(code=samples.HALVES)
    with np.errstate(all="ignore"):
        x = awkward_floats()
        half, brain = x.astype(np.float16), cublas.bfloat16_bits(x)
    n = x.size
    h, b = cupy.empty(n, "float16"), cupy.empty(n, "uint16")
    module.get_function("narrow")((-(-n // 256),), (256,), (cupy.asarray(x), h, b, n))
    assert np.array_equal(h.get(), half, equal_nan=True)
    assert np.array_equal(b.get()[~np.isnan(x)], brain[~np.isnan(x)])
    back = cupy.empty(n, "float32")
    module.get_function("widen")((-(-n // 256),), (256,), (h, back, n))
    assert np.array_equal(back.get(), half.astype(np.float32), equal_nan=True)


def test_bfloat16_is_that_of_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with np.errstate(all="ignore"):
        x = awkward_floats()
        x = x[~np.isnan(x)]
        assert np.array_equal(cublas.bfloat16_bits(x), x.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_half_arithmetic_rounds_after_every_step(cupy):
    a, b = randoms(2, 300).astype(np.float16)
    y = cupy.empty(300, "float16")
    kernel = cupy.RawKernel(samples.HALVES, "arithmetic")
    kernel((1,), (96,), (cupy.asarray(a), cupy.asarray(b), y, np.int32(300)))
    assert np.array_equal(y.get(), a * b + a)


def test_threads_change_where_a_compiler_fortifies_jumps(cupy, monkeypatch):
    monkeypatch.setattr(kernels, "FLAGS", ["-D_FORTIFY_SOURCE=2", *kernels.FLAGS])  # the default of some systems
    x, y = randoms(2, 64), cupy.empty((2, 64), "float32")
    cupy.RawKernel(samples.ROWS, "softmax")((2,), (32,), (cupy.asarray(x), y, np.int32(64)))
    assert np.allclose(y.get().sum(1), 1)


@ORDERS
def test_softmax_of_one_warp(cupy, backwards, monkeypatch):
    monkeypatch.setattr(world, "backwards", backwards)
    x, y = randoms(5, 77), cupy.empty((5, 77), "float32")
    cupy.RawKernel(samples.ROWS, "softmax")((5,), (32,), (cupy.asarray(x), y, np.int32(77)))
    e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    assert np.abs(y.get() - e / e.sum(1, keepdims=True)).max() < 1e-7


@ORDERS
@pytest.mark.parametrize(("kind", "dtype", "limit"), [("float", np.float32, 2e-6), ("double", np.float64, 2e-15)])
def test_layer_norm_of_one_block(cupy, backwards, kind, dtype, limit, monkeypatch):
    monkeypatch.setattr(world, "backwards", backwards)
    names = ["layer_norm<float, 64>", "layer_norm<double, 64>", "layer_norm<float, 128>"]
    kernel = cupy.RawModule(code=samples.ROWS, name_expressions=names).get_function(f"layer_norm<{kind}, 64>")
    x, y = randoms(4, 101, dtype=dtype), cupy.empty((4, 101), dtype)
    kernel((4,), (64,), (cupy.asarray(x), y, 101, dtype(1e-6)), shared_mem=101 * x.itemsize)
    centred = x.astype(np.float64) - x.mean(1, keepdims=True, dtype=np.float64)
    assert np.abs(y.get() - centred / np.sqrt(np.square(centred).mean(1, keepdims=True) + 1e-6)).max() < limit


@ORDERS
@pytest.mark.parametrize(
    ("name", "threads", "extra", "words"),
    [
        ("divergent", 64, (), "__syncthreads is not reached by all threads"),
        ("leaves_early", 64, (), r"__syncthreads is not reached by all.* 1 of 64 have exited \(line 10\)"),
        ("half_a_warp", 32, (), "__shfl_xor_sync is not reached by all"),
        ("absent_lane", 16, (), "a shuffle reads a lane that does not take part"),
        ("writes_behind", 1, (24,), "16 bytes behind the end of an array of 80 bytes"),
        ("writes_behind", 1, (20,), "wrote just outside the array of parameter 0"),
        ("reads_before", 1, (), "bytes before an array of 80 bytes"),
        ("misaligned", 1, (), "misaligned"),
        ("index_outside", 1, (4,), "an index outside a fixed-size array"),
    ],
)
def test_mistakes_are_reported(cupy, backwards, name, threads, extra, words, monkeypatch):
    monkeypatch.setattr(world, "backwards", backwards)
    x = cupy.zeros(20, "float32")
    module = cupy.RawModule(code=samples.MISTAKES)
    with pytest.raises(KernelError, match=words):
        module.get_function(name)((1,), (threads,), (x, *map(np.int32, extra)))
        x.get()
    again = cupy.zeros(64, "float32")
    module.get_function("races_forwards")((1,), (1,), (again,))  # the emulation goes on after a mistake
    assert again.get()[1:].tolist() == [0] * 63


def test_a_missing_barrier_shows_in_one_of_the_orders(cupy, monkeypatch):
    module = cupy.RawModule(code=samples.MISTAKES)
    found = {}
    for name in ("races_forwards", "races_backwards"):
        for backwards in (False, True):
            monkeypatch.setattr(world, "backwards", backwards)
            x = cupy.zeros(64, "float32")
            module.get_function(name)((1,), (64,), (x,))
            found[name, backwards] = bool(np.isnan(x.get()).any())
    assert found["races_forwards", False]
    assert found["races_backwards", True]


@ORDERS
def test_warps_overtake_one_another_where_no_barrier_holds_them(cupy, backwards, monkeypatch):
    monkeypatch.setattr(world, "backwards", backwards)
    x = cupy.zeros(128, "float32")
    cupy.RawModule(code=samples.MISTAKES).get_function("overtakes")((1,), (64,), (x,))
    assert set(x.get()) != {1.0, 21.0}


def test_sources_that_do_not_compile(cupy):
    with pytest.raises(cupy.cuda.compiler.CompileException, match="cannot open source file 'cstdint'"):
        cupy.RawKernel("#include <cstdint>", "f")((1,), (1,), ())
    with pytest.raises(cupy.cuda.compiler.CompileException, match="kernels:2:"):
        cupy.RawKernel('extern "C" __global__ void f() {\n oops; }', "f")((1,), (1,), ())
    with pytest.raises(CUDADriverError, match="named symbol not found: g"):
        cupy.RawModule(code='extern "C" __global__ void f() {}').get_function("g")


def test_arguments_that_a_kernel_would_read_wrongly(cupy):
    code = 'extern "C" __global__ void __launch_bounds__(64) f(const float* x, int n, float a, double b) {}'
    f = cupy.RawModule(code=code).get_function("f")
    x, one = cupy.zeros(3, "float32"), np.float32(1)
    f((1,), (64,), (x, 3, one, 1.0))
    f((0,), (1,), (None, np.uint32(3), np.array(1, "float32"), np.float64(1)))
    f((1,), (1,), (x.data.ptr + 4, np.int32(3), one, 1.0))
    wrong = [
        (np.zeros(3, np.float32), 3, one, 1.0),
        (cupy.zeros(3, "float64"), 3, one, 1.0),
        (12345, 3, one, 1.0),
        (x, 2**31, one, 1.0),
        (x, np.int64(3), one, 1.0),
        (x, 3, 1.0, 1.0),
        (x, 3, one, one),
        (x, 3, one, 1),
        (x, 3, one),
        (x, 3, one, "1"),
        (x, x, one, 1.0),
    ]
    for args in wrong:
        with pytest.raises(TypeError):
            f((1,), (1,), args)
    for grid, block in (((1,), (65,)), ((1, 65536), (1,))):
        with pytest.raises(CUDADriverError, match="INVALID_VALUE"):
            f(grid, block, (x, 3, one, 1.0))
    with pytest.raises(TypeError, match="tuples"):
        f(1, (1,), (x, 3, one, 1.0))


# Arrays -------------------------------------------------------------------------------------------------------------


def test_host_arrays_are_refused_as_in_cupy(cupy):
    x, host = cupy.ones((2, 3), "float32"), np.ones((2, 3), np.float32)
    refused = [
        lambda: x + host,
        lambda: host * x,
        lambda: cupy.exp(host),
        lambda: cupy.concatenate([x, host]),
        lambda: cupy.ascontiguousarray(host),
        lambda: np.asarray(x),
        lambda: np.add(x, host),
        lambda: cupy.matmul(x, host.T),
        lambda: range(x[0, 0]),
        lambda: x.set(host.tolist()),
    ]
    for act in refused:
        with pytest.raises(TypeError):
            act()
    with pytest.raises(ValueError, match="cannot be used for fill"):
        x[0] = host[0]
    with pytest.raises(ValueError, match="Unsupported dtype"):
        cupy.asarray(["a"])


def test_copies_are_counted(cupy):
    with counted() as seen:
        x = cupy.asarray(np.ones((4, 2), np.float32))
        assert cupy.asarray(x, "float32") is x
        y = (x * 2 + np.float32(1)).T[:, 1:].reshape(-1).astype("float64")
        assert [c.way for c in seen.copies] == ["upload"]
        assert (bool(x.any()), float(y[0]), int(y.sum()), y[y > 2].shape) == (True, 3.0, 18, (6,))
        assert x[[0, 1]].get().tolist() == [[1, 1], [1, 1]]
        assert [c.way for c in seen.copies[1:]] == ["download"] * 4 + ["upload", "download"]
        assert "test_cuda_on_cpu.py" in seen.copies[0].place


def test_views_share_memory(cupy):
    x = cupy.zeros((3, 4), "float32")
    view = x.T[1:, ::2]
    view[...] = 5
    assert x.get()[::2, 1:].tolist() == [[5] * 3] * 2
    assert view.data.ptr == x.data.ptr + 4
    assert view.strides == (4, 32)
    copied = x.reshape(2, 6).copy()
    copied += 1
    assert not x.get()[1].any()
    assert np.isnan(cupy.empty((2, 2), "float32").get()).all()


def test_devices_pools_and_limits(cupy):
    pool = cupy.get_default_memory_pool()
    x = cupy.zeros(1000, "float32")
    with cupy.cuda.Device(1) as device:
        before = pool.used_bytes()
        y = cupy.zeros(1000, "float64")
        assert (device.id, y.device.id, pool.used_bytes() - before) == (1, 1, 8192)
        for other in (1, y):
            with pytest.raises(ValueError, match=r"array resides \(0\) is different from the current device \(1\)"):
                _ = x + other
        with pytest.raises(OutOfMemoryError, match="Out of memory allocating 67,108,864 bytes"):
            cupy.zeros(1 << 26, "uint8")
        pool.set_limit(size=8192 + before)
        with pytest.raises(OutOfMemoryError, match="limit set to"):
            cupy.zeros(1, "uint8")
        del y, other
        assert cupy.zeros(1000, "float64").size == 1000
        pool.set_limit(size=0)
    with pytest.raises(CUDARuntimeError, match="invalid device ordinal"):
        cupy.cuda.Device(2).use()
    with pretend(devices=0) as none, pytest.raises(CUDARuntimeError, match="no CUDA-capable device"):
        none.zeros(1)
    with pretend(driver=False) as none, pytest.raises(CUDARuntimeError, match="driver version is insufficient"):
        none.cuda.runtime.getDeviceCount()


# cuBLAS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "summed"), [("float32", "float32"), ("float64", "float64"), ("float16", "float32")])
@pytest.mark.parametrize("transposed", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_products_by_address(cupy, stored, summed, transposed):
    m, n, k, batch = 3, 5, 4, 2
    kind, compute = {"float32": (0, 68), "float64": (1, 70), "float16": (2, 68)}[stored]
    a, b = (
        randoms(batch, m, k, dtype=stored),
        randoms(batch, k, n, dtype=stored),
    )  # column-major: (batch, columns, rows)
    A = cupy.asarray(a if transposed[0] else np.ascontiguousarray(a.swapaxes(1, 2)))
    B = cupy.asarray(b if transposed[1] else np.ascontiguousarray(b.swapaxes(1, 2)))
    C = cupy.empty((batch, n, m + 1), stored)
    two, zero = np.array(2, summed), np.array(0, summed)
    handle = cupy.cuda.device.get_cublas_handle()
    cublas.gemmStridedBatchedEx(
        handle, *transposed, m, n, k, two.ctypes.data, A.data.ptr, kind, A.shape[2], A.size // batch,
        B.data.ptr, kind, B.shape[2], B.size // batch, zero.ctypes.data, C.data.ptr, kind, m + 1, n * (m + 1), batch,
        compute, -1,
    )  # fmt: skip
    truth = (2 * a.astype(summed) @ b.astype(summed)).astype(stored)
    found = C.get()
    assert np.allclose(found[:, :, :m].swapaxes(1, 2), truth, rtol=1e-3 if stored == "float16" else 1e-6)
    assert np.isnan(found[:, :, m]).all()  # what lies between the columns is not written
    with pytest.raises(cublas.CUBLASError, match="outside it"):
        cublas.gemmEx(
            handle, 0, 0, m, n, k, two.ctypes.data, A.data.ptr + 64, kind, 4 * m, B.data.ptr, kind, k,
            zero.ctypes.data, C.data.ptr, kind, m, compute, -1,
        )  # fmt: skip


def test_the_real_cupy_has_every_name_too():
    real = pytest.importorskip("cupy")
    served = fake_cupy.build()
    ours = [("", "cupy"), ("cuda.", "cupy.cuda"), ("cuda.runtime.", "cupy.cuda.runtime")]
    names = [prefix + name for prefix, module in ours for name in vars(served[module]) if name[:2] != "__"]
    names += [f"ndarray.{name}" for name in vars(served["cupy"].ndarray) if name[0] != "_"]
    for kind in ("Device", "Event", "Stream", "MemoryPool"):
        names += [f"cuda.{kind}.{name}" for name in vars(getattr(served["cupy.cuda"], kind)) if name[0] != "_"]
    assert len(names) > 150
    without_libraries = {"cuda.cublas", "cuda.Device.id", "cuda.Stream.ptr"}  # set on instances, or loaded on demand
    lacking = []
    for name in set(names) - without_libraries:
        thing = real
        for part in name.split("."):
            thing = getattr(thing, part, None)
        if thing is None and name != "newaxis":
            lacking.append(name)
    assert not lacking
