"""The GPU: finding CuPy, the driver and the device, and saying in one sentence what is missing."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import DeviceError

try:
    import cupy
except ModuleNotFoundError as error:
    if error.name != "cupy":
        raise
    raise ModuleNotFoundError('backend cupy needs CuPy: pip install "minibeit[gpu]"', name="cupy") from None
except ImportError as error:
    _reason = (str(error).strip() or "?").splitlines()[0]
    raise ImportError(
        f"backend cupy: CuPy is installed but cannot be loaded ({_reason}); install the build for your CUDA, such as "
        "cupy-cuda12x or cupy-cuda13x, and only that one"
    ) from error

__all__ = ["cupy", "describe", "memory_limit", "open_device", "peak_memory", "session"]

_NO_DRIVER = ("cudaErrorInsufficientDriver", "cudaErrorInitializationError", "cudaErrorSystemDriverMismatch")


def open_device(index: int | None) -> int:
    """The number of the device to use, 0 by default, after checking that everything a model needs is installed.

    Raises DeviceError without driver, device or cuBLAS, ValueError for a number that no device has.
    """
    if index is not None and (isinstance(index, bool) or not isinstance(index, int)):
        raise ValueError(f"device: expected the number of a GPU, 0 being the first, found {index!r}")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(_no_device(str(error))) from error
    if count == 0:
        raise DeviceError(_no_device("cudaErrorNoDevice"))
    number = 0 if index is None else index
    if not 0 <= number < count:
        there = "only GPU 0 is" if count == 1 else f"GPUs 0 to {count - 1} are"
        raise ValueError(f"device: expected the number of a GPU, found {number}; {there} there (see nvidia-smi)")
    _check_libraries()
    return number


def _check_libraries() -> None:
    """Raises DeviceError if cuBLAS or CUDA's run-time compiler is not installed."""
    for name, what in (("cublas", "cuBLAS"), ("nvrtc", "the compiler NVRTC")):
        try:
            library = getattr(importlib.import_module("cupy.cuda"), name)
            if name == "nvrtc":
                library.getVersion()
        except (ImportError, RuntimeError) as error:
            raise DeviceError(
                f"backend cupy: {what} cannot be loaded ({(str(error).strip() or '?').splitlines()[0]}); install the "
                'CUDA toolkit, or its libraries with pip install "cupy-cuda12x[ctk]"'
            ) from error


def _no_device(reason: str) -> str:
    if any(name in reason for name in _NO_DRIVER):
        major = cupy.cuda.runtime.runtimeGetVersion() // 1000
        return (
            f"backend cupy: no NVIDIA driver was found, or it is older than the CUDA {major} that this CuPy was built "
            "for; see nvidia-smi, update the driver, or install the CuPy build for it (such as cupy-cuda11x)"
        )
    if "cudaErrorNoDevice" in reason:
        return "backend cupy: no NVIDIA GPU was found; see nvidia-smi and CUDA_VISIBLE_DEVICES, or use backend numba"
    return f"backend cupy: the GPU cannot be used ({reason}); see nvidia-smi"


def describe(index: int) -> str:
    """Name and memory of a device, and the versions of CUDA."""
    name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
    runtime, driver = (f"{v // 1000}.{v % 1000 // 10}" for v in _versions())
    return f"{name} ({memory_limit(index) / 1e9:.0f} GB, CUDA {runtime}, driver for CUDA {driver})"


def _versions() -> tuple[int, int]:
    return cupy.cuda.runtime.runtimeGetVersion(), cupy.cuda.runtime.driverGetVersion()


def memory_limit(index: int) -> int:
    """How many bytes of a device CuPy's pool may use: CUPY_GPU_MEMORY_LIMIT if set, else all its memory."""
    with cupy.cuda.Device(index) as device:
        return cupy.get_default_memory_pool().get_limit() or device.mem_info[1]


def peak_memory(index: int) -> int:
    """The most bytes that CuPy's pool has held on a device so far: its current size, as it never shrinks by itself."""
    with cupy.cuda.Device(index):
        return cupy.get_default_memory_pool().total_bytes()


@contextmanager
def session(index: int, dtype: str) -> Iterator[Any]:
    """Within it a model of `dtype` works on device `index`.  Raises MemoryError, saying what would fit.

    Whatever stream is current outside, the model's work is queued on the null stream of the device: threads share its
    weights and what it keeps from call to call, and CuPy gives freed memory out again in the order of one stream alone.
    """
    with cupy.cuda.Device(index), _on_null_stream():
        try:
            yield
        except cupy.cuda.memory.OutOfMemoryError as error:
            pool = cupy.get_default_memory_pool()
            taken = pool.used_bytes()
            traceback.clear_frames(error.__traceback__)  # its frames keep the arrays of the call alive
            message = _out_of_memory(index, dtype, pool.used_bytes(), taken, str(error))
            pool.free_all_blocks()
            raise MemoryError(message) from None


@contextmanager
def _on_null_stream() -> Iterator[None]:
    """The null stream is current, after what the caller's stream has to do; what comes later there is after this."""
    callers, null = cupy.cuda.get_current_stream(), cupy.cuda.Stream.null
    if callers.ptr == null.ptr:
        yield
        return
    null.wait_event(callers.record())
    try:
        with null:
            yield
    finally:
        callers.wait_event(null.record())


def _out_of_memory(index: int, dtype: str, before: int, taken: int, reason: str) -> str:
    limit = memory_limit(index)
    words = [word.replace(",", "") for word in reason.split()]
    wanted = next((int(word) for word in words if word.isdigit()), 0)
    needed, room = taken + wanted - before, limit - before
    advice = "use a smaller batch"
    if 0 < room < needed:
        advice += f" (at most {100 * room // needed} % of this one is likely to fit)"
    if dtype in ("float32", "float64"):
        advice += ", or dtype='bfloat16' or 'float16', which takes less"
    name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
    return (
        f"GPU {index} ({name}, {_size(limit)}) is out of memory: {_size(wanted)} more were wanted when {_size(taken)} "
        f"were in use, {_size(before)} of them before this call; {advice}"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
