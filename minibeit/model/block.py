"""One transformer block: attention and MLP, each normalised before, scaled and added to its input after."""

from __future__ import annotations

from typing import Any

from ..config import BeitConfig
from ..params import Block, Linear
from ..trace import SILENT, Scope
from .attention import self_attention
from .dropout import ATTENTION, ATTENTION_PATH, MLP, MLP_PATH, branch_factors
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
    noise: Any | None,
    places: tuple[int, int],
) -> Array:  # (B, N, D), (B, N, in) -> (B, N, D)
    """x + drop_path(scale * dropout(branch W^T + b))."""
    keep = branch_factors(ops, noise, x, config.hidden_dropout_prob, drop_path_rate, places)
    if keep is None:
        return ops.linear_residual(branch, layer, scale, x)
    return ops.linear_residual(branch, layer, scale, x, keep)


def block(
    ops: Any,
    p: Block,
    x: Array,
    bias: PositionBias | None,
    config: BeitConfig,
    drop_path_rate: float = 0.0,
    noise: Any | None = None,
    trace: Scope = SILENT,
) -> Array:  # (B, N, D) -> (B, N, D)
    """x = x + lambda_1 * attention(norm1(x));  x = x + lambda_2 * fc2(f(fc1(norm2(x)))).

    Source: BEiT section 2.1; Touvron et al. 2021 (CaiT) for the layer scale lambda.
    """
    eps = config.layer_norm_eps
    y = trace.record("norm1", ops.layer_norm(x, p.norm1, eps))
    context = self_attention(ops, p.attention, y, bias, config, noise, trace.at("attention"))
    places = ATTENTION, ATTENTION_PATH
    x = add_branch(ops, x, context, p.attention.output, p.lambda_1, config, drop_path_rate, noise, places)
    x = trace.record("attention.residual", x)

    y = trace.record("norm2", ops.layer_norm(x, p.norm2, eps))
    hidden = trace.record("mlp.hidden", ops.linear_activation(y, p.fc1, config.hidden_act))  # (B, N, F)
    x = add_branch(ops, x, hidden, p.fc2, p.lambda_2, config, drop_path_rate, noise, (MLP, MLP_PATH))
    return trace.record("output", x)
