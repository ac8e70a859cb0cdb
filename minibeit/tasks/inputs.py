"""Checks the arguments of a call.  Every function raises ValueError: one sentence with what was expected and found."""

from __future__ import annotations

from typing import Any

from ..config import BeitConfig
from ..foreign import as_numpy
from ..ops import Ops

Array = Any
LARGEST_PIXEL = 1e12  # larger ones overflow float32 when the first layer norm squares them, and all outputs are NaN
LARGEST_HALF_PIXEL = 1e3  # the same in float16


def checked_pixels(ops: Ops, pixel_values: Any, config: BeitConfig, dtype: str) -> Array:  # -> (B, C, height, width)
    """`pixel_values` in the model's dtype: finite, height and width multiples of the patch size."""
    try:
        x = ops.stage(pixel_values, dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"pixel_values: expected numbers of shape (B, C, height, width): {error}") from error
    C, (ph, pw) = config.num_channels, config.patch_shape
    if x.ndim != 4:
        raise ValueError(
            f"pixel_values: expected shape (B, C, height, width), found {tuple(x.shape)}; "
            "BeitImageProcessor makes such arrays from images"
        )
    if x.shape[1] != C:
        raise ValueError(f"pixel_values: expected {C} channels as in the config, found shape {tuple(x.shape)}")
    height, width = x.shape[2:]
    if x.shape[0] == 0 or height < ph or width < pw or height % ph or width % pw:
        raise ValueError(
            f"pixel_values: expected at least one image, height and width multiples of the patch size {ph}x{pw}, "
            f"found shape {tuple(x.shape)}"
        )
    most = LARGEST_HALF_PIXEL if dtype == "float16" else LARGEST_PIXEL
    if not ops.all_finite(x, most):
        what = f"values beyond {most:g}" if ops.all_finite(x) else "NaN or infinite values"
        raise ValueError(f"pixel_values: found {what}; check the image and its normalisation")
    return ops.asarray(x, dtype)


def checked_mask(
    ops: Ops, bool_masked_pos: Any, mask_token: Any, patches: tuple[int, int]
) -> Array | None:  # -> (B, P)
    """The mask of `patches` = (B, P), for a model that has a mask token."""
    if bool_masked_pos is None:
        return None
    if mask_token is None:
        raise ValueError("bool_masked_pos: this model has no mask token; it needs use_mask_token=True in its config")
    mask = ops.stage(bool_masked_pos, "bool")
    if mask.shape != patches:
        raise ValueError(
            f"bool_masked_pos: expected shape (B, P) = {patches}, one flag per patch, found {tuple(mask.shape)}"
        )
    return ops.asarray(mask, "bool")


def label_array(ops: Ops, labels: Any, dtype: str) -> Array:
    """`labels` in that dtype: "int64" for class numbers, which must be whole."""
    try:
        array = ops.stage(labels, "float64")
    except (TypeError, ValueError) as error:
        raise ValueError(f"labels: expected an array of numbers: {error}") from error
    if not ops.all_finite(array):
        raise ValueError("labels: found NaN or infinite values")
    result = ops.stage(array, dtype)
    if dtype == "int64" and bool((result != array).any()):
        raise ValueError("labels: expected class numbers, which are integers, found fractions")
    return result


def label_map(ops: Ops, labels: Any, config: BeitConfig, batch: int) -> Array:  # -> (B, height, width)
    """The class of every pixel."""
    if config.num_labels == 1:
        raise ValueError("labels: a segmentation loss needs more than one class, the config has one")
    array = label_array(ops, labels, "int64")
    if array.ndim != 3 or array.shape[0] != batch:
        raise ValueError(f"labels: expected shape ({batch}, height, width), found {tuple(array.shape)}")
    return array


def masked_labels(ops: Ops, labels: Any, mask: Array | None) -> Array:  # -> (n,)
    """The visual token of each of the n patches that `mask` marks."""
    if mask is None:
        raise ValueError("labels: a loss needs bool_masked_pos, since it counts masked patches only")
    array, n = label_array(ops, labels, "int64"), int(mask.sum())
    if array.shape != (n,):
        raise ValueError(
            f"labels: expected one visual token per masked patch, shape ({n},), found {tuple(array.shape)}"
        )
    return array


def class_labels(ops: Ops, labels: Any, config: BeitConfig, shape: tuple[int, int], dtype: str) -> tuple[Array, str]:
    """(labels, problem type) for logits of `shape` (B, K).

    Without a `problem_type` in the config the choice is that of transformers: regression for one output, single-label
    for integer labels, else multi-label.
    """
    B, K = shape
    problem = config.problem_type or _problem(labels, K)
    if problem == "single_label_classification":
        allowed: tuple[tuple[int, ...], ...] = ((B,),)
    elif problem == "regression" and K == 1:
        allowed = ((B,), (B, 1))
    else:
        allowed = ((B, K),)
    array = label_array(ops, labels, "int64" if problem == "single_label_classification" else dtype)
    if array.shape not in allowed:
        raise ValueError(f"labels: expected shape {allowed[0]} for this batch, found {tuple(array.shape)}")
    return array, problem


def _problem(labels: Any, K: int) -> str:
    if K == 1:
        return "regression"
    return "single_label_classification" if _kind(labels) in "iu" else "multi_label_classification"


def _kind(labels: Any) -> str:
    """NumPy's kind of the labels' dtype ("i" or "u" for integers), whatever library they come from."""
    try:
        return as_numpy(labels).dtype.kind
    except (TypeError, ValueError):
        return "f"  # not an array: refused when it is read
