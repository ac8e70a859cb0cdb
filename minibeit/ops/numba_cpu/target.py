"""What the compiler's target can do: vector width, register tile, and where compiled kernels are kept.

The *target* decides, not the host: `NUMBA_CPU_NAME=haswell` on an AVX-512 machine gives AVX2 code and AVX2 tiles.
Nothing here imports numba, which takes longer than loading its machine code.
"""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import llvmlite
from llvmlite import binding as llvm

# Without pointers, whose spelling differs between the versions of LLVM.
_PROBE = """
define <16 x float> @probe(<16 x float> %a) {
  %b = call <16 x float> @llvm.fma.v16f32(<16 x float> %a, <16 x float> %a, <16 x float> %a)
  ret <16 x float> %b
}
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
"""


@dataclass(frozen=True)
class Tile:
    """Register tile of the matrix product: `rows` x (`vectors` * `lanes`) accumulators, all held in registers."""

    name: str
    rows: int
    vectors: int
    lanes: int

    @property
    def columns(self) -> int:
        """Width of one packed column panel, in floats."""
        return self.vectors * self.lanes


@lru_cache(maxsize=1)
def target() -> tuple[str, str, str]:
    """(triple, CPU, features) that kernels are compiled for; NUMBA_CPU_NAME and NUMBA_CPU_FEATURES are respected."""
    forced, features = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:  # a forced CPU has its own features, not those of the host
        features = "" if forced else llvm.get_host_cpu_features().flatten()
    return llvm.get_process_triple(), forced or llvm.get_host_cpu_name(), features


@lru_cache(maxsize=1)
def target_machine() -> llvm.TargetMachine:
    """The LLVM target machine of `target()`."""
    with suppress(RuntimeError):  # newer versions do it by themselves
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple, name, features = target()
    return llvm.Target.from_triple(triple).create_target_machine(cpu=name, features=features, opt=2, jit=True)


def choose_tile() -> Tile:
    """Picks the tile by looking at the assembly of a 16-float fused multiply-add: what LLVM emits is what we get."""
    module = llvm.parse_assembly(_PROBE)
    module.triple = target_machine().triple
    text = target_machine().emit_assembly(module)
    if "vfmadd" in text and "zmm" in text:  # 24 accumulators of 32 registers
        if target()[1].startswith("znver"):  # one multiply-add of 16 floats a cycle: loads are not what it waits for
            return Tile("avx512", rows=12, vectors=2, lanes=16)
        return Tile("avx512", rows=6, vectors=4, lanes=16)  # two a cycle: the fewest instructions for each of them
    if "vfmadd" in text:
        return Tile("avx2", rows=6, vectors=2, lanes=8)  # 12 accumulators of 16 registers
    if "fmla" in text:
        return Tile("neon", rows=12, vectors=2, lanes=4)  # 24 accumulators of 32 registers
    return Tile("portable", rows=4, vectors=2, lanes=4)  # 8 accumulators of 16 registers, multiply and add apart


TILE = choose_tile()
LANES, MR, NR = TILE.lanes, TILE.rows, TILE.columns
STEPS = 384  # products summed in one go: the rounding errors of a sum of such sums are smaller than of one long sum
FEW_STEPS = 96  # the same for layers that take little of the time, of which the last one has the last word


@lru_cache(maxsize=1)
def cache_folder() -> Path:
    """Folder of the compiled kernels: under NUMBA_CACHE_DIR if set, else the user's cache folder.

    Its name holds a digest of the backend's sources (kernels take constants from the modules that run them), the
    compiler's versions and the target.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    digest.update(repr((_numba_version(), llvmlite.__version__, target())).encode())
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        base = Path(chosen)
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "minibeit"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches" / "minibeit"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minibeit"
    return base / f"kernels-{digest.hexdigest()[:16]}"


def _numba_version() -> bytes:
    """The file in which numba keeps its version, or where it is installed: read without importing it."""
    spec = find_spec("numba")
    if spec is None or spec.origin is None:
        return b""
    version = Path(spec.origin).with_name("_version.py")
    return version.read_bytes() if version.is_file() else spec.origin.encode()
