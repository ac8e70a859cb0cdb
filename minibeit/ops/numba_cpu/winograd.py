"""3x3 convolution by Winograd's F(4x4, 3x3): 36 products of tiles in place of 144.

Output tiles of 4x4 come from input tiles of 6x6:  Y = A^T [ (G g G^T) * (B^T d B) ] A, where * multiplies element by
element; summed over input channels that is one matrix product for each of the 36 places.  Points 0, +-NEAR, +-FAR and
infinity.  Source: Lavin and Gray 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...checkpoint.formats.lazy_tensors import float32_to_bfloat16
from .arguments import PLAIN, POINTS, PRODUCT, TRANSFORM_INPUT, TRANSFORM_OUTPUT, TRANSFORM_WEIGHT
from .gemm import panel_group, run_products
from .low_arguments import COLUMNS, bfloat16_route
from .low_precision import PackedLow, level_rows, run_low
from .machine_code import Kernel
from .memory import NOTHING, Operand, aligned, constant_operand, operand, result
from .operands import scalar
from .pack import Hollow, padded_bias
from .packed import Packed
from .queue import run
from .target import LANES, MR, NR, STEPS

_CHUNK = 144 // MR * MR  # tiles in work at a time: 36 * 144 * 768 floats are 16 MB
_VECTOR = 4 * LANES


@dataclass(frozen=True)
class PackedWinograd(Packed):
    """A 3x3 convolution's transformed weights, (36, ceil(out / NR), in, NR)."""

    panels: np.ndarray
    out: int
    source: Any = None

    @property
    def channels(self) -> int:
        return self.panels.shape[2]


@dataclass(frozen=True)
class PackedShortWinograd(Packed):
    """The same with products of bfloat16: the panels of the 36 products, one after another."""

    products: PackedLow  # `out` and `width` are those of one

    @property
    def channels(self) -> int:
        return self.products.width

    @property
    def out(self) -> int:
        return self.products.out


@dataclass(frozen=True)
class After:
    """What follows the convolution: ReLU, or residual + gain * ( ), the residual being a map (B, h, w, out)."""

    relu: bool = False
    gain: float = 1.0
    residual: np.ndarray | None = None


_transform_input = Kernel("minibeit.ops.numba_cpu.kernels.winograd", "transform_input", arguments=TRANSFORM_INPUT)
_transform_output = Kernel("minibeit.ops.numba_cpu.kernels.winograd", "transform_output", arguments=TRANSFORM_OUTPUT)
_transform_weight = Kernel("minibeit.ops.numba_cpu.kernels.winograd", "transform_weight", arguments=TRANSFORM_WEIGHT)


