"""What the compiler's target can do: vector width and register tile.

The *target* decides, not the host: `NUMBA_CPU_NAME=haswell` on an AVX-512 machine gives AVX2 code and AVX2 tiles.
Nothing here imports numba, which takes longer than loading its machine code.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

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
    """Register tile of the matrix product: `rows` x (`vectors` * `lanes`) accumulators, all held in registers.

    `unroll` is how many steps of the sum one round of the loop does: where registers are left over for what LLVM loads
    early, more save instructions; where none are, it would spill accumulators.
    """

    name: str
    rows: int
    vectors: int
    lanes: int
    unroll: int = 4

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


def target_machine() -> llvm.TargetMachine:
    """A new LLVM target machine of `target()`; the engine that it is given to destroys it when it goes itself."""
    with suppress(RuntimeError):  # newer versions do it by themselves
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple, name, features = target()
    return llvm.Target.from_triple(triple).create_target_machine(cpu=name, features=features, opt=2, jit=True)


def choose_tile() -> Tile:
    """Picks the tile by looking at the assembly of a 16-float fused multiply-add: what LLVM emits is what we get."""
    module, machine = llvm.parse_assembly(_PROBE), target_machine()
    module.triple = machine.triple
    text = machine.emit_assembly(module)
    if "vfmadd" in text and "zmm" in text:  # 24 accumulators of 32 registers
        if target()[1].startswith("znver"):  # one multiply-add of 16 floats a cycle: loads are not what it waits for
            return Tile("avx512", rows=12, vectors=2, lanes=16)
        return Tile("avx512", rows=6, vectors=4, lanes=16)  # two a cycle: the fewest instructions for each of them
    if "vfmadd" in text:
        return Tile("avx2", rows=6, vectors=2, lanes=8)  # 12 accumulators of 16 registers
    if "fmla" in text:
        return Tile("neon", rows=6, vectors=4, lanes=4, unroll=1)  # 24 accumulators of 32 registers, 10 more values
    return Tile("portable", rows=4, vectors=2, lanes=4)  # 8 accumulators of 16 registers, multiply and add apart


TILE = choose_tile()
LANES, MR, NR = TILE.lanes, TILE.rows, TILE.columns
STEPS = 384  # products in a partial sum: a sum of such sums has smaller rounding errors than one long sum
SHORT_SUM = 96  # shorter partial sums for `linear`, which takes little time: the classifier's rounding shows in logits
