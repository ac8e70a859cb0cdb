"""What a user reads where CuPy, the driver, the device or its memory are missing; several devices."""

from __future__ import annotations

import gc
import sys
from types import ModuleType

import numpy as np
import pytest
from conftest import random_weights, tiny_config
from cuda_on_cpu.fake_cupy import pretend
from cuda_on_cpu.kernels import compiler

from minibeit import BeitForImageClassification
from minibeit.errors import DeviceError
from minibeit.ops import get_ops

FRESH = ("minibeit.ops.cupy_gpu",)
PIXELS = np.random.default_rng(0).standard_normal((2, 3, 12, 8)).astype(np.float32)
CONFIG = tiny_config(use_relative_position_bias=True)
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no g++ to run kernels on the CPU with")


def model(**options) -> BeitForImageClassification:
    arrays = random_weights(CONFIG, "image_classification", dtype="float32")
    return BeitForImageClassification(CONFIG, arrays=arrays, backend="cupy", **options)


@pytest.fixture
def without_backend(monkeypatch):
    """No module of the backend is loaded, so that the next use imports it anew."""
    for name in [name for name in sys.modules if name.startswith(("cupy", *FRESH))]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.startswith(FRESH)]:
        del sys.modules[name]


def test_without_cupy(without_backend, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r'^backend cupy needs CuPy: pip install "minibeit\[gpu\]"$'):
        get_ops("cupy")


def test_cupy_that_cannot_be_loaded(without_backend, monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('libcuda.so.1: cannot open\\nmore lines')")
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = r"CuPy is installed but cannot be loaded \(libcuda.so.1: cannot open\); install the build for your CUDA"
    with pytest.raises(ImportError, match=expected):
        get_ops("cupy")


def test_no_driver():
    with (
        pretend(fresh=FRESH, driver=False),
        pytest.raises(
            DeviceError, match=r"^backend cupy: no NVIDIA driver was found, or it is older than the CUDA 1\d "
        ),
    ):
        get_ops("cupy")


def test_no_device():
    with (
        pretend(fresh=FRESH, devices=0),
        pytest.raises(DeviceError, match=r"^backend cupy: no NVIDIA GPU was found; see"),
    ):
        get_ops("cupy")


@pytest.mark.parametrize(("name", "what"), [("cublas", "cuBLAS"), ("nvrtc", "the compiler NVRTC")])
def test_cuda_libraries_are_missing(name, what):
    class Lazy(ModuleType):
        def __getattr__(self, asked):
            if asked == name:
                raise ImportError("Failure finding libx.so.12\nand so on")
            raise AttributeError(asked)

    with pretend(fresh=FRESH) as cupy:
        broken = Lazy("cupy.cuda")
        broken.__dict__.update({key: value for key, value in vars(cupy.cuda).items() if key != name})
        sys.modules["cupy.cuda"] = broken
        expected = rf"{what} cannot be loaded \(Failure finding libx.so.12\); install the CUDA toolkit"
        with pytest.raises(DeviceError, match=expected):
            get_ops("cupy")


@pytest.mark.parametrize(
    ("device", "devices", "message"),
    [
        (2, 2, r"expected the number of a GPU, found 2; GPUs 0 to 1 are there"),
        (-1, 1, r"expected the number of a GPU, found -1; only GPU 0 is there"),
        ("cuda:0", 1, r"expected the number of a GPU, 0 being the first, found 'cuda:0'"),
        (True, 1, r"expected the number of a GPU, 0 being the first, found True"),
    ],
)
def test_device_numbers(device, devices, message):
    with pretend(fresh=FRESH, devices=devices), pytest.raises(ValueError, match=f"^device: {message}"):
        get_ops("cupy", device=device)


def test_dtypes_of_a_gpu():
    expected = "dtype: expected 'float32' or 'float64' or 'float16' or 'bfloat16', found 'int4'"
    with pretend(fresh=FRESH), pytest.raises(ValueError, match=expected):
        get_ops("cupy", dtype="int4")
    with pretend(fresh=FRESH), pytest.raises(ValueError, match=r"dtype: int8 is for CPUs \(backend='numba'\)"):
        get_ops("cupy", dtype="int8")


def test_a_missing_device_is_found_before_a_checkpoint_is_read(tmp_path):
    with pretend(fresh=FRESH, devices=0), pytest.raises(DeviceError):
        BeitForImageClassification.from_pretrained(tmp_path / "nothing here", backend="cupy")


@needs_compiler
def test_out_of_memory_says_what_would_fit():
    gc.collect()  # models of other tests
    with pretend(fresh=FRESH, memory=1 << 20) as cupy:
        m = model()
        weights = cupy.get_default_memory_pool().used_bytes()
        expected = (
            r"GPU 0 \(.*, 1.05 MB\) is out of memory: \d.* more were wanted when .* were in use, .* before this call; "
            r"use a smaller batch \(at most \d+ % of this one is likely to fit\), or dtype='bfloat16'"
        )
        with pytest.raises(MemoryError, match=expected) as caught:
            m(np.zeros((2000, 3, 12, 8), np.float32))
        assert cupy.get_default_memory_pool().used_bytes() <= weights + 20_000  # the bias index and nothing else
        assert caught.value.__cause__ is None
        assert np.isfinite(m(PIXELS).logits).all()


@needs_compiler
def test_models_on_several_devices():
    arrays = random_weights(CONFIG, "image_classification", dtype="float32")
    expected = BeitForImageClassification(CONFIG, arrays=arrays, backend="numpy")(PIXELS).logits
    with pretend(fresh=FRESH, devices=2) as cupy:
        first, second = model(device=0), model(device=1)
        for m, place in ((first, 0), (second, 1), (first, 0)):
            assert m.params.classifier.weight.device.id == place
            np.testing.assert_allclose(m(PIXELS).logits, expected, rtol=1e-4, atol=1e-5)
            assert cupy.cuda.runtime.getDevice() == 0
        assert "on GPU 1" in repr(second)


def test_memory_that_a_pool_holds():
    with pretend(fresh=FRESH, memory=1 << 24) as cupy:
        from minibeit.ops.cupy_gpu import device

        with cupy.cuda.Device(1):
            kept = cupy.zeros(100_000, np.float32)
        assert device.peak_memory(1) >= kept.nbytes
        assert device.memory_limit(0) == 1 << 24
        assert "GPU 0" in device.describe(0)
