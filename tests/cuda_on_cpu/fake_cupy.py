"""The pretended module `cupy`, put together, and `pretend`, which puts it in the real one's place for a while."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

from . import arrays, cublas, functions, kernels, memory, nccl, queues, streams
from .memory import MemoryPointer, memory_at
from .world import CUDADriverError, CUDARuntimeError, OutOfMemoryError, world

VERSION = "14.2.0"
DTYPES = "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool_"
STATIC_LIMIT = 48 * 1024  # bytes of shared memory that a kernel gets without asking
MODULES = ("cuda", "cuda.runtime", "cuda.memory", "cuda.device", "cuda.stream", "cuda.compiler", "cuda.nvrtc")


class CompileException(Exception):
    """What the compiler said about a kernel's source."""


# Kernels ------------------------------------------------------------------------------------------------------------


def argument(value: Any, parameter: str, where: str) -> Any:
    """`value` as ctypes for a parameter like "*f4c" or "i4".

    CuPy passes 8 bytes for an int or a float of Python, an address for an array, and checks nothing; what would be
    read wrongly by the kernel is a TypeError here.
    """
    pointer, kind, width = parameter[0] == "*", parameter.lstrip("*")[0], int(re.findall(r"\d+", parameter)[0])
    if value is None:
        value = 0
    if isinstance(value, MemoryPointer):
        value = value.ptr
    if isinstance(value, arrays.ndarray):
        arrays.check_device(value)
        names = HALVES.get(kind, (f"{NAMES.get(kind)}{8 * width}", "bool" if kind == "b" else ""))
        if not pointer or (kind not in "vs" and value.dtype.name not in names):
            raise TypeError(f"{where}: a kernel parameter {parameter} is given an array of {value.dtype}")
        return ctypes.c_void_p(value.data.ptr)
    if isinstance(value, np.ndarray):
        if value.size != 1:
            raise TypeError(f"{where}: You are trying to pass a numpy.ndarray of shape {value.shape}")
        value = value.reshape(())[()]
    if not isinstance(value, (bool, int, float, np.generic)):
        raise TypeError(f"Unsupported type {type(value)}")
    if pointer:
        if isinstance(value, (int, np.int64, np.uint64)) and (value == 0 or memory_at(value)):
            return ctypes.c_void_p(int(value))
        raise TypeError(f"{where}: a kernel parameter {parameter} is given {value!r}, no address of a device array")
    scalar = np.asarray(value)
    small_int = type(value) is int and kind in "iu" and np.can_cast(np.min_scalar_type(value), f"{kind}{width}")
    if not small_int and (scalar.itemsize != width or {scalar.dtype.kind, kind} not in ({kind}, {"i", "u"})):
        raise TypeError(f"{where}: a kernel parameter {parameter} is given {value!r} as {scalar.dtype}")
    return ctypes.create_string_buffer(scalar.astype(f"{'?' if kind == 'b' else kind + str(width)}").tobytes())


def use(value: Any, parameter: str) -> queues.Use | None:
    """What a kernel does with an argument's memory: it reads const arrays, writes others; by address, all of one."""
    write = parameter[-1] == "m"
    if parameter[0] != "*" or value is None:
        return None
    if isinstance(value, arrays.ndarray):
        return value.use(write)
    found = memory_at(value.ptr if isinstance(value, MemoryPointer) else int(value))
    return found and found.use(write)


NAMES = {"f": "float", "i": "int", "u": "uint"}
HALVES = {"h": ("float16",), "B": ("uint16", "bfloat16")}


