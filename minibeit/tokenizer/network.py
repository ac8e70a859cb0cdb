"""The discrete VAE's encoder and decoder, bottom-up.  Source: Ramesh et al. 2021, appendix A; the package dall_e.

What each function records stands in docs/verify.md, "Tokenizers".
"""

from __future__ import annotations

from typing import Any

from ..ops import Ops
from ..trace import SILENT, Scope
from .config import DalleTokenizerConfig
from .params import Decoder, Encoder, ResidualBlock

Array = Any


def residual_block(
    ops: Ops, p: ResidualBlock, x: Array, gain: float, trace: Scope = SILENT
) -> Array:  # (B, C, h, w) -> (B, out, h, w)
    """identity(x) + gain * path(x); before each of the path's four convolutions stands a ReLU.

    The gain, 1 / (number of blocks)^2, keeps the sum of all paths small at the beginning of training.
    """
    identity = x if p.identity is None else trace.record("identity", ops.conv2d(x, p.identity))
    *inner, last = p.path
    for i, conv in enumerate(inner):
        x = trace.record(f"path.{i}", ops.relu_conv2d(x, conv))
    return trace.record("output", ops.relu_conv2d_residual(x, last, gain, identity))


def encode(
    ops: Ops, p: Encoder, pixels: Array, config: DalleTokenizerConfig, trace: Scope = SILENT
) -> Array:  # (B, C, height, width) -> (B, V, h, w)
    """Logits of the visual tokens for every square of `config.pooling` pixels a side; `pixels` are mapped ones."""
    x = trace.record("input", ops.conv2d(pixels, p.input))
    for i, group in enumerate(p.groups):
        for j, block in enumerate(group.blocks):
            x = residual_block(ops, block, x, config.gain, trace.at(f"groups.{i}.blocks.{j}"))
        if i < len(p.groups) - 1:
            x = trace.record(f"groups.{i}.pooled", ops.max_pool2x2(x))
    return trace.record("logits", ops.relu_conv2d(x, p.output))


def decode(
    ops: Ops, p: Decoder, tokens: Array, config: DalleTokenizerConfig, trace: Scope = SILENT
) -> Array:  # (B, h, w) -> (B, 2 C, height, width)
    """Mean and log-scale of the logit-Laplace distribution of every mapped pixel, given visual tokens."""
    return _decode(ops, p, ops.conv2d_one_hot(tokens, p.input), config, trace)


def decode_relaxed(
    ops: Ops, p: Decoder, weights: Array, config: DalleTokenizerConfig, trace: Scope = SILENT
) -> Array:  # (B, V, h, w) -> (B, 2 C, height, width)
    """The same for a mixture of visual tokens, whose weights at each place sum to 1, as training has them."""
    return _decode(ops, p, ops.conv2d(weights, p.input), config, trace)


def _decode(ops: Ops, p: Decoder, x: Array, config: DalleTokenizerConfig, trace: Scope) -> Array:
    x = trace.record("input", x)
    for i, group in enumerate(p.groups):
        for j, block in enumerate(group.blocks):
            x = residual_block(ops, block, x, config.gain, trace.at(f"groups.{i}.blocks.{j}"))
        if i < len(p.groups) - 1:
            x = trace.record(f"groups.{i}.enlarged", ops.upsample2x2(x))
    return trace.record("statistics", ops.relu_conv2d(x, p.output))
