"""Planted faults of tokenizers: what is broken, where it must be found, and what the diagnosis must say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from verify_plant import Fault, align_corners, averaged, bf16, f16, op

from minibeit import DalleTokenizerConfig
from minibeit.ops import reference
from minibeit.tokenizer.preprocess import map_pixels
from minibeit.verify.informative import informative_weights
from minibeit.verify.lockstep import Job, Report, check, model_source
from minibeit.verify.networks import TOKENIZER, network

SMALL = DalleTokenizerConfig(
    num_groups=3, num_blocks_per_group=1, hidden_size=12, vocab_size=20, input_channels=3, n_init=5, image_size=24
)


def tokenizer_job(config: DalleTokenizerConfig = SMALL, seed: int = 0, batch: int = 2, size: Any = None) -> Job:
    """A small tokenizer on weights of which every one matters, and random pixels."""
    height, width = size or (config.image_size, config.image_size)
    pixels = map_pixels(np.random.default_rng(seed).random((batch, config.input_channels, height, width), np.float32))
    return Job(config, TOKENIZER, informative_weights(config, TOKENIZER, seed), {"pixel_values": pixels})


def tokenizer_of(made: Job, backend: str = "numpy") -> Any:
    """The tokenizer under test, without any fault yet, whose ops may be replaced."""
    tokenizer = network(made.config, made.task, dict(made.arrays), backend=backend)
    tokenizer.ops = SimpleNamespace(**vars(tokenizer.ops))
    return tokenizer


def report_of(fault: Fault, seed: int = 0, yardstick: Any = None) -> Report:
    """What the verifier says about a tokenizer with this fault."""
    made = tokenizer_job(seed=seed)
    tokenizer = tokenizer_of(made)
    tokenizer = fault.plant(tokenizer) or tokenizer
    return check(made, model_source(made, tokenizer, fault.name), yardstick and yardstick(made))


def weights(change: Any, *names: str) -> Any:
    """Replaces these weights."""

    def plant(tokenizer: Any) -> Any:
        arrays = dict(tokenizer.arrays)
        for name in names:
            arrays[name] = np.ascontiguousarray(change(arrays[name]), np.float32)
        return network(tokenizer.config, TOKENIZER, arrays, backend="numpy")

    return plant


def padded(mode: str) -> Any:
    def faulty(x: Any, conv: Any) -> Any:
        r = conv.weight.shape[2] // 2
        wide = np.pad(np.maximum(x, 0), ((0, 0), (0, 0), (r, r), (r, r)), mode)
        y = reference.conv2d(wide, conv)
        return y[:, :, r : y.shape[2] - r, r : y.shape[3] - r]

    return faulty


def gained(change: Any) -> Any:
    return lambda x, conv, gain, residual: residual + np.float32(change(gain)) * reference.relu_conv2d(x, conv)


def relu_residual(x: Any, conv: Any, gain: float, residual: Any) -> Any:
    return reference.relu_conv2d_residual(x, conv, gain, np.maximum(residual, 0))


def bias_after_gain(x: Any, conv: Any, gain: float, residual: Any) -> Any:
    bias = conv.bias[:, None, None]
    return residual + np.float32(gain) * (reference.relu_conv2d(x, conv) - bias) + bias


def pooled3x3(x: Any) -> Any:
    wide = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    h, w = x.shape[2:]
    return np.max([wide[:, :, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)], 0)


def after_relu(name: str, function: Any) -> Any:
    return op(name, lambda x, conv, *rest: reference.conv2d(function(x), conv))


def bilinear(x: Any) -> Any:
    return reference.resize_bilinear(x, (2 * x.shape[2], 2 * x.shape[3]))


E, D, B0 = "encoder.", "decoder.", "encoder.groups.0.blocks.0."
BLOCKS = SMALL.num_groups * SMALL.num_blocks_per_group

FAULTS = [
    Fault("BGR for RGB", E + "input", weights(lambda w: w[:, ::-1], E + "input.weight"), "BGR"),
    Fault("kernel flipped", E + "input", weights(lambda w: w[:, :, ::-1, ::-1], E + "input.weight"), "flipped"),
    Fault("rows and columns", E + "input", weights(lambda w: w.swapaxes(2, 3), E + "input.weight"), "swapped"),
    Fault(
        "weights laid out hwio",
        E + "input",
        weights(lambda w: w.transpose(0, 2, 3, 1).reshape(w.shape), E + "input.weight"),
        "laid out",
    ),
    Fault("bias of the input missing", E + "input", weights(lambda b: 0 * b, E + "input.bias"), "bias is missing"),
    Fault("borders mirrored", B0 + "path.0", op("relu_conv2d", padded("reflect"), 0), "mirrored"),
    Fault("borders repeated", B0 + "path.1", op("relu_conv2d", padded("edge"), 1), "repeated"),
    Fault("borders wrapped", B0 + "path.2", op("relu_conv2d", padded("wrap"), 2), "other side"),
    Fault(
        "transposed channels",
        B0 + "path.1",
        weights(lambda w: w.swapaxes(0, 1), B0 + "path.1.weight"),
        "channels of the kernel are swapped",
    ),
    Fault("ReLU missing", B0 + "path.0", op("relu_conv2d", reference.conv2d, 0), "ReLU before the convolution is mis"),
    Fault(
        "ReLU after the convolution",
        B0 + "path.1",
        op("relu_conv2d", lambda x, conv: np.maximum(reference.conv2d(x, conv), 0), 1),
        "after the convolution instead",
    ),
    Fault("leaky ReLU", B0 + "path.0", after_relu("relu_conv2d", lambda x: np.where(x > 0, x, 0.01 * x)), "leaky"),
    Fault("gain missing", B0 + "output", op("relu_conv2d_residual", gained(lambda g: 1)), "2 is missing"),
    Fault("gain 1 / n", B0 + "output", op("relu_conv2d_residual", gained(lambda g: g**0.5)), "not its square"),
    Fault("gain twice", B0 + "output", op("relu_conv2d_residual", gained(lambda g: g * g)), "twice"),
    Fault(
        "gain of another number of blocks",
        B0 + "output",
        op("relu_conv2d_residual", gained(lambda g: 1 / (BLOCKS + 1) ** 2)),
        f"the gain is {1 / (BLOCKS + 1) ** 2:.4g}",
    ),
    Fault("bias after the gain", B0 + "output", op("relu_conv2d_residual", bias_after_gain), "after the gain"),
    Fault("in-place ReLU", B0 + "output", op("relu_conv2d_residual", relu_residual), "in-place"),
    Fault(
        "path missing",
        D + "groups.1.blocks.0.output",
        op("relu_conv2d_residual", lambda x, c, g, r: r, 4),
        "path is mis",
    ),
    Fault(
        "ReLU before the identity",
        E + "groups.1.blocks.0.identity",
        op("conv2d", reference.relu_conv2d, 1),
        "ReLU stands before",
    ),
    Fault("average for maximum", E + "groups.0.pooled", op("max_pool2x2", averaged), "average"),
    Fault("window of 3x3", E + "groups.1.pooled", op("max_pool2x2", pooled3x3, 1), "3x3"),
    Fault("output bias missing", E + "logits", weights(lambda b: 0 * b, E + "output.bias"), "bias is missing"),
    Fault("tokens from 1", "tokens", op("argmax_channels", lambda x: (x.argmax(1) + 1) % 20), "counted from 1"),
    Fault(
        "tokens column by column",
        "tokens",
        op("argmax_channels", lambda x: np.ascontiguousarray(x.argmax(1).swapaxes(1, 2))),
        "rows and columns",
    ),
    Fault("smallest logit", "tokens", op("argmax_channels", lambda x: x.argmin(1)), "smallest"),
    Fault(
        "lookup off by one",
        D + "input",
        op("conv2d_one_hot", lambda ids, conv: reference.conv2d_one_hot((ids + 1) % 20, conv)),
        "counted from 1",
    ),
    Fault("decoder bias missing", D + "input", weights(lambda b: 0 * b, D + "input.bias"), "bias is missing"),
    Fault("bilinear enlargement", D + "groups.0.enlarged", op("upsample2x2", bilinear), "bilinear"),
    Fault(
        "aligned corners",
        D + "groups.1.enlarged",
        op("upsample2x2", lambda x: align_corners(x, (2 * x.shape[2], 2 * x.shape[3])), 1),
        "align_corners",
    ),
    Fault("tiled", D + "groups.0.enlarged", op("upsample2x2", lambda x: np.tile(x, (1, 1, 2, 2))), "whole map"),
    Fault("bfloat16 weights", B0 + "path.1", weights(bf16, B0 + "path.1.weight"), "rounded to bfloat16"),
    Fault("float16 input", B0 + "path.0", after_relu("relu_conv2d", lambda x: f16(np.maximum(x, 0))), "float16"),
    Fault(
        "one wrong weight",
        D + "groups.2.blocks.0.path.1",
        weights(lambda w: w + 0.01 * (w == w.max()), D + "groups.2.blocks.0.path.1.weight"),
    ),
    Fault(
        "blocks exchanged",
        D + "groups.0.blocks.0.path.1",
        weights(lambda w: w[::-1], D + "groups.0.blocks.0.path.1.weight", D + "groups.0.blocks.0.path.1.bias"),
        "",
    ),
    Fault(
        "ReLU missing at the end",
        D + "statistics",
        op("relu_conv2d", reference.conv2d, 19),
        "ReLU before the convolution is missing",
    ),
]
