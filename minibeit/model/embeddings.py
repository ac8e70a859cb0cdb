"""Pixels to tokens: patches, the mask token, the CLS token and absolute positions."""

from __future__ import annotations

from typing import Any

from ..config import BeitConfig
from ..noise import Noise
from ..ops import Ops
from ..params import Embeddings
from ..trace import SILENT, Scope
from .dropout import dropout

Array = Any


def patch_grid(pixel_values: Array, config: BeitConfig) -> tuple[int, int]:  # (B, C, height, width) -> (gh, gw)
    """The height and width of the images in patches."""
    ph, pw = config.patch_shape
    return pixel_values.shape[2] // ph, pixel_values.shape[3] // pw


def patchify(
    pixel_values: Array, patch_shape: tuple[int, int]
) -> Array:  # (B, C, height, width) -> (B, P, C * ph * pw)
    """Splits images into patches, row by row, and flattens each in the order channel, row, column."""
    B, C, height, width = pixel_values.shape
    ph, pw = patch_shape
    gh, gw = height // ph, width // pw
    x = pixel_values.reshape(B, C, gh, ph, gw, pw).transpose(0, 2, 4, 1, 3, 5)  # (B, gh, gw, C, ph, pw)
    return x.reshape(B, gh * gw, C * ph * pw)


def embed(
    ops: Ops,
    p: Embeddings,
    pixel_values: Array,
    config: BeitConfig,
    bool_masked_pos: Array | None = None,
    noise: Noise | None = None,
    trace: Scope = SILENT,
) -> Array:  # (B, C, height, width) -> (B, N, D)
    """Tokens of a batch of images: [CLS], then one token per patch.

    x = patches W^T + b; the mask token replaces the patches that `bool_masked_pos` (B, P) marks; the CLS token is
    prepended; absolute positions, if the model has them, are added last, so that masked patches keep theirs.
    Source: BEiT sections 2.1.1, 2.2 and 2.3; BeitEmbeddings of transformers 5.
    """
    x = trace.record("patches", ops.linear(patchify(pixel_values, config.patch_shape), p.patch))  # (B, P, D)
    if bool_masked_pos is not None:
        x = ops.mask_tokens(x, bool_masked_pos, p.mask_token)
    x = ops.concatenate([p.cls_token, x], axis=1)  # (B, N, D)
    if p.position_embeddings is not None:
        grid = patch_grid(pixel_values, config)
        x = ops.add(x, resize_positions(ops, p.position_embeddings, position_grid(config), grid))
    return dropout(ops, noise, x, config.hidden_dropout_prob)


def position_grid(config: BeitConfig) -> tuple[int, int]:
    """The patch grid that the rows of `position_embeddings` belong to."""
    gh, gw = config.grid
    side = int((gh * gw) ** 0.5)
    if config.compat == "transformers" and side * side == gh * gw:
        return side, side  # transformers assumes a square grid
    return gh, gw


def resize_positions(
    ops: Ops, table: Array, old: tuple[int, int], new: tuple[int, int]
) -> Array:  # (1, P + 1, D) -> (1, P' + 1, D)
    """Absolute positions for another grid: bicubic over the patches' rows, the CLS token's row unchanged."""
    if old == new:
        return table
    D = table.shape[-1]
    maps = table[:, 1:].reshape(1, *old, D).transpose(0, 3, 1, 2)  # (1, D, gh, gw)
    rows = ops.resize_bicubic(maps, new).transpose(0, 2, 3, 1).reshape(1, -1, D)
    return ops.concatenate([table[:, :1], rows], axis=1)
