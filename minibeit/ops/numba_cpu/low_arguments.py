"""Products of low precision: the instructions that this CPU has for them, and the arguments of their kernels.

A *level row* is a row of x as the products read it: HEADER_BYTES, which begin with its factor (float32) and zero point
(int32), then its elements as the route wants them.  Panels are as for float32, but a step of the sum takes several
elements of a row:

route        a step of a row      of a column          instruction
vpdpbusd     4 levels, uint8      4 weights, int8      AVX512-VNNI, AVX-VNNI
sdot         4 levels - 128       4 weights, int8      NEON's dot product
pairs        2 levels, int16      2 weights, int8      (v)pmaddwd, smlal: widened to 16 bits, so that nothing saturates
vdpbf16ps    2 bfloat16           2 bfloat16           AVX512-BF16
widened      1 float32            1 bfloat16           a shift and a float32 multiply-add
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from llvmlite import binding as llvm

from .arguments import ATTENTION, Arguments
from .target import target_machine

HEADER_BYTES = 64
COLUMNS = 3  # rows of constants for each panel: factors, bias, sums of the integer weights

# LLVM makes one instruction of these forms where the target has it: what it emits tells, without a list of CPUs.
_DOT_OF_PAIRS = """
define <16 x i32> @probe(<16 x i32> %sums, <32 x i16> %a, <32 x i16> %b) {
  %x = sext <32 x i16> %a to <32 x i32>
  %y = sext <32 x i16> %b to <32 x i32>
  %products = mul <32 x i32> %x, %y
  %even = shufflevector <32 x i32> %products, <32 x i32> undef, <16 x i32> <i32 0, i32 2, i32 4, i32 6, i32 8, i32 10,
      i32 12, i32 14, i32 16, i32 18, i32 20, i32 22, i32 24, i32 26, i32 28, i32 30>
  %odd = shufflevector <32 x i32> %products, <32 x i32> undef, <16 x i32> <i32 1, i32 3, i32 5, i32 7, i32 9, i32 11,
      i32 13, i32 15, i32 17, i32 19, i32 21, i32 23, i32 25, i32 27, i32 29, i32 31>
  %both = add <16 x i32> %even, %odd
  %result = add <16 x i32> %sums, %both
  ret <16 x i32> %result
}
"""
_DOT_OF_BYTES = """
define i32 @probe(<16 x i8> %a, <16 x i8> %b) {
  %x = sext <16 x i8> %a to <16 x i32>
  %y = sext <16 x i8> %b to <16 x i32>
  %products = mul <16 x i32> %x, %y
  %result = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %products)
  ret i32 %result
}
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
"""
_TO_BFLOAT16 = """
define <16 x bfloat> @probe(<16 x float> %a) {
  %x = fptrunc <16 x float> %a to <16 x bfloat>
  ret <16 x bfloat> %x
}
"""


@dataclass(frozen=True)
class Route:
    """How one step of a sum is made: the elements it takes, and their bytes in a level row and in a panel."""

    name: str
    elements: int
    row_bytes: int  # of one element
    panel_bytes: int  # of one element


_INT8 = {
    "vpdpbusd": Route("vpdpbusd", 4, 1, 1),
    "sdot": Route("sdot", 4, 1, 1),
    "pairs": Route("pairs", 2, 2, 1),
}
_BFLOAT16 = {"vdpbf16ps": Route("vdpbf16ps", 2, 2, 2), "widened": Route("widened", 1, 4, 2)}


def _emits(probe: str, word: str) -> bool:
    module, machine = llvm.parse_assembly(probe), target_machine()
    module.triple = machine.triple
    return word in machine.emit_assembly(module)


def _is_arm() -> bool:
    return target_machine().triple.startswith(("aarch64", "arm64"))


@lru_cache(maxsize=1)
def int8_route() -> Route:
    """The fastest exact way to int32 sums that the target has."""
    if _is_arm():
        return _INT8["sdot" if _emits(_DOT_OF_BYTES, "sdot") else "pairs"]
    # A CPU that adds products of pairs (vpdpwssd) also adds products of four bytes (vpdpbusd).
    return _INT8["vpdpbusd" if _emits(_DOT_OF_PAIRS, "vpdpwssd") else "pairs"]


@lru_cache(maxsize=1)
def bfloat16_route() -> Route:
    """The fastest way to sums of products of bfloat16 that the target has."""
    knows = llvm.llvm_version_info[0] >= 20  # those of numba before 0.62 end the process over a vector of bfloat16
    fast = knows and not _is_arm() and _emits(_DOT_OF_PAIRS, "zmm") and _emits(_TO_BFLOAT16, "vcvtneps2bf16")
    return _BFLOAT16["vdpbf16ps" if fast else "widened"]


LEVEL_ROWS = 32  # per task

QUANTISE = Arguments(
    operands=(
        "x",  # `count` rows of `width` elements
        "y",  # the result: `count` level rows
    ),
    numbers=(
        "x_bytes",  # between rows of x
        "count",  # rows
        "width",  # elements of a row
        "y_bytes",  # between level rows
    ),
)

ROUND = Arguments(QUANTISE.operand_names, QUANTISE.number_names)  # the same for bfloat16

INT8_PRODUCT = Arguments(
    operands=(
        "x",  # `count` level rows
        "panels",  # for each product the same number
        "columns",  # for each panel COLUMNS rows of NR constants
        "y",  # the result: `count` rows of `out` elements
        "scale",  # for RESIDUAL, optional: `out` factors
        "residual",  # for RESIDUAL: `count` rows of `out` elements
    ),
    numbers=(  # as of PRODUCT
        "x_bytes",
        "count",
        "steps",
        "out",
        "y_bytes",
        "mode",
        "residual_bytes",
        "side",
        "blocks",
        "group",
        "unit",
        "y_unit_bytes",
        "x_product_bytes",
        "y_pair_bytes",
        "y_odd_bytes",
        "panel_bytes",
    ),
)

ATTENTION_BFLOAT16 = Arguments(ATTENTION.operand_names, ATTENTION.number_names)

BFLOAT16_PRODUCT = Arguments(INT8_PRODUCT.operand_names, INT8_PRODUCT.number_names)
