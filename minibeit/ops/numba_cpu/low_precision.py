"""Linear layers in int8 and bfloat16, see `ops.low_precision`: packing, rounding of rows, products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import numpy as np

from ..low_precision import BFloat16Linear, Int8Linear, LowDeconv
from .arguments import PLAIN
from .gemm import TILE_BYTES, row_layout
from .low_arguments import (
    BFLOAT16_PRODUCT,
    COLUMNS,
    HEADER_BYTES,
    INT8_PRODUCT,
    LEVEL_ROWS,
    QUANTISE,
    ROUND,
    Route,
    bfloat16_route,
    int8_route,
)
from .machine_code import Kernel
from .memory import NOTHING, Operand, aligned, constant_operand, operand, result
from .operands import contiguous, rows
from .pack import Hollow
from .packed import Packed
from .pool import get_num_threads
from .queue import run
from .target import LANES, NR

_SMALL = 1 << 22  # multiplications; some ten microseconds
_quantise = Kernel("minibeit.ops.numba_cpu.kernels.low_precision", "quantise", arguments=QUANTISE)
_round_rows = Kernel("minibeit.ops.numba_cpu.kernels.low_precision", "round_rows", arguments=ROUND)
_int8_product = Kernel("minibeit.ops.numba_cpu.kernels.low_precision", "int8_product", arguments=INT8_PRODUCT)
_bfloat16_product = Kernel(
    "minibeit.ops.numba_cpu.kernels.low_precision", "bfloat16_product", arguments=BFLOAT16_PRODUCT
)


@dataclass(frozen=True)
class PackedLow(Packed):
    """A layer of low precision: W as panels (ceil(out / NR), steps, NR, elements of a step), constants of each column.

    `columns` (panels, 3, NR) holds the factor, the bias and the sum of the integers (as bits) of every column.
    """

    panels: np.ndarray  # int8, or uint16 for bfloat16
    columns: np.ndarray
    out: int
    width: int  # elements of a row of x
    source: Any = None  # the layer as it was, kept on request
    operands: tuple[Operand, Operand] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "operands", (constant_operand(self.panels), constant_operand(self.columns)))

    @property
    def is_int8(self) -> bool:
        """Whether its arithmetic is int8, else it is bfloat16."""
        return self.panels.dtype == np.int8

    @property
    def route(self) -> Route:
        """How this CPU makes its sums."""
        return int8_route() if self.is_int8 else bfloat16_route()

    def plain(self) -> Int8Linear | BFloat16Linear:
        """The layer as it was before packing."""
        matrix = self.panels.transpose(0, 2, 1, 3).reshape(-1, self.panels.shape[1] * self.panels.shape[3])
        weight = np.ascontiguousarray(matrix[: self.out, : self.width])
        scale, bias = (self.columns[:, row].reshape(-1)[: self.out] for row in (0, 1))
        return Int8Linear(weight, scale, bias) if self.is_int8 else BFloat16Linear(weight, bias)

    def parts(self, count: int) -> list[Any]:
        """The layer as `count` layers of like size."""
        layer = self.plain()
        whole = {f.name: np.split(getattr(layer, f.name), count) for f in fields(layer)}
        return [type(layer)(**{name: pieces[i] for name, pieces in whole.items()}) for i in range(count)]


def pack_low(layers: Sequence[Any], keep_source: bool = False) -> PackedLow:
    """One packed layer whose outputs are those of `layers`, all of one dtype, one after another."""
    integers = isinstance(layers[0], Int8Linear)
    route = int8_route() if integers else bfloat16_route()
    out, width = sum(layer.weight.shape[0] for layer in layers), layers[0].weight.shape[1]
    count, steps = -(-out // NR), -(-width // route.elements)
    panels = aligned((count, steps, NR, route.elements), np.int8 if integers else np.uint16)
    columns = aligned((count, COLUMNS, NR))
    source = layers[0] if keep_source else None
    if isinstance(layers[0].weight, Hollow):
        return PackedLow(panels, columns, out, width, source)
    matrix = np.zeros((count * NR, steps * route.elements), panels.dtype)
    first = 0
    columns[...] = 0
    factors, bias, sums = (columns[:, row] for row in range(COLUMNS))
    flat = np.zeros((COLUMNS, count * NR), np.float32)
    for layer in layers:
        here = slice(first, first + layer.weight.shape[0])
        matrix[here, :width] = layer.weight
        flat[0, here] = getattr(layer, "scale", 1)
        flat[1, here] = 0 if layer.bias is None else layer.bias
        first = here.stop
    factors[...], bias[...] = (row.reshape(count, NR) for row in flat[:2])
    if integers:
        sums.view(np.int32)[...] = matrix.sum(1, dtype=np.int32).reshape(count, NR)
    panels[...] = matrix.reshape(count, NR, steps, route.elements).transpose(0, 2, 1, 3)
    return PackedLow(panels, columns, out, width, source)


def rows_of(layer: Any, rows: slice) -> Any:
    """Some outputs of a layer of low precision as a layer."""
    return type(layer)(**{f.name: None if (whole := getattr(layer, f.name)) is None else whole[rows]
                          for f in fields(layer)})  # fmt: skip


@dataclass(frozen=True)
class PackedLowDeconv(Packed):
    """A 2x2 transposed convolution: the panels of its four corners, one after another."""

    corners: PackedLow  # `out` and `width` are those of one
    source: Any = None


def pack_low_deconv(layer: LowDeconv, keep_source: bool) -> PackedLowDeconv:
    """The four corners, packed."""
    parts = [pack_low([corner]) for corner in layer.corners]
    panels, columns = (aligned((4 * len(a), *a.shape[1:]), a.dtype) for a in (parts[0].panels, parts[0].columns))
    if not isinstance(layer.corners[0].weight, Hollow):
        for i, part in enumerate(parts):
            here = slice(i * len(part.panels), (i + 1) * len(part.panels))
            panels[here], columns[here] = part.panels, part.columns
    return PackedLowDeconv(PackedLow(panels, columns, parts[0].out, parts[0].width), layer if keep_source else None)


def level_rows(x: np.ndarray, layer: PackedLow) -> tuple[Operand, int, int]:  # (..., in)
    """The rows of a float32 array as `layer` reads them: (the level rows, how many, bytes between them)."""
    x_rows, count, x_bytes = rows(x)
    width, route = x.shape[-1], layer.route
    _, levels, level_bytes = result((count, _row_floats(width, route)))
    structure, kernel = (QUANTISE, _quantise) if layer.is_int8 else (ROUND, _round_rows)
    run(
        kernel,
        -(-count // LEVEL_ROWS),
        structure.operands(x=x_rows, y=levels),
        structure.numbers(x_bytes=x_bytes, count=count, width=width, y_bytes=level_bytes),
        4 * LANES,
        small=x.size < 1 << 15,
    )
    return levels, count, level_bytes


@lru_cache(maxsize=64)
def _row_floats(width: int, route: Route) -> int:
    """float32 elements that a level row takes; the last vector is stored whole."""
    return (HEADER_BYTES + (width // LANES + 1) * LANES * route.row_bytes + 3) // 4


def low_product(
    x: np.ndarray,
    layer: PackedLow,
    mode: int = PLAIN,
    scale: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:  # (..., in) -> (..., out)
    """The same as `gemm.product`, of low precision."""
    shape = (*x.shape[:-1], layer.out)
    return level_product(level_rows(x, layer), layer, shape, mode, scale, residual)


def level_product(
    levels: tuple[Operand, int, int],
    layer: PackedLow,
    shape: tuple[int, ...],
    mode: int = PLAIN,
    scale: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:  # (..., in) -> (..., out)
    """The same for what `level_rows` made of x, with the result's shape."""
    y, y_rows, y_bytes = result(shape)
    layout = row_layout(levels[1], len(layer.panels), y_bytes, get_num_threads())
    factors = NOTHING if scale is None else operand(contiguous(scale))
    addend, addend_bytes = NOTHING, 0
    if residual is not None:
        addend, _, addend_bytes = rows(residual)
    run_low(
        1, levels, layer, y_rows, factors, addend, y_bytes=y_bytes, mode=mode, residual_bytes=addend_bytes,
        **{name: layout[name] for name in ("side", "blocks", "group", "unit", "y_unit_bytes")},
    )  # fmt: skip
    return y


