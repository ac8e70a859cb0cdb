"""Which instructions make the products of low precision on which CPU, and which of them were run.

Run: the route of this CPU, by tests/test_numba_low_precision.py; with `-m slow`, in processes that compile for another
CPU, `pairs` and `widened` on SSE, on AVX2 and on AVX-512 without VNNI.  Compiled only, unless this is an ARM CPU that
has it: `sdot`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")
from llvmlite import binding as llvm

from minibeit.ops import numba_cpu

if not numba_cpu.COMPILED:
    pytest.skip("NUMBA_DISABLE_JIT is set", allow_module_level=True)

from minibeit.ops.numba_cpu import low_arguments

ROOT = Path(__file__).resolve().parent.parent
KNOWS_BFLOAT16 = llvm.llvm_version_info[0] >= 20  # the LLVM of numba 0.62 and later
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 CPUs")

# CPU that numba is told to compile for -> (the routes, what the host must have to run them)
ROUTES = {
    "nehalem": ("pairs", "widened", "sse4.2"),
    "haswell": ("pairs", "widened", "avx2"),
    "skylake-avx512": ("pairs", "widened", "avx512bw"),
    "cascadelake": ("vpdpbusd", "widened", "avx512vnni"),
    "alderlake": ("vpdpbusd", "widened", "avxvnni"),
    "znver4": ("vpdpbusd", "vdpbf16ps", "avx512bf16"),
    "sapphirerapids": ("vpdpbusd", "vdpbf16ps", "amx-tile"),
}


def python(code, cpu):
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "MINIBEIT_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


ASK = "from minibeit.ops.numba_cpu.low_arguments import *; print(int8_route().name, bfloat16_route().name)"


@x86_only
@pytest.mark.parametrize("cpu", ROUTES)
def test_the_route_follows_the_cpu(cpu):
    if cpu == "znver4" and not KNOWS_BFLOAT16:
        pytest.skip("the LLVM of this numba does not know that CPU")
    int8, bfloat16, _ = ROUTES[cpu]
    assert python(ASK, cpu).split() == [int8, bfloat16 if KNOWS_BFLOAT16 else "widened"]


def test_this_cpu_takes_the_instructions_that_it_says_it_has():
    features = llvm.get_host_cpu_features()
    if os.environ.get("NUMBA_CPU_NAME"):
        pytest.skip("numba is told to compile for another CPU")
    if features.get("avx512vnni") or features.get("avxvnni"):
        assert low_arguments.int8_route().name == "vpdpbusd"
    elif features.get("dotprod"):
        assert low_arguments.int8_route().name == "sdot"
    else:
        assert low_arguments.int8_route().name == "pairs"
    fast = KNOWS_BFLOAT16 and bool(features.get("avx512bf16"))
    assert (low_arguments.bfloat16_route().name == "vdpbf16ps") == fast


@pytest.mark.slow
@x86_only
@pytest.mark.parametrize("cpu", ["nehalem", "haswell", "skylake-avx512"])
def test_other_routes_give_the_same_integers(cpu):
    """The tests of the kernels once more, compiled for a CPU without VNNI, all of whose instructions the host has."""
    if not llvm.get_host_cpu_features().get(ROUTES[cpu][2]):
        pytest.skip(f"this CPU lacks instructions of {cpu}")
    tests = "['-q', '-x', '-p', 'no:cacheprovider', 'tests/test_numba_low_precision.py']"
    python(f"import pytest; raise SystemExit(pytest.main({tests}))", cpu)


SDOT = """
define <4 x i32> @dot(<4 x i32> %sums, <16 x i8> %a, <16 x i8> %b) {
  %r = call <4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8(<4 x i32> %sums, <16 x i8> %a, <16 x i8> %b)
  ret <4 x i32> %r
}
declare <4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8(<4 x i32>, <16 x i8>, <16 x i8>)
"""


def assembly(text, triple, cpu):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(text)
    module.triple = triple
    return llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=2).emit_assembly(module)


@pytest.mark.parametrize(("cpu", "has"), [("apple-m1", True), ("neoverse-n1", True), ("cortex-a72", False)])
def test_the_dot_product_of_arm_is_recognised_and_compiled(cpu, has):
    triple = "aarch64-unknown-linux-gnu"
    assert ("sdot" in assembly(low_arguments._DOT_OF_BYTES, triple, cpu)) == has
    if has:
        assert "sdot" in assembly(SDOT, triple, cpu)


@pytest.mark.slow
def test_the_kernel_is_compiled_for_arm(tmp_path):
    """Every tile height has loops of its own: `sdot` in all of them, and no widened products."""
    words = ["aarch64-unknown-linux-gnu", "neoverse-n1", str(tmp_path), "int8_product"]
    done = subprocess.run([sys.executable, "tests/cross_compile.py", *words], cwd=ROOT, capture_output=True, text=True)
    if "Unable to find target" in done.stderr or "No available targets" in done.stderr:
        pytest.skip("this llvmlite cannot compile for ARM")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "int8_product.s").read_text()
    assert text.count("sdot") > 100 and "smlal" not in text
