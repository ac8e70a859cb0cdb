"""Kernels compiled for another machine than this one, which cannot run them: `python cross_compile.py TRIPLE CPU FOLDER
NAME...` writes NAME.s and NAME.o of each kernel, of all if none is named.  Nothing goes to the cache of kernels.

A process of its own: what the compiler's target is, LLVM, numba and minibeit ask once.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path


def aim(triple: str, cpu: str) -> None:
    """From here on LLVM and numba compile for that machine; minibeit must not have been imported."""
    from llvmlite import binding as llvm

    os.environ.update(NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES="")
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.get_process_triple = lambda: triple
    from numba.core.codegen import JITCodeLibrary
    from numba.core.cpu import CPUContext

    JITCodeLibrary._finalize_specific = lambda library: None  # nothing is loaded here
    CPUContext.get_executable = lambda *_: [].append  # a new one for each function: numba tells them apart by it


def compile_kernels(names: list[str], folder: Path) -> None:
    """Writes assembly and object code of kernels."""
    from minibeit.bench import roof
    from minibeit.ops.numba_cpu import halves as halves
    from minibeit.ops.numba_cpu.kernels.compiler import linked
    from minibeit.ops.numba_cpu.machine_code import ALL
    from minibeit.ops.numba_cpu.target import target_machine

    roof._kernel()
    for kernel in ALL:
        if names and kernel.name not in names:
            continue
        library = linked(getattr(import_module(kernel.module), kernel.name), kernel.name, kernel.arity)
        machine = target_machine()
        (folder / f"{kernel.name}.s").write_text(machine.emit_assembly(library._final_module))
        (folder / f"{kernel.name}.o").write_bytes(machine.emit_object(library._final_module))


if __name__ == "__main__":
    aim(*sys.argv[1:3])
    compile_kernels(sys.argv[4:], Path(sys.argv[3]))
