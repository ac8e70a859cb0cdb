"""The weights of a tokenizer as frozen dataclasses, and the one list of their names and shapes.

As in `minibeit.params`: `shapes(config)` fills the tree with shape tuples, `unflatten` replaces those by arrays, and
the canonical name of an array is its attribute path, for example `encoder.groups.0.blocks.1.path.2.weight`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..params import Conv, ReluConv, flatten
from .config import DalleTokenizerConfig

INPUT_KERNEL = 7  # of the encoder
ENCODER_KERNELS, DECODER_KERNELS = (3, 3, 3, 1), (1, 3, 3, 3)  # along a block's path


@dataclass(frozen=True)
class ResidualBlock:
    """identity(x) + gain * path(x)."""

    identity: Conv | None  # (out, in, 1, 1), where the width changes
    path: tuple[ReluConv, ...]  # four: (out / 4, in, k, k), twice (out / 4, out / 4, k, k), (out, out / 4, k, k)


@dataclass(frozen=True)
class Group:
    """Blocks of one width and map size."""

    blocks: tuple[ResidualBlock, ...]


@dataclass(frozen=True)
class Encoder:
    """Pixels to the logits of the visual tokens."""

    input: Conv  # (hidden, C, 7, 7)
    groups: tuple[Group, ...]
    output: ReluConv  # (V, last width, 1, 1)


@dataclass(frozen=True)
class Decoder:
    """Visual tokens to the parameters of the pixels' distribution."""

    input: Conv  # (n_init, V, 1, 1)
    groups: tuple[Group, ...]
    output: ReluConv  # (2 C, hidden, 1, 1): for each channel the mean, then for each the logarithm of the scale


@dataclass(frozen=True)
class Tokenizer:
    """Both halves; a tokenizer that only makes tokens has no decoder."""

    encoder: Encoder
    decoder: Decoder | None


def shapes(config: DalleTokenizerConfig) -> Tokenizer:
    """The parameter tree with shape tuples as leaves."""
    widths, C, V = config.widths, config.input_channels, config.vocab_size
    encoder = Encoder(
        input=Conv((widths[0], C, INPUT_KERNEL, INPUT_KERNEL), (widths[0],)),
        groups=_groups(widths[0], widths, config.num_blocks_per_group, ENCODER_KERNELS),
        output=ReluConv((V, widths[-1], 1, 1), (V,)),
    )
    if config.n_init is None:
        return Tokenizer(encoder, None)
    decoder = Decoder(
        input=Conv((config.n_init, V, 1, 1), (config.n_init,)),
        groups=_groups(config.n_init, widths[::-1], config.num_blocks_per_group, DECODER_KERNELS),
        output=ReluConv((2 * C, widths[0], 1, 1), (2 * C,)),
    )
    return Tokenizer(encoder, decoder)


def param_shapes(config: DalleTokenizerConfig) -> dict[str, tuple[int, ...]]:
    """{canonical name: shape} of every parameter, in the order of the tree's fields."""
    return flatten(shapes(config))


def random_arrays(config: DalleTokenizerConfig, seed: int | None, dtype: str) -> dict[str, np.ndarray]:
    """Random weights as DALL-E's begin: Normal(0, 1 / sqrt(in k k)), biases zero.

    Source: Conv2d in the package dall_e.
    """
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in param_shapes(config).items():
        if len(shape) == 1:
            arrays[name] = np.zeros(shape, dtype)
        else:
            spread = np.float32(1 / math.sqrt(math.prod(shape[1:])))
            arrays[name] = (spread * rng.standard_normal(shape, dtype=np.float32)).astype(dtype)
    return arrays


def _groups(into: int, widths: tuple[int, ...], blocks: int, kernels: tuple[int, ...]) -> tuple[Group, ...]:
    groups = []
    for width in widths:
        groups.append(Group(tuple(_block(into if i == 0 else width, width, kernels) for i in range(blocks))))
        into = width
    return tuple(groups)


def _block(into: int, out: int, kernels: tuple[int, ...]) -> ResidualBlock:
    inner = out // 4
    widths = (into, inner, inner, inner, out)
    path = tuple(ReluConv((new, old, kernel, kernel), (new,)) for old, new, kernel in zip(widths, widths[1:], kernels))
    return ResidualBlock(Conv((out, into, 1, 1), (out,)) if into != out else None, path)
