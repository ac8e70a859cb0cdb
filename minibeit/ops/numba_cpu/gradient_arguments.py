"""The arguments of the kernels for training, those on maps excepted, see `arguments`."""

from __future__ import annotations

from .arguments import Arguments

COMBINE_GELU, COMBINE_DERIVATIVE, COMBINE_PRODUCT = 0, 1, 2  # modes of COMBINE
GRADIENT_ROWS = 16  # rows per task of COMBINE and SCALE_GRADIENT
QUERY_ROWS = 96  # with probabilities alive in ATTENTION_BACKWARD; a multiple of MR and LANES on every CPU
CHUNK = 1 << 14  # weights per task of ADAMW

PACK_COLUMNS = Arguments(
    operands=(
        "matrix",  # (rows, columns)
        "panels",  # the result: (panels, rows, NR)
    ),
    numbers=(
        "row_bytes",  # of the matrix
        "rows",
        "columns",
    ),
)

TURN = Arguments(
    operands=(
        "matrix",  # (rows, columns)
        "turned",  # the result: (columns, rows)
        "sums",  # the sum of each column
    ),
    numbers=(
        "row_bytes",  # of the matrix
        "turned_bytes",  # between rows of the result
        "rows",
        "columns",
    ),
)

COMBINE = Arguments(
    operands=(
        "a",  # (count, width)
        "b",  # (count, width), or one row
        "y",  # the result
    ),
    numbers=(
        "a_bytes",  # between rows
        "b_bytes",  # between rows; 0 for one row
        "y_bytes",  # between rows
        "count",
        "width",
        "mode",  # COMBINE_GELU, COMBINE_DERIVATIVE or COMBINE_PRODUCT
    ),
)

SCALE_GRADIENT = Arguments(
    operands=(
        "gradient",  # G (count, width), multiplied by `scale` in place
        "weight",  # W (count, width)
        "scale",  # one factor for each row
        "products",  # the result: the sum of G W over each row
    ),
    numbers=(
        "g_bytes",  # between rows
        "w_bytes",  # between rows
        "count",
        "width",
    ),
)

LAYER_NORM_BACKWARD = Arguments(
    operands=(
        "g",  # the cotangent: `count` rows of `width` elements
        "x",  # the input
        "weight",  # `width` elements
        "dx",  # the result
        "parts",  # for each task 2 `width` elements: its part of the sums of g h and of g
        "eps",  # one element
    ),
    numbers=(
        "g_bytes",  # between rows
        "x_bytes",  # between rows
        "dx_bytes",  # between rows
        "count",  # rows
        "width",
    ),
)

ATTENTION_BACKWARD = Arguments(
    operands=(
        "q",  # (images, heads, count, size), the last axis contiguous
        "k",  # strides of q
        "v",  # strides of q
        "g",  # the cotangent of the context: (images, count, heads * size)
        "dq",  # the results, of one layout
        "dk",
        "dv",
        "bins",  # optional: for each head of each image its share of the table's gradient
        "scale",  # one element, the factor of the scores
        "table",  # optional: the bias table (offsets + 3, heads)
    ),
    numbers=(
        "heads",
        "count",  # tokens
        "size",  # elements of a head
        "image_bytes",  # of q, k, v
        "head_bytes",
        "row_bytes",
        "g_bytes",  # between rows
        "d_image_bytes",  # of dq, dk, dv
        "d_head_bytes",
        "d_row_bytes",
        "table_bytes",  # between rows of the table
        "grid_rows",  # of patches; 0 without a table
        "grid_columns",
    ),
)

ADAMW = Arguments(
    operands=(
        "weights",  # vectors of `count` elements, changed in place, but for the gradient
        "gradient",
        "mean",
        "square",
        "factors",  # seven elements, see `optimizer.adamw`
    ),
    numbers=("count",),
)

LOSS_ROWS = 64  # per task of LOG_SUMS and SOFTMAX_GRADIENT

LOG_SUMS = Arguments(
    operands=(
        "logits",  # (count, width)
        "largest",  # the results: the largest element of each row
        "sums",  # and the sum of exp(element - largest)
    ),
    numbers=(
        "row_bytes",  # between rows
        "count",
        "width",
    ),
)

SOFTMAX_GRADIENT = Arguments(
    operands=(
        "logits",  # (count, width)
        "log_sums",  # one element for each row: log of the sum of exp(element)
        "rests",  # one element for each row: what is missing there to more digits
        "factors",  # one element for each row; rows of factor 0 get zeros
        "y",  # the result: exp(logits - log_sums) times the factors, (count, width), contiguous
    ),
    numbers=(
        "row_bytes",  # between rows of the logits
        "count",
        "width",
    ),
)
