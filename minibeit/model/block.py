"""One transformer block: attention and MLP, each normalised before, scaled and added to its input after."""

from __future__ import annotations

from typing import Any

from ..config import BeitConfig
from ..params import Block, Linear
from ..trace import SILENT, Scope
from .attention import self_attention
from .dropout import drop_path, dropout
from .position_bias import PositionBias

Array = Any


def add_branch(
    ops: Any,
    x: Array,
    branch: Array,
    layer: Linear,
    scale: Array | None,
    config: BeitConfig,
    drop_path_rate: float,
    rng: Any | None,
) -> Array:  # (B, N, D), (B, N, in) -> (B, N, D)
    """x + drop_path(scale * dropout(branch W^T + b)); one fused op when nothing is dropped."""
    if rng is None:
        return ops.linear_residual(branch, layer, scale, x)
    y = dropout(ops, rng, ops.linear(branch, layer), config.hidden_dropout_prob)
    if scale is not None:
        y = y * scale
    return x + drop_path(ops, rng, y, drop_path_rate)


def block(
    ops: Any,
    p: Block,
    x: Array,
    bias: PositionBias | None,
    config: BeitConfig,
    drop_path_rate: float = 0.0,
    rng: Any | None = None,
    trace: Scope = SILENT,
) -> Array:  # (B, N, D) -> (B, N, D)
    """x = x + lambda_1 * attention(norm1(x));  x = x + lambda_2 * fc2(f(fc1(norm2(x)))).

    Source: BEiT section 2.1; Touvron et al. 2021 (CaiT) for the layer scale lambda.
    """
    eps = config.layer_norm_eps
    y = trace.record("norm1", ops.layer_norm(x, p.norm1, eps))
    context = self_attention(ops, p.attention, y, bias, config, rng, trace.at("attention"))
    x = add_branch(ops, x, context, p.attention.output, p.lambda_1, config, drop_path_rate, rng)
    x = trace.record("attention.residual", x)

    y = trace.record("norm2", ops.layer_norm(x, p.norm2, eps))
    hidden = trace.record("mlp.hidden", ops.linear_activation(y, p.fc1, config.hidden_act))  # (B, N, F)
    x = add_branch(ops, x, hidden, p.fc2, p.lambda_2, config, drop_path_rate, rng)
    return trace.record("output", x)
