"""The pretended cuBLAS: column-major products by address, 16-bit numbers added up in float32 and rounded once."""

from __future__ import annotations

import ctypes

import numpy as np

from .memory import memory_at, where_is
from .queues import Use, launch
from .world import world

CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_PEDANTIC, CUBLAS_COMPUTE_64F, CUBLAS_COMPUTE_32F_FAST_TF32 = 68, 69, 70, 77
CUBLAS_GEMM_DEFAULT, CUBLAS_GEMM_DEFAULT_TENSOR_OP = -1, 99
CUBLAS_DEFAULT_MATH, CUBLAS_TENSOR_OP_MATH, CUBLAS_PEDANTIC_MATH, CUBLAS_TF32_TENSOR_OP_MATH = 0, 1, 2, 3

STORED = {0: np.float32, 1: np.float64, 2: np.float16, 14: np.uint16}  # CUDA_R_32F, 64F, 16F, 16BF
BFLOAT16 = 14
ALLOWED = {  # (type of A and B, type of C): compute types that cuBLAS takes with them
    (0, 0): (68, 69, 77), (1, 1): (70,), (2, 2): (68, 69), (2, 0): (68, 69), (14, 14): (68, 69), (14, 0): (68, 69),
}  # fmt: skip


class CUBLASError(RuntimeError):
    """What cuBLAS answered; here with the reason."""


def getVersion(handle: int) -> int:
    """A version number."""
    return 120900


def setMathMode(handle: int, mode: int) -> None:
    """Accepted and without effect."""


def getMathMode(handle: int) -> int:
    """The default mode."""
    return CUBLAS_DEFAULT_MATH


def gemmEx(
    handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, computeType, algo
):
    """C = alpha op(A) op(B) + beta C."""
    gemmStridedBatchedEx(
        handle, transa, transb, m, n, k, alpha, A, Atype, lda, 0, B, Btype, ldb, 0, beta, C, Ctype, ldc, 0, 1,
        computeType, algo,
    )  # fmt: skip


def gemmStridedBatchedEx(
    handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb, strideB, beta, C, Ctype, ldc,
    strideC, batchCount, computeType, algo,
):  # fmt: skip
    """The same for `batchCount` matrices, `stride` elements apart."""
    world.launches.append("gemm")
    for name, value in {"handle": handle, "m": m, "n": n, "k": k, "lda": lda, "A": A, "B": B, "C": C}.items():
        if not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name}: an integer is required, found {type(value)}")
    if Atype != Btype or computeType not in ALLOWED.get((Atype, Ctype), ()):
        raise CUBLASError(f"CUBLAS_STATUS_NOT_SUPPORTED: types {Atype}, {Btype} -> {Ctype}, compute {computeType}")
    if min(m, n, k, batchCount) < 0 or lda < max(1, k if transa else m) or ldb < max(1, n if transb else k):
        raise CUBLASError(f"CUBLAS_STATUS_INVALID_VALUE: m, n, k {m, n, k}, lda {lda}, ldb {ldb}")
    if ldc < max(1, m) or (batchCount > 1 and 0 < abs(strideC) < ldc * (n - 1) + m):
        raise CUBLASError(f"CUBLAS_STATUS_INVALID_VALUE: ldc {ldc}, stride {strideC} for a {m} x {n} result")
    if min(m, n, batchCount) == 0:
        return
    double = computeType == CUBLAS_COMPUTE_64F
    scalar = ctypes.c_double if double else ctypes.c_float
    factor, old = scalar.from_address(int(alpha)).value, scalar.from_address(int(beta)).value
    a, read_a = _matrices("A", A, Atype, lda, strideA, batchCount, *((k, m) if transa else (m, k)))
    b, read_b = _matrices("B", B, Btype, ldb, strideB, batchCount, *((n, k) if transb else (k, n)))
    c, write_c = _matrices("C", C, Ctype, ldc, strideC, batchCount, m, n, write=True)

    def run() -> None:
        left, right = (_wide(x, kind) for x, kind in ((a, Atype), (b, Btype)))
        left, right = (left.swapaxes(1, 2) if transa else left), (right.swapaxes(1, 2) if transb else right)
        product = np.ascontiguousarray(left) @ np.ascontiguousarray(right)  # for other strides NumPy adds one by one
        if factor != 1:
            product = product * product.dtype.type(factor)
        if old:
            product = product + product.dtype.type(old) * _wide(c, Ctype)
        with np.errstate(all="ignore"):
            c[...] = bfloat16_bits(product) if Ctype == BFLOAT16 else product

    launch("a product of cuBLAS", run, [read_a, read_b, write_c])


def _matrices(
    name: str, address: int, kind: int, ld: int, stride: int, batch: int, rows: int, columns: int, write: bool = False
) -> tuple[np.ndarray, Use]:
    """(batch, rows, columns) column-major matrices at an address, which must lie in one allocation entirely."""
    dtype = np.dtype(STORED[kind])
    if address % dtype.itemsize:
        raise CUBLASError(f"{name}: address {address} is not aligned to {dtype}")
    reach = (stride * (batch - 1) + ld * (columns - 1) + rows) * dtype.itemsize if rows * columns else 0
    memory = memory_at(address, reach)
    if memory is None:
        raise CUBLASError(f"{name}: {reach} bytes from address {address}, {where_is(address)}: outside it")
    if memory.device_id != world.current:
        raise CUBLASError(f"{name}: lies on device {memory.device_id}, the handle's is {world.current}")
    raw = (ctypes.c_char * max(reach, 1)).from_address(address)
    strides = (stride * dtype.itemsize, dtype.itemsize, ld * dtype.itemsize)
    return np.ndarray((batch, rows, columns), dtype, raw, 0, strides), memory.use(write, int(address), address + reach)


def _wide(x: np.ndarray, kind: int) -> np.ndarray:
    """16-bit numbers as float32, others as they are."""
    if kind == BFLOAT16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32) if kind == 2 else x


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """float32 rounded to nearest even bfloat16, as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)
