"""The weights of every task as frozen dataclasses, and the one list of their names and shapes.

The same tree type serves three times.  `shapes(config, task)` fills it with shape tuples; `unflatten` replaces those by
arrays; a backend's `prepare` may replace arrays by packed ones.  The canonical name of an array is its attribute path,
for example `beit.encoder.3.attention.query.weight`.

Letters: D width, F mlp width, H heads, P patches, R rows of the bias table, K classes, V visual tokens, C channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from .config import BeitConfig
from .machine import available_memory

BATCH_NORM_EPS = 1e-5  # PyTorch's default; no BEiT config has a key for it
Leaf = Any  # a shape tuple, an array, or an array packed by a backend's `prepare`
Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Linear:
    weight: Leaf  # (out, in)
    bias: Leaf | None  # (out,)


@dataclass(frozen=True)
class LayerNorm:
    weight: Leaf  # (D,)
    bias: Leaf  # (D,)


@dataclass(frozen=True)
class Conv:
    weight: Leaf  # (out, in, kh, kw)
    bias: Leaf | None  # (out,)


@dataclass(frozen=True)
class ReluConv:
    """A convolution of max(0, x): all but the first of a tokenizer."""

    weight: Leaf  # (out, in, kh, kw)
    bias: Leaf  # (out,)


@dataclass(frozen=True)
class ConvTranspose:
    weight: Leaf  # (in, out, 2, 2): PyTorch's order, the reverse of Conv's
    bias: Leaf  # (out,)


@dataclass(frozen=True)
class BatchNorm:
    weight: Leaf  # (C,)
    bias: Leaf  # (C,)
    running_mean: Leaf  # (C,)
    running_var: Leaf  # (C,)


@dataclass(frozen=True)
class ConvBatchNorm:
    conv: Conv  # no bias: the batch norm has one
    bn: BatchNorm


@dataclass(frozen=True)
class Embeddings:
    cls_token: Leaf  # (1, 1, D)
    mask_token: Leaf | None  # (1, 1, D)
    position_embeddings: Leaf | None  # (1, P + 1, D)
    patch: Conv  # weight (D, C, patch height, patch width)


@dataclass(frozen=True)
class Attention:
    query: Linear  # (D, D)
    key: Linear  # (D, D), the only one without a bias: softmax cancels a term common to all keys
    value: Linear  # (D, D)
    output: Linear  # (D, D)


@dataclass(frozen=True)
class Block:
    norm1: LayerNorm
    attention: Attention
    bias_table: Leaf | None  # (R, H)
    lambda_1: Leaf | None  # (D,)
    norm2: LayerNorm
    fc1: Linear  # (F, D)
    fc2: Linear  # (D, F)
    lambda_2: Leaf | None  # (D,)


@dataclass(frozen=True)
class Beit:
    embeddings: Embeddings
    shared_bias_table: Leaf | None  # (R, H)
    encoder: tuple[Block, ...]  # L blocks
    norm: LayerNorm | None  # of every token; only without mean pooling
    pooler: LayerNorm | None  # of the mean of the patch tokens; only with mean pooling


@dataclass(frozen=True)
class Model:
    beit: Beit


@dataclass(frozen=True)
class MaskedImageModeling:
    beit: Beit
    norm: LayerNorm
    lm_head: Linear  # (V, D)


@dataclass(frozen=True)
class ImageClassification:
    beit: Beit
    classifier: Linear | None  # (K, D)


@dataclass(frozen=True)
class FeaturePyramid:
    deconv1: ConvTranspose  # deconv1 -> bn -> gelu -> deconv2: four times the patch grid
    bn: BatchNorm
    deconv2: ConvTranspose
    deconv3: ConvTranspose  # twice the patch grid


@dataclass(frozen=True)
class UperHead:
    psp_modules: tuple[ConvBatchNorm, ...]  # (D, D, 1, 1), one per pool scale
    psp_bottleneck: ConvBatchNorm  # (D, D + scales * D, 3, 3)
    lateral_convs: tuple[ConvBatchNorm, ...]  # three of (D, D, 1, 1)
    fpn_convs: tuple[ConvBatchNorm, ...]  # three of (D, D, 3, 3)
    fpn_bottleneck: ConvBatchNorm  # (D, 4 D, 3, 3)
    classifier: Conv  # (K, D, 1, 1)


@dataclass(frozen=True)
class FcnHead:
    convs: tuple[ConvBatchNorm, ...]  # (A, D or A, 3, 3), A auxiliary channels
    conv_cat: ConvBatchNorm | None  # (A, D + A, 3, 3)
    classifier: Conv  # (K, A, 1, 1)


@dataclass(frozen=True)
class SemanticSegmentation:
    beit: Beit
    fpn: FeaturePyramid
    decode_head: UperHead
    auxiliary_head: FcnHead | None


@dataclass(frozen=True)
class Backbone:
    beit: Beit
    fpn: FeaturePyramid | None


# Shapes -------------------------------------------------------------------------------------------------------------


def shapes(config: BeitConfig, task: str) -> Any:
    """The parameter tree of `task` (a key of `task_table.TASKS`) with shape tuples as leaves."""
    return _SHAPES[task](config)


def param_shapes(config: BeitConfig, task: str) -> dict[str, tuple[int, ...]]:
    """{canonical name: shape} of every parameter of `task`, in the order of the tree's fields."""
    return flatten(shapes(config, task))


