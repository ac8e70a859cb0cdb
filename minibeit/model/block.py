"""One transformer block: attention and MLP, each with a layer norm before it and a scaled residual after it."""

from __future__ import annotations

from typing import Any

from ..config import BeitConfig
from ..noise import Noise
from ..ops import Ops, PositionBias
from ..params import Block
from ..trace import SILENT, Scope
from .attention import attention_branch
from .dropout import MLP, MLP_PATH, branch_factors

Array = Any


def mlp_branch(
    ops: Ops,
    p: Block,
    x: Array,
    config: BeitConfig,
    drop_path_rate: float = 0.0,
    noise: Noise | None = None,
    trace: Scope = SILENT,
) -> Array:  # (B, N, D) -> (B, N, D)
    """x + lambda_2 * fc2(f(fc1(norm2(x))))."""
    y = trace.record("norm2", ops.layer_norm(x, p.norm2, config.layer_norm_eps))
    hidden = trace.record("mlp.hidden", ops.linear_activation(y, p.fc1, config.hidden_act))  # (B, N, F)
    keep = branch_factors(ops, noise, x, config.hidden_dropout_prob, drop_path_rate, (MLP, MLP_PATH))
    return trace.record("output", ops.linear_residual(hidden, p.fc2, p.lambda_2, x, keep))


def block(
    ops: Ops,
    p: Block,
    x: Array,
    bias: PositionBias | None,
    config: BeitConfig,
    drop_path_rate: float = 0.0,
    noise: Noise | None = None,
    trace: Scope = SILENT,
) -> Array:  # (B, N, D) -> (B, N, D)
    """x = x + lambda_1 * attention(norm1(x));  x = x + lambda_2 * fc2(f(fc1(norm2(x)))).

    The layer scale lambda starts near zero (0.1 in base models, 1e-5 in large ones), so that a block begins close to
    the identity and deep stacks train.  Source: BEiT section 2.2 and appendix A; Touvron et al. 2021 (CaiT) for the
    layer scale.
    """
    x = attention_branch(ops, p, x, bias, config, drop_path_rate, noise, trace)
    return mlp_branch(ops, p, x, config, drop_path_rate, noise, trace)
