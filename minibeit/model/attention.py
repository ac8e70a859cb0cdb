"""Multi-head self-attention with a relative position bias: the first half of a block."""

from __future__ import annotations

from typing import Any

from ..config import BeitConfig
from ..noise import Noise
from ..ops import Ops, PositionBias
from ..params import Attention, Block
from ..trace import SILENT, Scope
from .dropout import ATTENTION, ATTENTION_PATH, PROBS, branch_factors, dropout_factors

Array = Any


def attention_heads(
    ops: Ops,
    p: Attention,
    x: Array,
    bias: PositionBias | None,
    config: BeitConfig,
    noise: Noise | None = None,
    trace: Scope = SILENT,
) -> Array:  # (B, N, D) -> (B, N, D)
    """softmax(q k^T / sqrt(d) + bias) v of every head, concatenated along the last axis.

    Source: Vaswani et al. 2017; BEiT appendix A for the bias.
    """
    if bias is not None:
        bias = PositionBias(trace.record("bias_table", bias.table), bias.grid)  # (R, H), for this grid
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


def attention_branch(
    ops: Ops,
    p: Block,
    x: Array,
    bias: PositionBias | None,
    config: BeitConfig,
    drop_path_rate: float = 0.0,
    noise: Noise | None = None,
    trace: Scope = SILENT,
) -> Array:  # (B, N, D) -> (B, N, D)
    """x + lambda_1 * (attention_heads(norm1(x)) W_o^T + b_o)."""
    y = trace.record("norm1", ops.layer_norm(x, p.norm1, config.layer_norm_eps))
    heads = attention_heads(ops, p.attention, y, bias, config, noise, trace.at("attention"))
    places = ATTENTION, ATTENTION_PATH
    keep = branch_factors(ops, noise, x, config.hidden_dropout_prob, drop_path_rate, places)
    return trace.record("attention.residual", ops.linear_residual(heads, p.attention.output, p.lambda_1, x, keep))
