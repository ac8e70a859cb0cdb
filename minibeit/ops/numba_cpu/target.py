"""What the compiler's target can do: vector width, register tile, and where compiled kernels are kept.

The *target* decides, not the host: `NUMBA_CPU_NAME=haswell` on an AVX-512 machine gives AVX2 code and AVX2 tiles.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numba
from llvmlite import binding as llvm
from numba.core import config
from numba.core.registry import cpu_target

_PROBE = """
define void @probe(ptr %p) {
  %a = load <16 x float>, ptr %p, align 4
  %b = call <16 x float> @llvm.fma.v16f32(<16 x float> %a, <16 x float> %a, <16 x float> %a)
  store <16 x float> %b, ptr %p, align 4
  ret void
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
def target_machine() -> llvm.TargetMachine:
    """The LLVM target machine that numba compiles for, with NUMBA_CPU_NAME and NUMBA_CPU_FEATURES respected."""
    codegen = cpu_target.target_context.codegen()
    triple, name, features = codegen.magic_tuple()
    if config.CPU_NAME and config.CPU_FEATURES is None:
        features = ""  # numba would keep the host's features beside the forced name: an AVX-512 haswell
    return llvm.Target.from_triple(triple).create_target_machine(cpu=name, features=features, opt=2)


@lru_cache(maxsize=1)
def choose_tile() -> Tile:
    """Picks the tile by looking at the assembly of a 16-float fused multiply-add: what LLVM emits is what we get."""
    module = llvm.parse_assembly(_PROBE)
    module.triple = target_machine().triple
    text = target_machine().emit_assembly(module)
    if "vfmadd" in text and "zmm" in text:
        return Tile("avx512", rows=12, vectors=2, lanes=16)  # 24 accumulators of 32 registers
    if "vfmadd" in text:
        return Tile("avx2", rows=6, vectors=2, lanes=8)  # 12 accumulators of 16 registers
    if "fmla" in text:
        return Tile("neon", rows=12, vectors=2, lanes=4)  # 24 accumulators of 32 registers
    return Tile("portable", rows=4, vectors=2, lanes=4)  # 8 accumulators of 16 registers, multiply and add apart


@lru_cache(maxsize=1)
def cache_folder() -> Path:
    """Folder of the compiled kernels: under NUMBA_CACHE_DIR if set, else the user's cache folder.

    Its name holds a digest of these sources, numba's version and the target CPU: numba's own cache looks only at the
    file of the kernel, not at the files that it calls into, and the package's folder may be read-only.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    digest.update(repr((numba.__version__, cpu_target.target_context.codegen().magic_tuple())).encode())
    if config.CACHE_DIR:
        base = Path(config.CACHE_DIR)
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "minibeit"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches" / "minibeit"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minibeit"
    return base / f"kernels-{digest.hexdigest()[:16]}"
