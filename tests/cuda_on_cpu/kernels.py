"""CUDA C++ sources to shared objects (g++, cached by content) and launches of what is in them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

INCLUDE = Path(__file__).with_name("include")
CACHE = Path(__file__).resolve().parents[2] / "build" / "cuda-on-cpu"  # ignored by git
KNOWN_INCLUDES = {"cuda_fp16.h", "cuda_bf16.h"}  # NVRTC has no C++ library either
# -O1 compiles in half the time of -O2; the checks report misaligned vectors and indices outside fixed-size arrays.
# Some systems fortify longjmp by default, which then aborts when one fiber jumps to another.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-w", "-fsanitize=alignment,bounds", "-ffp-contract=off", "-fno-strict-aliasing"]
FLAGS += ["-U_FORTIFY_SOURCE"]

KERNEL = re.compile(
    r"__global__\s+(?:static\s+)?void\s+(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\("
)
LAUNCH_BOUNDS = re.compile(r"__launch_bounds__\s*\(\s*(\d+)")
DYNAMIC_SHARED = re.compile(
    r"extern\s+__shared__\s+((?:__align__\s*\(\s*\d+\s*\)\s*)?)([\w:\s<>,*]+?)\s*(\w+)\s*\[\s*\]\s*;"
)


class CompileError(Exception):
    """What g++ said about a source."""


class KernelError(Exception):
    """What went wrong while a kernel ran; `address` is where, if it was a wild access."""

    def __init__(self, text: str, address: int) -> None:
        super().__init__(text)
        self.address = address


class _Report(ctypes.Structure):
    _fields_ = [("text", ctypes.c_char * 512), ("address", ctypes.c_size_t)]


def compiler() -> str | None:
    """The g++ of this machine, if it has one."""
    return shutil.which("g++")


class Kernel:
    """One entry of a compiled source: `parameters` describes what it takes, `launch` runs it to its end."""

    def __init__(self, library: ctypes.CDLL, number: int, name: str) -> None:
        self.name = name
        self._launch = getattr(library, f"emulated_launch_{number}")
        describe = getattr(library, f"emulated_signature_{number}")
        describe.restype = ctypes.c_char_p
        self.parameters: list[str] = describe().decode().split()

    def launch(
        self, arguments: Sequence[ctypes.c_char_p], grid: tuple, block: tuple, shared: int, backwards: bool
    ) -> None:
        """Runs every thread of every block.  `arguments` are addresses of the parameters' values."""
        sizes = (ctypes.c_uint * 6)(*grid, *block)
        pointers = (ctypes.c_void_p * max(1, len(arguments)))(*arguments)
        report = _Report()
        if self._launch(pointers, sizes, ctypes.c_uint(shared), int(backwards), ctypes.byref(report)):
            raise KernelError(f"{self.name}: {report.text.decode()}", report.address)


def kernel_names(source: str) -> list[str]:
    """Names of the kernels that a source defines outside templates."""
    return [m[1] for m in KERNEL.finditer(source) if not re.search(r"template\s*<[^;{}]*$", source[: m.start()])]


def compile_source(source: str, names: Sequence[str], options: Sequence[str] = ()) -> dict[str, Kernel]:
    """{name: kernel} for `names`, which may be expressions such as "softmax<float>".  Raises CompileError."""
    text = _translated(source, names)
    key = hashlib.sha256("\0".join([text, *options, *FLAGS]).encode())
    for header in sorted(INCLUDE.iterdir()):
        key.update(header.read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    library = CACHE / f"{key.hexdigest()[:32]}.so"
    if not library.exists():
        _build(text, options, library)
    loaded = ctypes.CDLL(str(library))
    return {name: Kernel(loaded, number, name) for number, name in enumerate(names)}


def _translated(source: str, names: Sequence[str]) -> str:
    """The source in a namespace of its own, which makes shared arrays in templates static indeed, and its entries."""
    for include in re.findall(r"#\s*include\s*[<\"]([^>\"]+)[>\"]", source):
        if include not in KNOWN_INCLUDES:
            raise CompileError(f"cannot open source file {include!r}; the emulation knows {sorted(KNOWN_INCLUDES)}")
    source = DYNAMIC_SHARED.sub(r"\2* const \3 = reinterpret_cast<\2*>(emulation::dynamic_shared);", source)
    entries = [
        f'extern "C" const char* emulated_signature_{i}() {{ return emulation::signature(&{name}); }}\n'
        f'extern "C" int emulated_launch_{i}(void** a, const unsigned* n, unsigned s, int b, emulation::Report* r) '
        f"{{ return emulation::launch(&{name}, a, n, s, b, r); }}\n"
        for i, name in enumerate(names)
    ]
    head = '#include "cuda_emulation.h"\nnamespace {\n#line 1 "kernels"\n'
    return f'{head}{source}\n}}\n#line 1 "entries"\n{"".join(entries)}'


def _build(text: str, options: Sequence[str], library: Path) -> None:
    defines = [option for option in options if re.match(r"-[DU]\w", option)]
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        source, unit, made = (Path(folder) / name for name in ("kernels.cpp", "kernels.o", "kernels.so"))
        source.write_text(text)
        _run(["g++", *FLAGS, *defines, f"-I{INCLUDE}", "-c", str(source), "-o", str(unit)])
        _run(["g++", "-shared", str(unit), "-o", str(made)])  # without -fsanitize: the header has its own handlers
        os.replace(made, library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr)
