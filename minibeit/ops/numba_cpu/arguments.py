"""What a kernel and its caller agree on: the arguments by name, and the constants that both use.

A kernel gets the address of int64 numbers: its scratch memory, the addresses of its operands, then its numbers.  The
caller builds both parts by name, `run(kernel, tasks, PRODUCT.operands(x=..., ...), PRODUCT.numbers(count=..., ...))`;
the kernel reads them by the same names (see `vector.reader`).  The order is known here alone, so that a field that was
forgotten, misspelt or moved is an error before anything runs.

Names in `_bytes` are distances: from a row, pixel, ... to the next one, in bytes.  All other numbers are counts, or
flags that are 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any


def _tuple_of(names: tuple[str, ...]) -> Callable[..., tuple[Any, ...]]:
    """A function that takes a value for each name and returns the tuple of the values in the order of `names`.

    It raises TypeError unless the values are those of all names, and of nothing else.
    """
    count = len(names)
    pick: Any = itemgetter(*names) if count > 1 else lambda values: tuple(values[name] for name in names)

    def fields(**values: Any) -> tuple[Any, ...]:
        if len(values) == count:
            try:  # contextlib.suppress takes as long as all the rest
                return pick(values)
            except KeyError:
                pass
        missing, unknown = sorted(set(names) - set(values)), sorted(set(values) - set(names))
        raise TypeError(f"a kernel's arguments: expected {', '.join(names)}; missing {missing}, unknown {unknown}")

    return fields


class Arguments:
    """The arguments of one kernel: memory that it reads and writes (`NOTHING` where that is optional), and numbers."""

    __slots__ = ("names", "number_names", "numbers", "operand_names", "operands")

    def __init__(self, operands: tuple[str, ...], numbers: tuple[str, ...] = ()) -> None:
        self.operands, self.numbers = _tuple_of(operands), _tuple_of(numbers)
        self.operand_names, self.number_names = operands, numbers
        self.names = "scratch", *operands, *numbers  # what the kernel sees; `scratch` is its thread's own


# Matrix product -----------------------------------------------------------------------------------------------------

PLAIN, GELU, RELU, RESIDUAL = 0, 1, 2, 3  # modes: what follows + bias

PRODUCT = Arguments(
    operands=(
        "x",  # the rows that are multiplied: `count` of `steps` elements
        "panels",  # W (out, steps), packed: panels of NR columns, for each product the same number
        "bias",  # one element for each column of all panels
        "y",  # the result: `count` rows of `out` elements
        "scale",  # for RESIDUAL, optional: `out` factors
        "residual",  # for RESIDUAL: `count` rows of `out` elements
    ),
    numbers=(
        "x_bytes",  # between rows of x
        "count",  # rows of x
        "steps",  # products in each sum
        "out",  # columns of y
        "y_bytes",  # between rows of y in a unit
        "mode",  # PLAIN, GELU, RELU or RESIDUAL
        "residual_bytes",  # between rows of the residual
        "side",  # neighbouring blocks of rows that share one pass over the panels
        "blocks",  # blocks into which the units are split evenly; a multiple of `side`
        "group",  # panels per task
        "unit",  # rows that are not split, a multiple of MR or a line of a map
        "y_unit_bytes",  # between units of y
        "x_product_bytes",  # between the x of several products
        "y_pair_bytes",  # between the y of products 0 and 2, 2 and 4, ...
        "y_odd_bytes",  # between the y of products 0 and 1, 2 and 3, ...
        "panel_bytes",  # between panels
        "steps_per_sum",  # products that are summed in registers before they are added to the sum so far
        "accumulate",  # 1: the product is added to what is in y, in place of the bias
    ),
)

# Attention ----------------------------------------------------------------------------------------------------------

ATTENTION = Arguments(
    operands=(
        "q",  # (images, heads, count, size), the last axis contiguous
        "k",  # strides of q
        "v",  # strides of q
        "context",  # the result: (images, count, heads * size)
        "scale",  # one element, the factor of the scores
        "table",  # optional: the bias table (offsets + 3, heads)
    ),
    numbers=(
        "heads",
        "count",  # tokens
        "size",  # elements of a head
        "query_rows",  # per task, at most; a multiple of MR unless that is all rows
        "image_bytes",  # of q, k, v
        "head_bytes",
        "row_bytes",
        "context_bytes",  # between rows of the context
        "table_bytes",  # between rows of the table
        "grid_rows",  # of patches; 0 without a table
        "grid_columns",
    ),
)

# Layer norm ---------------------------------------------------------------------------------------------------------

ROWS = 32  # per task

LAYER_NORM = Arguments(
    operands=(
        "x",  # `count` rows of `width` elements
        "weight",  # `width` elements
        "bias",  # `width` elements
        "y",  # the result, like x
        "eps",  # one element
    ),
    numbers=(
        "x_bytes",  # between rows of x
        "count",  # rows
        "width",  # elements of a row
        "y_bytes",  # between rows of y
    ),
)

# Packing ------------------------------------------------------------------------------------------------------------

PACK = Arguments(
    operands=(
        "matrix",  # (out, steps), of any strides
        "panels",  # the result: (ceil(out / NR), steps, NR)
        "scale",  # optional: `out` factors
    ),
    numbers=(
        "row_bytes",  # between rows of the matrix
        "out",
        "steps",
        "step_bytes",  # between elements of a row
    ),
)

# Winograd's convolution ---------------------------------------------------------------------------------------------

POINTS = 36
# Of all fractions of 16 these gave the smallest peaks: over 256 channels errors of 0.7e-6 relative RMS and peaks of
# 2.8e-6; the usual 1 and 2 give 1.6e-6 and 1.5e-5.  All that the transforms of maps multiply by is exact in float32.
NEAR, FAR = 11 / 16, 3 / 2

TRANSFORM_WEIGHT = Arguments(
    operands=(
        "weight",  # (out, channels, 3, 3), the nine taps contiguous in this or the reverse order
        "scale",  # `out` factors
        "panels",  # the result: (POINTS, ceil(out / NR), channels, NR)
    ),
    numbers=(
        "out_bytes",  # between output channels of the weight
        "in_bytes",  # between input channels of the weight
        "tap_bytes",  # between taps of the weight: 4, or -4 from the last one on
        "out",
        "channels",
    ),
)

TRANSFORM_INPUT = Arguments(
    operands=(
        "x",  # the map (images, height, width, channels)
        "v",  # the result: (POINTS, tiles, channels), or for each point panels of NR channels
    ),
    numbers=(
        "pixel_bytes",  # of the map
        "row_bytes",
        "image_bytes",
        "height",
        "width",
        "channels",
        "tile_bytes",  # between tiles of v
        "panel_bytes",  # between panels of NR channels of a tile; 4 * NR if they are contiguous
        "point_bytes",  # between points of v
        "relu",  # 1: negative elements of the map are taken for 0
        "first_tile",  # of the whole map, the one that task 0 transforms
    ),
)

TRANSFORM_OUTPUT = Arguments(
    operands=(
        "m",  # products (POINTS, tiles, channels)
        "y",  # the map (images, height, width, channels), written or added to
        "bias",  # `channels` elements; without it the tile is added to what is in y
        "gain",  # one element, the factor of a tile that is added to the residual
        "residual",  # optional: a map like y, to which gain * (tile + bias) is added
    ),
    numbers=(
        "tile_bytes",  # between tiles of m
        "point_bytes",  # between points of m
        "channels",
        "pixel_bytes",  # of the map
        "row_bytes",
        "image_bytes",
        "height",
        "width",
        "relu",  # 1: negative elements become 0
        "residual_pixel_bytes",
        "residual_row_bytes",
        "residual_image_bytes",
        "first_tile",  # of the whole map, the one that task 0 transforms
    ),
)

# Enlargement --------------------------------------------------------------------------------------------------------

ENLARGE = Arguments(
    operands=(
        "z",  # the small map (images, small height, small width, taps * taps * channels)
        "y",  # the large map (images, height, width, channels), written or added to
        "bias",  # `channels` elements, optional: y begins with it
        "row_sources",  # (height, 2) int64: the small rows above and below each large row
        "row_factors",  # (height, 2): their factors
        "column_sources",  # (width, 2) int64: the small columns left and right of each large column
        "column_factors",  # (width, 2): their factors
    ),
    numbers=(
        "z_pixel_bytes",
        "z_row_bytes",
        "z_image_bytes",
        "small_width",
        "y_pixel_bytes",
        "y_row_bytes",
        "y_image_bytes",
        "height",
        "width",
        "taps",  # in each direction: 1, or 3 for a 3x3 convolution
        "channels",  # a multiple of LANES
        "add",  # 1: added to what is in y
        "relu",  # 1: negative elements of the sum become 0
    ),
)

# The roof of the benchmark -------------------------------------------------------------------------------------------

FMA_CHAINS = Arguments(operands=(), numbers=("steps",))  # multiply-adds in each chain

# The pool -----------------------------------------------------------------------------------------------------------

SCHED_YIELD, TICK_COUNT = "sched_yield", "GetTickCount64"  # on Windows the first is a name for SwitchToThread
SHARES = 64  # of a job's tasks, one for each thread; further threads begin with another one's
HEADER = 4  # int64 numbers before the arguments in a job's record: function, tasks, threads, how many arguments

# Byte offsets in the control block, whose counters have a cache line each.
SEQUENCE, OPEN, ACTIVE = 0, 64, 128  # jobs opened so far; whether one is open; workers that are at it
FUNCTION, ARGUMENTS, COUNT, LIMIT = 192, 200, 208, 216  # of the open job: LIMIT is its threads
MORE, STARTED, RECORD, LEFT = 224, 232, 240, 248  # jobs after it; whether it was opened; its record; jobs not done
NEXT = 256  # the next task of each share
CONTROL_BYTES = NEXT + 64 * SHARES
