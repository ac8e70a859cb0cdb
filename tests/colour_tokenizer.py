"""A tokenizer made by hand, whose visual tokens are colours: the token of a square is the nearest to its brightest."""

from __future__ import annotations

import itertools

import numpy as np

from minibeit import DalleTokenizer, DalleTokenizerConfig
from minibeit.tokenizer.params import param_shapes

SHIFT = 4.0  # keeps what the decoder passes on positive, since a ReLU stands before its output


def colours(steps: int = 4) -> np.ndarray:  # -> (steps^3, 3), in 0.1..0.9
    """A grid of mapped colours; the token's number is the colour's in this order."""
    levels = np.linspace(0.15, 0.85, steps)
    return np.array(list(itertools.product(levels, repeat=3)))


def colour_tokenizer(num_groups: int = 3, steps: int = 4, **options) -> DalleTokenizer:
    """Three channels are handed through all blocks, whose paths are zero, so that max-pooling takes the brightest.

    The logit 2 c x - c^2 of a colour c is largest for the nearest one to x.
    """
    centres = colours(steps)
    config = DalleTokenizerConfig(
        num_groups=num_groups, hidden_size=4, vocab_size=len(centres), n_init=3, num_blocks_per_group=1
    )
    arrays = {name: np.zeros(shape, np.float32) for name, shape in param_shapes(config).items()}
    for name, array in arrays.items():
        if name.endswith("identity.weight"):
            for channel in range(3):
                array[channel, channel] = 1
    for channel in range(3):
        arrays["encoder.input.weight"][channel, channel, 3, 3] = 1
        arrays["decoder.output.weight"][channel, channel] = 1
    arrays["encoder.output.weight"][:, :3, 0, 0] = 2 * centres
    arrays["encoder.output.bias"][:] = -np.square(centres).sum(1)
    arrays["decoder.input.weight"][:, :, 0, 0] = np.log(centres / (1 - centres)).T + SHIFT
    arrays["decoder.output.bias"][:3] = -SHIFT
    return DalleTokenizer(config, arrays=arrays, **{"backend": "numpy", **options})