def run_low(
    products: int,
    levels: tuple[Operand, int, int],
    layer: PackedLow,
    y: Operand,
    scale: Operand = NOTHING,
    residual: Operand = NOTHING,
    **numbers: int,
) -> None:
    """Runs `products` products of the same rows, whose panels follow one another in `layer`."""
    x, count, x_bytes = levels
    panels, columns = layer.operands
    structure, kernel = (INT8_PRODUCT, _int8_product) if layer.is_int8 else (BFLOAT16_PRODUCT, _bfloat16_product)
    tasks, values = _work(products, count, x_bytes, layer.out, layer.panels.strides[0], layer.panels.shape[1],
                          tuple(numbers.items()))  # fmt: skip
    operands = structure.operands(x=x, panels=panels, columns=columns, y=y, scale=scale, residual=residual)
    run(kernel, tasks, operands, values, TILE_BYTES, small=products * count * layer.width * layer.out < _SMALL)


@lru_cache(maxsize=256)
def _work(
    products: int,
    count: int,
    x_bytes: int,
    out: int,
    panel_bytes: int,
    steps: int,
    numbers: tuple[tuple[str, int], ...],
) -> tuple[int, tuple[int, ...]]:
    """(tasks, the kernel's numbers), the same from block to block and image to image."""
    given = {"residual_bytes": 0, "x_product_bytes": 0, "y_pair_bytes": 0, "y_odd_bytes": 0, **dict(numbers)}
    values = INT8_PRODUCT.numbers(
        x_bytes=x_bytes, count=count, steps=steps, out=out, panel_bytes=panel_bytes, **given
    )  # fmt: skip
    panels = -(-out // NR)
    return products * given["blocks"] * -(-panels // given["group"]), values
