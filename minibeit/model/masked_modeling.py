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
    ops: Ops, p: MaskedImageModeling, x: Array, config: BeitConfig, trace: Scope = SILENT
) -> Array:  # (B, N, D) -> (B, P, V)
    """Scores of all V visual tokens for every patch: a layer norm of all tokens, a linear layer on the patch tokens.

    Source: BEiT section 2.3.
    """
    x = trace.record("layernorm", ops.layer_norm(x, p.norm, config.layer_norm_eps))
    return trace.record("logits", ops.linear(x[:, 1:], p.lm_head))


def masked_modeling_loss(ops: Ops, logits: Array, mask: Array, labels: Array) -> Array:  # (B, P, V), (B, P), (n,) -> ()
    """Mean cross-entropy over the n masked patches; `labels` are their visual tokens, image by image."""
    return ops.cross_entropy(ops.masked_patches(logits, mask), labels, IGNORE_INDEX)
