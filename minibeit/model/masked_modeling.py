"""The head of masked image modeling, and its loss."""

from __future__ import annotations

from typing import Any

from ..config import BeitConfig
from ..ops import Ops
from ..params import MaskedImageModeling
from ..trace import SILENT, Scope

Array = Any
IGNORE_INDEX = -100  # a label to ignore, as in PyTorch's cross-entropy


def token_logits(
    ops: Ops, p: MaskedImageModeling, x: Array, config: BeitConfig, mask: Array | None = None, trace: Scope = SILENT
) -> Array:  # (B, N, D) -> (B, P, V), with a mask (B, P) -> (n, V)
    """Scores of all V visual tokens for every patch: a layer norm of all tokens, a linear layer on the patch tokens.

    With `mask` for the n patches that it marks, image by image: all that training needs.
    Source: BEiT section 2.3.
    """
    x = trace.record("layernorm", ops.layer_norm(x, p.norm, config.layer_norm_eps))
    patches = x[:, 1:] if mask is None else ops.masked_patches(x[:, 1:], mask)
    return trace.record("logits", ops.linear(patches, p.lm_head))


def masked_modeling_loss(ops: Ops, logits: Array, labels: Array) -> Array:  # (n, V), (n,) -> ()
    """Mean cross-entropy over the n masked patches; `labels` are their visual tokens, image by image."""
    return ops.cross_entropy(logits, labels, IGNORE_INDEX)
