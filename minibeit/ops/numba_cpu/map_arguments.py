"""The arguments of the kernels for training on maps, see `arguments`: their pixels lie channels last, `width` or
`channels` of them, a multiple of LANES."""

from __future__ import annotations

from .arguments import Arguments

SUM_VALUES, SUM_SQUARES, SUM_COTANGENTS = 0, 1, 2  # modes of CHANNEL_SUMS
PIXELS = 64  # per task of CHANNEL_SUMS and NORMALISE

CHANNEL_SUMS = Arguments(
    operands=(
        "x",  # (count, width)
        "g",  # for SUM_COTANGENTS: (count, width), 0 where relu is 1 and the normalised x is not positive
        "mean",  # `width` elements
        "scale",  # `width` elements: normalised is (x - mean) scale + bias
        "bias",  # `width` elements
        "parts",  # for each task: (2, width), sums of x; of (x - mean)^2; of g and of g (x - mean)
    ),
    numbers=(
        "x_bytes",  # between pixels
        "g_bytes",  # between pixels
        "count",
        "width",
        "mode",
        "relu",
    ),
)

NORMALISE = Arguments(
    operands=(
        "x",  # (count, width)
        "g",  # optional: (count, width), as in CHANNEL_SUMS
        "mean",  # `width` elements each
        "scale",
        "bias",
        "factor",  # with g
        "slope",
        "offset",
        "y",  # the result: (x - mean) scale + bias, with g in its place g factor + (x - mean) slope + offset
    ),
    numbers=(
        "x_bytes",  # between pixels
        "g_bytes",  # between pixels
        "y_bytes",  # between pixels
        "count",
        "width",
        "relu",
    ),
)

TRANSFORM_COTANGENT = Arguments(
    operands=(
        "g",  # the cotangent of the map (images, height, width, channels)
        "m",  # the result: (POINTS, tiles, channels)
    ),
    numbers=(
        "pixel_bytes",  # of the map
        "row_bytes",
        "image_bytes",
        "height",
        "width",
        "channels",
        "tile_bytes",  # between tiles of m
        "point_bytes",  # between points of m
        "first_tile",  # of the whole map, the one that task 0 transforms
    ),
)

TRANSFORM_WEIGHT_GRADIENT = Arguments(
    operands=(
        "u",  # the gradient of the transformed weight: (POINTS, out, channels)
        "weight",  # the result: (out, channels, 3, 3)
    ),
    numbers=(
        "point_bytes",  # between points of u
        "out_bytes",  # between output channels of the weight
        "channels",
    ),
)

SHRINK = Arguments(
    operands=(
        "g",  # the large map (images, height, width, channels)
        "y",  # the result: the small map (images, small height, small width, channels)
        "row_spans",  # (small height, 2) int64: first and last large row that a small row goes to
        "row_factors",  # (small height, most rows): their factors
        "column_spans",  # (small width, 2) int64
        "column_factors",  # (small width, most columns)
    ),
    numbers=(
        "g_pixel_bytes",
        "g_row_bytes",
        "g_image_bytes",
        "y_pixel_bytes",
        "y_row_bytes",
        "y_image_bytes",
        "width",
        "small_height",
        "small_width",
        "channels",
        "row_factor_bytes",  # between rows of the factors
        "column_factor_bytes",
    ),
)