class RawKernel:
    """A kernel of a source; compiled when it is first called."""

    def __init__(self, code: str, name: str, options: tuple = (), backend: str = "nvrtc", **kwargs: Any) -> None:
        self._module = kwargs.pop("module", None) or RawModule(code=code, options=options, backend=backend)
        self.name = self.__name__ = name
        self.max_dynamic_shared_size_bytes = STATIC_LIMIT

    def __call__(self, grid: tuple, block: tuple, args: Any, *, shared_mem: int = 0, stream: Any = None) -> None:
        if not isinstance(grid, tuple) or not isinstance(block, tuple):
            raise TypeError(f"Argument 'grid' and 'block' must be tuples, found {type(grid)}, {type(block)}")
        world.check()
        grid, block = (tuple(max(1, int(n)) for n in (*sizes, 1, 1)[:3]) for sizes in (grid, block))
        kernel, bound = self._module.compiled(self.name)
        threads = block[0] * block[1] * block[2]
        if threads > 1024 or block[2] > 64 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
            raise CUDADriverError(
                f"CUDA_ERROR_INVALID_VALUE: invalid argument: {self.name}, grid {grid}, block {block}"
            )
        if threads > bound:
            raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: {self.name} is bound to {bound} threads, block {block}")
        if shared_mem > self.max_dynamic_shared_size_bytes or shared_mem > 227 * 1024:
            raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: {self.name} asks for {shared_mem} bytes of shared memory")
        if len(args) != len(kernel.parameters):
            raise TypeError(f"{self.name} takes {len(kernel.parameters)} parameters, found {len(args)}")
        values = [
            argument(v, p, f"{self.name}, parameter {i}") for i, (v, p) in enumerate(zip(args, kernel.parameters))
        ]
        uses = [u for u in map(use, args, kernel.parameters) if u is not None]
        world.launches.append(self.name)
        around = {i: _place(v) for i, v in enumerate(args) if isinstance(v, arrays.ndarray)}
        size, backwards = int(shared_mem), world.backwards

        def run() -> None:
            _run(kernel, values, (grid, block, size, backwards), around)

        queues.launch(f"kernel {self.name}", run, uses, stream and stream.queue)


def _place(x: arrays.ndarray) -> tuple[memory.Block, int, int]:
    return x.data.mem.block, x.data.mem.ptr, x.data.mem.size


def _run(kernel: kernels.Kernel, values: list, how: tuple, around: dict[int, tuple[memory.Block, int, int]]) -> None:
    """Runs a kernel, then looks whether it wrote beside the arrays that are `around` its parameters."""
    try:
        kernel.launch([ctypes.addressof(v) for v in values], *how)
    except kernels.KernelError as error:
        place = f": {memory.where_is(error.address)}" if error.address else ""
        raise kernels.KernelError(f"{error}{place}", error.address) from None
    for i, (block, ptr, size) in around.items():
        if not block.spoilt_outside(ptr, size):
            raise kernels.KernelError(f"{kernel.name} wrote just outside the array of parameter {i}", ptr)