def count_parameters(config: BeitConfig, task: str) -> int:
    """The number of learned parameters; the running statistics of batch norms do not count."""
    return sum(math.prod(shape) for name, shape in param_shapes(config, task).items() if ".running_" not in name)


def table_rows(grid: tuple[int, int]) -> int:
    """R = (2 gh - 1) (2 gw - 1) + 3: one row per offset between two patches, three for pairs with the CLS token."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def _beit(config: BeitConfig, pooler: bool) -> Beit:
    D, F, H = config.hidden_size, config.intermediate_size, config.num_attention_heads
    P = config.grid[0] * config.grid[1]
    table = (table_rows(config.grid), H)
    scale = (D,) if config.layer_scale_init_value > 0 else None
    norm = LayerNorm((D,), (D,))
    block = Block(
        norm1=norm,
        attention=Attention(
            query=Linear((D, D), (D,)),
            key=Linear((D, D), None),
            value=Linear((D, D), (D,)),
            output=Linear((D, D), (D,)),
        ),
        bias_table=table if config.use_relative_position_bias else None,
        lambda_1=scale,
        norm2=norm,
        fc1=Linear((F, D), (F,)),
        fc2=Linear((D, F), (D,)),
        lambda_2=scale,
    )
    return Beit(
        embeddings=Embeddings(
            cls_token=(1, 1, D),
            mask_token=(1, 1, D) if config.use_mask_token else None,
            position_embeddings=(1, P + 1, D) if config.use_absolute_position_embeddings else None,
            patch=Conv((D, config.num_channels, *config.patch_shape), (D,)),
        ),
        shared_bias_table=table if config.use_shared_relative_position_bias else None,
        encoder=(block,) * config.num_hidden_layers,
        norm=None if config.use_mean_pooling else norm,
        pooler=norm if pooler and config.use_mean_pooling else None,
    )


def _model(config: BeitConfig) -> Model:
    return Model(_beit(config, pooler=True))


def _masked_image_modeling(config: BeitConfig) -> MaskedImageModeling:
    D = config.hidden_size
    return MaskedImageModeling(
        _beit(config, pooler=False), LayerNorm((D,), (D,)), Linear((config.vocab_size, D), (config.vocab_size,))
    )


def _image_classification(config: BeitConfig) -> ImageClassification:
    D, K = config.hidden_size, config.num_labels
    return ImageClassification(_beit(config, pooler=True), Linear((K, D), (K,)) if K > 0 else None)


def _semantic_segmentation(config: BeitConfig) -> SemanticSegmentation:
    D, K, A = config.hidden_size, config.num_labels, config.auxiliary_channels
    decode_head = UperHead(
        psp_modules=(_conv_bn(D, D, 1),) * len(config.pool_scales),
        psp_bottleneck=_conv_bn(D, D + len(config.pool_scales) * D, 3),
        lateral_convs=(_conv_bn(D, D, 1),) * 3,
        fpn_convs=(_conv_bn(D, D, 3),) * 3,
        fpn_bottleneck=_conv_bn(D, 4 * D, 3),
        classifier=Conv((K, D, 1, 1), (K,)),
    )
    auxiliary_head = FcnHead(
        convs=tuple(_conv_bn(A, D if i == 0 else A, 3) for i in range(config.auxiliary_num_convs)),
        conv_cat=_conv_bn(A, D + A, 3) if config.auxiliary_concat_input else None,
        classifier=Conv((K, A, 1, 1), (K,)),
    )
    return SemanticSegmentation(
        beit=_beit(config, pooler=False),
        fpn=_feature_pyramid(D),
        decode_head=decode_head,
        auxiliary_head=auxiliary_head if config.use_auxiliary_head else None,
    )


def _backbone(config: BeitConfig) -> Backbone:
    return Backbone(_beit(config, pooler=False), _feature_pyramid(config.hidden_size) if config.add_fpn else None)


def _feature_pyramid(D: int) -> FeaturePyramid:
    deconv = ConvTranspose((D, D, 2, 2), (D,))
    return FeaturePyramid(deconv, _batch_norm(D), deconv, deconv)


def _batch_norm(channels: int) -> BatchNorm:
    return BatchNorm((channels,), (channels,), (channels,), (channels,))


def _conv_bn(out: int, in_: int, kernel: int) -> ConvBatchNorm:
    return ConvBatchNorm(Conv((out, in_, kernel, kernel), None), _batch_norm(out))


_SHAPES: dict[str, Callable[[BeitConfig], Any]] = {
    "model": _model,
    "masked_image_modeling": _masked_image_modeling,
    "image_classification": _image_classification,
    "semantic_segmentation": _semantic_segmentation,
    "backbone": _backbone,
}


# Trees --------------------------------------------------------------------------------------------------------------


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(canonical name, leaf) of every leaf that is not None, in the order of the fields."""
    for name, child in _children(tree):
        path = f"{prefix}{name}"
        if _is_node(child):
            yield from leaves(child, path + ".")
        elif child is not None:
            yield path, child


