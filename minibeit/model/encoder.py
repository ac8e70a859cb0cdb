"""The whole encoder: embeddings, L blocks, final norm, pooling."""

from __future__ import annotations

from typing import Any

from ..config import BeitConfig
from ..noise import Noise, as_noise
from ..ops import Ops
from ..params import Beit
from ..trace import SILENT, Scope
from .block import block
from .embeddings import embed, patch_grid
from .position_bias import position_biases

Array = Any


def encode(
    ops: Ops,
    p: Beit,
    pixel_values: Array,
    config: BeitConfig,
    collect: tuple[int, ...] = (),
    depth: int | None = None,
    bool_masked_pos: Array | None = None,
    rng: Any | Noise | None = None,
    trace: Scope = SILENT,
) -> tuple[Array, list[Array]]:  # (B, C, height, width) -> (B, N, D), hidden states
    """The last hidden state, and the hidden states whose numbers are in `collect`.

    `depth` is the number of blocks to run, by default all; a head that reads only earlier states needs fewer.
    Hidden state 0 is the embeddings, i the output of block i - 1, none of them normalised.  The last hidden state is
    normalised only without mean pooling; with it the norm comes after the mean (see `pool`).  The rate of stochastic
    depth rises linearly from 0 in the first block to `drop_path_rate` in the last.
    `rng`, a NumPy generator or `Noise`, switches dropout and stochastic depth on.
    """
    noise = None if rng is None else as_noise(rng)
    biases = position_biases(ops, p, config, patch_grid(pixel_values, config))
    x = embed(ops, p.embeddings, pixel_values, config, bool_masked_pos, noise, trace.at("embeddings"))
    x = trace.record("embeddings", x)
    states = {0: x}
    for i, (block_params, bias) in enumerate(list(zip(p.encoder, biases))[:depth]):
        rate = config.drop_path_rate * i / max(len(p.encoder) - 1, 1)
        own = None if noise is None else noise.at(block=i + 1)  # 0 is for the embeddings
        x = ops.recompute(block, ops, (block_params, x, bias, config, rate, own, trace.at("encoder").at(i)))
        if i + 1 in collect:
            states[i + 1] = x
    if p.norm is not None:
        x = trace.record("norm", ops.layer_norm(x, p.norm, config.layer_norm_eps))
    return x, [states[i] for i in collect]


def pool(ops: Ops, p: Beit, x: Array, config: BeitConfig) -> Array:  # (B, N, D) -> (B, D)
    """The image as one vector: the layer norm of the mean over patch tokens (without CLS), or else the CLS token.

    Source: BEiT section 2.6 (average pooling for classification); `fc_norm` of microsoft/unilm.
    """
    if not config.use_mean_pooling:
        return x[:, 0]
    return ops.layer_norm(ops.mean_patches(x), p.pooler, config.layer_norm_eps)