class RawModule:
    """A source of kernels; those of `name_expressions` are compiled together."""

    def __init__(
        self,
        code: str | None = None,
        *,
        path: str | None = None,
        options: tuple = (),
        backend: str = "nvrtc",
        name_expressions: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(options, tuple):
            raise TypeError(f"Argument 'options' has incorrect type (expected tuple, got {type(options).__name__})")
        if code is None or path is not None:
            raise TypeError("the stand-in compiles `code` only")
        self.code, self.options = code, options
        self.name_expressions = None if name_expressions is None else tuple(name_expressions)
        self._kernels: dict[str, kernels.Kernel] = {}

    def get_function(self, name: str) -> RawKernel:
        """The kernel of that name.  Raises CUDADriverError if the source has none."""
        self.compiled(name)
        return RawKernel(self.code, name, module=self)

    def compile(self, log_stream: Any = None) -> None:
        """Compiles at once.  Raises CompileException."""
        self.compiled(None)

    def compiled(self, name: str | None) -> Any:
        """(kernel, the most threads a block of it may have)."""
        world.check()
        if not self._kernels:
            try:
                names = (*kernels.kernel_names(self.code), *(self.name_expressions or ()))
                self._kernels = kernels.compile_source(self.code, tuple(dict.fromkeys(names)), self.options)
            except kernels.CompileError as error:
                raise CompileException(str(error)) from None
        if name is not None and name not in self._kernels:
            raise CUDADriverError(f"CUDA_ERROR_NOT_FOUND: named symbol not found: {name}, only {list(self._kernels)}")
        plain = (name or "").split("<")[0]
        bounds = re.search(rf"__launch_bounds__\s*\(\s*(\d+)[^;{{]*?\b{plain}\s*\(", self.code) if plain else None
        return self._kernels.get(name), int(bounds[1]) if bounds else 1024


# The module ---------------------------------------------------------------------------------------------------------


def _count() -> int:
    world.check()
    return world.devices


def _device() -> int:
    world.check()
    return world.current


def _properties(device: int) -> dict[str, Any]:
    world.check()
    if not 0 <= device < world.devices:
        raise CUDARuntimeError(101)
    name = f"Pretended GPU {device}".encode()
    return {"name": name, "major": 9, "minor": 0, "totalGlobalMem": world.memory, "multiProcessorCount": 132}


def _set_device(device: int) -> None:
    streams.Device(device).use()


def _synchronize() -> None:
    world.check()
    world.note_wait(queues.pending_on(world.current))
    queues.finish_device(world.current)


def _available() -> bool:
    return world.driver and world.devices > 0


def _handle() -> int:
    world.check()
    return 1


def _version(number: int) -> Any:
    return lambda: number


def build() -> dict[str, ModuleType]:
    """{dotted name: module} of everything that is pretended."""
    modules = {name: ModuleType(name) for name in ("cupy", *(f"cupy.{part}" for part in MODULES))}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        if "." in name:
            parent, _, last = name.rpartition(".")
            setattr(modules[parent], last, module)
    cupy, cuda = modules["cupy"], modules["cupy.cuda"]
    vars(cupy).update(functions.FUNCTIONS)
    vars(cupy).update(
        ndarray=arrays.ndarray,
        RawModule=RawModule,
        RawKernel=RawKernel,
        __version__=VERSION,
        get_default_memory_pool=lambda: memory.default_pool,
        newaxis=None,
        inf=np.inf,
        nan=np.nan,
        pi=np.pi,
        dtype=np.dtype,
    )
    for name in DTYPES.split():
        setattr(cupy, name, getattr(np, name))
    vars(cuda).update(
        Device=streams.Device,
        Stream=streams.Stream,
        Event=streams.Event,
        MemoryPool=memory.MemoryPool,
        MemoryPointer=MemoryPointer,
        alloc_pinned_memory=memory.alloc_pinned_memory,
        get_elapsed_time=streams.get_elapsed_time,
        get_current_stream=streams.get_current_stream,
        get_allocator=lambda: memory.allocator[0],
        set_allocator=lambda allocator=None: memory.allocator.__setitem__(0, allocator or memory.default_pool.malloc),
        is_available=_available,
        cublas=cublas,
        nccl=nccl,
    )
    vars(cuda.runtime).update(
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=_count,
        getDevice=_device,
        setDevice=_set_device,
        getDeviceProperties=_properties,
        runtimeGetVersion=_version(12090),
        driverGetVersion=_version(12090),
        deviceSynchronize=_synchronize,
        memGetInfo=lambda: streams.Device().mem_info,
    )
    vars(cuda.memory).update(OutOfMemoryError=OutOfMemoryError, MemoryPool=memory.MemoryPool)
    vars(cuda.device).update(Device=streams.Device, get_cublas_handle=_handle, get_device_id=_device)
    vars(cuda.stream).update(Stream=streams.Stream, Event=streams.Event)
    cuda.nvrtc.getVersion = lambda: (12, 9)
    vars(cuda.compiler).update(CompileException=CompileException)
    modules["cupy.cuda.cublas"] = cublas
    modules["cupy.cuda.nccl"] = nccl
    modules["cupy_backends.cuda.libs.cublas"] = cublas
    for name in ("cupy_backends", "cupy_backends.cuda", "cupy_backends.cuda.libs"):
        modules[name] = ModuleType(name)
        modules[name].__path__ = []
    modules["cupy_backends.cuda.libs"].cublas = cublas
    return modules


@contextmanager
def pretend(fresh: tuple[str, ...] = (), **settings: Any) -> Iterator[ModuleType]:
    """Puts the pretended `cupy` in place; modules whose names begin with one of `fresh` are imported anew inside.

    `settings` are fields of World (devices=, memory=, driver=, backwards=, asynchronous=).
    """
    ours = ("cupy", "cupyx", "cupy_backends", *fresh)
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if _belongs(name, ours)}
    before = {name: getattr(world, name) for name in (*settings, "current")}
    _change(settings)
    modules = build()
    sys.modules.update(modules)
    failed = True
    try:
        yield modules["cupy"]
        failed = False
    finally:
        for name in [name for name in sys.modules if _belongs(name, ours)]:
            del sys.modules[name]
        sys.modules.update(saved)
        try:
            queues.finish_all(quietly=failed)
        finally:
            _change(before)


def _change(settings: dict[str, Any]) -> None:
    """Changes the world when nothing waits in it."""
    queues.finish_all()
    memory.unmap_free()
    for name, value in settings.items():
        setattr(world, name, value)


def _belongs(name: str, families: tuple[str, ...]) -> bool:
    return any(name == family or name.startswith(f"{family}.") for family in families)