def flatten(tree: Any) -> dict[str, Any]:
    """{canonical name: leaf}; the reverse of `unflatten`."""
    return dict(leaves(tree))


def unflatten(tree: Tree, named: Mapping[str, Any], prefix: str = "") -> Tree:
    """A copy of `tree` with leaves `named[canonical name]`.  Raises KeyError for a name that `named` lacks."""

    def put(name: str, child: Any) -> Any:
        path = f"{prefix}{name}"
        if child is None:
            return None
        return unflatten(child, named, path + ".") if _is_node(child) else named[path]

    if isinstance(tree, tuple):
        return tuple(put(name, child) for name, child in _children(tree))  # type: ignore[return-value]
    return type(tree)(**{name: put(name, child) for name, child in _children(tree)})


def _children(node: Any) -> list[tuple[str, Any]]:
    if dataclasses.is_dataclass(node):
        return [(f.name, getattr(node, f.name)) for f in dataclasses.fields(node)]
    return [(str(i), child) for i, child in enumerate(node)]


def _is_node(child: Any) -> bool:
    if isinstance(child, tuple):  # a tuple of nodes, not a shape; an empty one is a node without children
        return not child or dataclasses.is_dataclass(child[0])
    return dataclasses.is_dataclass(child)


# Random weights -----------------------------------------------------------------------------------------------------


def random_arrays(
    config: BeitConfig, shapes: Mapping[str, tuple[int, ...]], seed: int | None, dtype: str
) -> dict[str, np.ndarray]:
    """Random arrays for `shapes` ({canonical name: shape}), drawn as transformers initialises a new model.

    Normal(0, initializer_range) for the weights of linear layers and convolutions, `layer_scale_init_value` for
    lambda_1 and lambda_2, ones for the scales and variances of norms, zeros for everything else (tokens, position
    embeddings, bias tables and biases).  Raises ValueError, before anything is allocated, if the arrays would take more
    than the free memory.
    """
    needed, memory = np.dtype(dtype).itemsize * sum(map(math.prod, shapes.values())), available_memory(swap=True)
    if memory is not None and needed > memory:
        raise ValueError(
            f"config: random weights of these {len(shapes)} shapes take {needed:,} bytes, more than the {memory:,} of "
            "memory that are free; make the sizes smaller"
        )
    rng = np.random.default_rng(seed)
    return {name: _random_array(name, shape, config, rng).astype(dtype) for name, shape in shapes.items()}


def _random_array(name: str, shape: tuple[int, ...], config: BeitConfig, rng: np.random.Generator) -> np.ndarray:
    last = name.rsplit(".", 1)[-1]
    if last.startswith("lambda"):
        return np.full(shape, config.layer_scale_init_value)
    if last == "weight" and len(shape) > 1:
        return config.initializer_range * rng.standard_normal(shape, dtype=np.float32)
    return np.ones(shape) if last in ("weight", "running_var") else np.zeros(shape)
