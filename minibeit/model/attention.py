"""Multi-head self-attention with a relative position bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..config import BeitConfig
from ..params import Attention
from ..trace import SILENT, Scope
from .dropout import PROBS, dropout_factors
from .position_bias import PositionBias

Array = Any


def self_attention(
    ops: Any,
    p: Attention,
    x: Array,
    bias: PositionBias | None,
    config: BeitConfig,
    noise: Any | None = None,
    trace: Scope = SILENT,
) -> Array:  # (B, N, D) -> (B, N, D)
    """softmax(q k^T / sqrt(d) + bias) v, all heads side by side; the output projection is the block's business.

    Source: Vaswani et al. 2017; BEiT section 2.1 for the bias.
    """
    if bias is not None:
        table = trace.record("bias_table", bias.table)  # (R, H), for the grid at hand
        bias = bias if table is bias.table else replace(bias, table=table)
    qkv = ops.project_qkv(x, p, config.num_attention_heads)  # each (B, H, N, d)
    q, k, v = (trace.record(name, array) for name, array in zip(("query", "key", "value"), qkv, strict=True))
    keep = None
    if noise is not None and config.attention_probs_dropout_prob > 0:
        B, H, N, _ = q.shape
        rate = config.attention_probs_dropout_prob
        keep = dropout_factors(ops, noise.at(place=PROBS), (B, H, N, N), rate, x.dtype)
    if trace.wants("probs"):
        context, probs = ops.attention(q, k, v, bias, return_probs=True, keep=keep)
        trace.record("probs", probs if keep is None else ops.dropout(probs, keep))  # (B, H, N, N)
    else:
        context = ops.attention(q, k, v, bias, keep=keep)  # (B, N, D)
    return trace.record("context", context)
