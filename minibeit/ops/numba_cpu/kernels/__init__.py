"""What is compiled: the kernels, as functions that numba turns into machine code.

These modules import numba and are read only when a kernel is not on disk yet (see `machine_code.py`).  The module of
the same name one folder up prepares a kernel's arguments and runs it.

vector.py, micro.py   vectors and the register tile of the matrix product, as LLVM instructions
compiler.py           a function becomes the bytes of an object file
gemm.py, attention.py, norm.py, winograd.py, spread.py, pack.py, pool.py   the kernels
"""
