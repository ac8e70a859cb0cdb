"""What the verifier can run: BEiT's models, by task, and tokenizers, whose task is "tokenizer"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..config import BeitConfig
from ..params import param_shapes
from ..tasks import task_class
from ..tokenizer.config import MODEL_TYPE, DalleTokenizerConfig
from ..tokenizer.params import param_shapes as tokenizer_shapes
from ..tokenizer.tokenizer import DalleTokenizer
from ..train.discrete_vae import DiscreteVae

TOKENIZER = DalleTokenizer.task


def network(config: Any, task: str, arrays: Mapping[str, np.ndarray], **options: Any) -> Any:
    """The model of a task, or a tokenizer, with these parameters; both are called with pixels and a trace."""
    made = DalleTokenizer if task == TOKENIZER else task_class(task)
    return made(config, arrays=arrays, **options)


def trained_network(config: Any, task: str, arrays: Mapping[str, np.ndarray], **options: Any) -> Any:
    """The same as it is trained: its `forward` has a loss."""
    made = network(config, task, arrays, **options)
    return DiscreteVae(made) if task == TOKENIZER else made


def shapes_of(config: Any, task: str) -> dict[str, tuple[int, ...]]:
    """{canonical name: shape} of its parameters."""
    return tokenizer_shapes(config) if task == TOKENIZER else param_shapes(config, task)


def blocks_of(params: Any) -> tuple[Any, ...]:
    """The transformer blocks among its parameters; a tokenizer has none."""
    return params.beit.encoder if hasattr(params, "beit") else ()


def config_of(values: Mapping[str, Any]) -> Any:
    """The config that a dictionary describes.  Raises ValueError or TypeError for one of no model."""
    return (DalleTokenizerConfig if values.get("model_type") == MODEL_TYPE else BeitConfig).from_dict(dict(values))


def pixel_shape(config: Any) -> tuple[int, int, int]:
    """(C, height, width) of an image of the native size."""
    if isinstance(config, DalleTokenizerConfig):
        return config.input_channels, config.image_size, config.image_size
    return config.num_channels, *config.image_shape


def summary(config: Any) -> str:
    """Its sizes in a line."""
    c = config
    if isinstance(config, DalleTokenizerConfig):
        return f"{c.num_groups} groups of {c.num_blocks_per_group} blocks, width {c.hidden_size}, {c.vocab_size} tokens"
    return f"{c.num_hidden_layers} blocks, width {c.hidden_size}, {c.num_attention_heads} heads"