def pack_winograd(weight: np.ndarray, scale: np.ndarray) -> PackedWinograd:
    """Transformed weights of a convolution (out, in, 3, 3) whose outputs are multiplied by `scale` (out,)."""
    out, channels = weight.shape[:2]
    panels = aligned((POINTS, -(-out // NR), channels, NR))
    if isinstance(weight, Hollow):
        return PackedWinograd(panels, out)
    if weight.strides[2:] not in ((12, 4), (-12, -4)):
        weight = np.ascontiguousarray(weight)
    operands = TRANSFORM_WEIGHT.operands(weight=operand(weight), scale=operand(scale), panels=operand(panels))
    out_bytes, in_bytes, _, tap_bytes = weight.strides
    numbers = TRANSFORM_WEIGHT.numbers(
        out_bytes=out_bytes, in_bytes=in_bytes, tap_bytes=tap_bytes, out=out, channels=channels
    )
    run(_transform_weight, panels.shape[1], operands, numbers, 6 * 3 * 4)
    return PackedWinograd(panels, out)


def pack_short_winograd(weight: np.ndarray, scale: np.ndarray) -> PackedWinograd | PackedShortWinograd:
    """The same for products of bfloat16; of float32 on a CPU that does not multiply such numbers."""
    whole, route = pack_winograd(weight, scale), bfloat16_route()
    if route.name != "vdpbf16ps":
        return whole
    points, count, channels, _ = whole.panels.shape
    steps = -(-channels // route.elements)
    panels = aligned((points * count, steps, NR, route.elements), np.uint16)
    columns = aligned((points * count, COLUMNS, NR))
    if not isinstance(weight, Hollow):
        columns[...] = 0
        for panel, packed in zip(whole.panels.reshape(-1, channels, NR), panels):
            pairs = np.zeros((steps * route.elements, NR), np.uint16)
            pairs[:channels] = float32_to_bfloat16(panel)
            packed[...] = pairs.reshape(steps, route.elements, NR).transpose(0, 2, 1)
    return PackedShortWinograd(PackedLow(panels, columns, whole.out, channels))


def convolve(
    x: np.ndarray,
    layer: PackedWinograd | PackedShortWinograd,
    bias: np.ndarray | None,
    after: After,
    y: np.ndarray,
    relu_before: bool = False,
) -> None:
    """y = f(conv(x) + bias), or f(y + conv(x)) without `bias`; x (B, h, w, C), y (B, h, w, out), f as `after` says.

    With `relu_before` it is conv(max(0, x)).
    """
    B, h, w, C = x.shape
    total = B * -(-h // 4) * -(-w // 4)
    chunk = min(_CHUNK, total)
    v, tiles_in, _ = result((POINTS, chunk, C))
    m, tiles_out, _ = result((POINTS, chunk, layer.out))
    zeros = constant_operand(padded_bias(None, layer.out))
    source, target, addend = operand(x), operand(y), NOTHING if bias is None else constant_operand(bias)
    residual: Operand = NOTHING
    strides: tuple[int, ...] = (0, 0, 0)
    if after.residual is not None:
        residual, strides = operand(after.residual), after.residual.strides[:3]
    group = panel_group(-(-layer.out // NR), POINTS)
    for first in range(0, total, chunk):
        tiles = min(chunk, total - first)
        run(
            _transform_input,
            tiles,
            TRANSFORM_INPUT.operands(x=source, v=tiles_in),
            TRANSFORM_INPUT.numbers(
                pixel_bytes=x.strides[2], row_bytes=x.strides[1], image_bytes=x.strides[0], height=h, width=w,
                channels=C, tile_bytes=v.strides[1], panel_bytes=4 * NR, point_bytes=v.strides[0],
                relu=int(relu_before), first_tile=first,
            ),
            (POINTS + 6) * _VECTOR,
        )  # fmt: skip
        numbers: dict[str, Any] = dict(
            mode=PLAIN, y_bytes=m.strides[1], side=1, blocks=1, group=group, unit=MR, y_unit_bytes=0,
            y_pair_bytes=2 * m.strides[0], y_odd_bytes=m.strides[0],
        )  # fmt: skip
        if isinstance(layer, PackedShortWinograd):
            short, _, short_bytes = level_rows(v, layer.products)
            rows_here = short, tiles, short_bytes
            run_low(POINTS, rows_here, layer.products, tiles_out, x_product_bytes=chunk * short_bytes, **numbers)
        else:
            panels = constant_operand(layer.panels)
            run_products(
                POINTS,
                PRODUCT.operands(x=tiles_in, panels=panels, bias=zeros, y=tiles_out, scale=NOTHING, residual=NOTHING),
                x_bytes=v.strides[1], count=tiles, steps=C, out=layer.out, residual_bytes=0,
                x_product_bytes=v.strides[0], panel_bytes=C * NR * 4, steps_per_sum=STEPS, accumulate=0, **numbers,
            )  # fmt: skip
        run(
            _transform_output,
            tiles,
            TRANSFORM_OUTPUT.operands(
                m=tiles_out, y=target, bias=addend, gain=scalar(after.gain), residual=residual
            ),
            TRANSFORM_OUTPUT.numbers(
                tile_bytes=m.strides[1], point_bytes=m.strides[0], channels=layer.out, pixel_bytes=y.strides[2],
                row_bytes=y.strides[1], image_bytes=y.strides[0], height=h, width=w, relu=int(after.relu),
                residual_pixel_bytes=strides[2], residual_row_bytes=strides[1], residual_image_bytes=strides[0],
                first_tile=first,
            ),
            30 * _VECTOR,
        )  # fmt: skip


def transformed_panels(x: np.ndarray, first: int, tiles: int) -> np.ndarray:  # -> (POINTS, C / NR, tiles, NR)
    """Tiles `first` and on of a map (B, h, w, C), transformed, in panels of NR channels, which fill whole ones."""
    h, w, C = x.shape[1:]
    v = aligned((POINTS, C // NR, tiles, NR))
    numbers = TRANSFORM_INPUT.numbers(
        pixel_bytes=x.strides[2], row_bytes=x.strides[1], image_bytes=x.strides[0], height=h, width=w, channels=C,
        tile_bytes=4 * NR, panel_bytes=v.strides[1], point_bytes=v.strides[0], relu=0, first_tile=first,
    )  # fmt: skip
    operands = TRANSFORM_INPUT.operands(x=operand(x), v=operand(v))
    run(_transform_input, tiles, operands, numbers, (POINTS + 6) * _VECTOR)
    return v
