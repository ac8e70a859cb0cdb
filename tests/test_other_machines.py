"""Kernels for CPUs and systems that are not at hand: what their machine code looks like, and what it needs.

cross_compile.py makes it.  What it costs is counted, and asked of llvm-mca, LLVM's static model of a CPU, where a
version is installed that knows the CPU.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LINUX, MACOS, WINDOWS = "aarch64-unknown-linux-gnu", "arm64-apple-macosx14.0.0", "x86_64-pc-windows-msvc-elf"
KERNELS = ("product", "fma_chains", "execute")
TILE = 6 * 4  # accumulators: multiply-adds in one step of a product and of the roof
slow = pytest.mark.slow
ARMS = [("apple-m1", MACOS), *(pytest.param(cpu, LINUX, marks=slow) for cpu in ("neoverse-n1", "neoverse-v1"))]
PEAKS = {"neoverse-n1": 2, "neoverse-v1": 4}  # vector multiply-adds a cycle; llvm-mca has no model of Apple's CPUs


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """compiled(triple, cpu, *kernels): the folder with their assembly and objects."""
    folders: dict[tuple[str, ...], Path] = {}

    def compile_(triple, cpu, *kernels):
        if (triple, cpu, *kernels) not in folders:
            folder = folders[(triple, cpu, *kernels)] = tmp_path_factory.mktemp(cpu)
            command = [sys.executable, str(TESTS / "cross_compile.py"), triple, cpu, str(folder), *kernels]
            done = subprocess.run(command, capture_output=True, text=True, timeout=900)
            if "Unable to find target" in done.stderr or "No available targets" in done.stderr:
                pytest.skip(f"this llvmlite cannot compile for {triple}")
            assert done.returncode == 0, done.stderr
        return folders[(triple, cpu, *kernels)]

    return compile_


def blocks(assembly: Path) -> list[list[str]]:
    """The instructions between labels."""
    found: list[list[str]] = [[]]
    for line in assembly.read_text().splitlines():
        if re.match(r"[\w.$]+:", line):
            found.append([])
        elif line.startswith("\t") and not line.startswith("\t."):
            found[-1].append(line.strip())
    return found


def is_by_element(instruction: str) -> bool:
    return re.match(r"fmla.*\.?s\[\d\]|fmla\.4s.*\[\d\]", instruction) is not None


def loop_of(assembly: Path) -> list[str]:
    """The block of one step: as many multiply-adds as the tile has accumulators, up to the branch back."""
    (block,) = (b for b in blocks(assembly) if sum(i.startswith("fmla") for i in b) == TILE)
    end = next(i for i, line in enumerate(block) if re.match(r"(b\.\w+|cbnz)\s", line))
    return block[: end + 1]


@pytest.mark.parametrize("cpu, triple", ARMS)
def test_the_neon_tile_stays_in_registers(cpu, triple, compiled):
    folder = compiled(triple, cpu, *KERNELS)
    loop = loop_of(folder / "product.s")
    assert sum(map(is_by_element, loop)) == TILE
    loads = [i for i in loop if i.startswith("ld")]
    assert len(loads) <= 10 and not any(i.startswith("ld1r") for i in loads)  # 6 elements of A, 4 vectors of B
    assert not any(re.match(r"mov|dup|orr|st", i) for i in loop)
    with_products = [b for b in blocks(folder / "product.s") if sum(i.startswith("fmla") for i in b) > 1]
    assert len(with_products) > 6  # one loop or more for each number of rows
    assert not [i for b in with_products for i in b if "[sp" in i]


@pytest.mark.parametrize("cpu, triple", ARMS)
def test_the_roof_of_neon_is_multiply_adds_alone(cpu, triple, compiled):
    loop = loop_of(compiled(triple, cpu, *KERNELS) / "fma_chains.s")
    assert len(loop) <= TILE + 3


def model_of(cpu: str) -> str:
    """A version of llvm-mca that knows the CPU."""
    for name in (*(f"llvm-mca-{version}" for version in range(30, 16, -1)), "llvm-mca"):
        path = shutil.which(name)
        if path is not None:
            version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
            found = re.search(r"LLVM version (\d+)", version)
            if found and int(found[1]) >= 17:  # older ones take another CPU's model
                return path
    pytest.skip(f"needs llvm-mca of LLVM 17 or later, which models {cpu}")


@slow
@pytest.mark.parametrize("cpu", PEAKS)
@pytest.mark.parametrize("kernel", ["product", "fma_chains"])
def test_the_inner_loop_reaches_the_peak_of_the_static_model(cpu, kernel, compiled):
    model, loop = model_of(cpu), loop_of(compiled(LINUX, cpu, *KERNELS) / f"{kernel}.s")
    command = [model, "-mtriple=aarch64", f"-mcpu={cpu}", "-iterations=1000"]
    report = subprocess.run(command, input="\n".join(loop), capture_output=True, text=True, check=True).stdout
    cycles = int(re.search(r"Total Cycles:\s+(\d+)", report)[1])
    assert 1000 * TILE / cycles >= 0.95 * PEAKS[cpu]


# Systems ------------------------------------------------------------------------------------------------------------


def undefined_in_elf(code: bytes) -> set[str]:
    """Symbols that an object file of ELF needs: those of the symbol table without a section."""
    start, count = struct.unpack_from("<Q", code, 0x28)[0], struct.unpack_from("<H", code, 0x3C)[0]
    headers = [struct.unpack_from("<IIQQQQIIQQ", code, start + 64 * i) for i in range(count)]
    (table,) = (h for h in headers if h[1] == 2)
    strings, names = headers[table[6]], set()
    for place in range(table[4] + 24, table[4] + table[5], 24):
        name, _, _, section = struct.unpack_from("<IBBH", code, place)
        if section == 0:
            names.add(text_at(code, strings[4] + name))
    return names


def undefined_in_mach_o(code: bytes) -> set[str]:
    """The same for Mach-O, where each name begins with an underscore."""
    place, names = 32, set()
    for _ in range(struct.unpack_from("<I", code, 16)[0]):
        command, size = struct.unpack_from("<II", code, place)
        if command == 2:  # LC_SYMTAB
            table, count, strings = struct.unpack_from("<III", code, place + 8)
            for i in range(count):
                name, kind, _, _, value = struct.unpack_from("<IBBHQ", code, table + 16 * i)
                if kind & 0x0F == 1 and value == 0:  # of no section, to be seen outside, and no memory to be made
                    names.add(text_at(code, strings + name).removeprefix("_"))
        place += size
    return names


def text_at(code: bytes, place: int) -> str:
    return code[place : code.index(b"\0", place)].decode()


SYSTEMS = [
    (MACOS, "apple-m1", b"\xcf\xfa\xed\xfe", undefined_in_mach_o, {"sched_yield", "clock_gettime"}),
    (WINDOWS, "x86-64-v3", b"\x7fELF", undefined_in_elf, {"sched_yield", "GetTickCount64"}),
]


@pytest.mark.parametrize("triple, cpu, magic, undefined, expected", SYSTEMS)
@pytest.mark.parametrize("kernels", [KERNELS, pytest.param((), marks=slow)], ids=["some", "all"])
def test_kernels_of_other_systems_need_what_their_loader_finds(
    triple, cpu, magic, undefined, expected, kernels, compiled
):
    """Windows' objects are ELF: MCJIT takes no others there, and llvmlite asks for them.

    C functions for memory are in every system's library; anything else the loader would look for in vain.
    """
    objects = sorted(compiled(triple, cpu, *kernels).glob("*.o"))
    assert objects
    needed: set[str] = set()
    for file in objects:
        code = file.read_bytes()
        assert code.startswith(magic)
        needed |= undefined(code)
    assert needed - {"memcpy", "memset", "memmove"} == expected


@slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() != "x86_64", reason="runs code for Windows' x86-64 here"
)
def test_code_for_windows_computes_the_same(tmp_path):
    environment = {**os.environ, "MINIBEIT_TEST_FOLDER": str(tmp_path)}
    command = [sys.executable, "tests/windows_code.py", "-q", "-x", "tests/test_numba_ops.py"]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
