"""The heads of semantic segmentation: a feature pyramid with UPerNet, in training also an FCN; and their loss."""

from __future__ import annotations

from typing import Any

from ..config import BeitConfig
from ..noise import Noise
from ..ops import Ops
from ..params import FcnHead, FeaturePyramid, SemanticSegmentation, UperHead
from ..trace import SILENT, Scope
from .dropout import channel_dropout

Array = Any
AUXILIARY_INPUT = 2  # number of the feature map that the FCN head reads


def feature_states(config: BeitConfig) -> tuple[int, ...]:
    """Numbers of the hidden states that are the pyramid's input.

    For index i of `out_indices` transformers takes hidden state i - 1; the published weights were trained with the
    output of block i, which is hidden state i + 1 (`feature_convention` "unilm").
    """
    L = config.num_hidden_layers
    indices = [i % (L + 1) for i in config.out_indices or ()]
    if config.feature_convention == "unilm":
        return tuple(i + 1 for i in indices)
    return tuple((i - 1) % (L + 1) for i in indices)  # index 0 means hidden_states[-1], the last


def feature_maps(ops: Ops, states: list[Array], grid: tuple[int, int], trace: Scope = SILENT) -> list[Array]:
    """Hidden states (B, N, D) as maps (B, D, gh, gw)."""
    return [trace.record(f"feature_maps.{i}", ops.tokens_to_map(x, grid)) for i, x in enumerate(states)]


def feature_pyramid(ops: Ops, p: FeaturePyramid, maps: list[Array], trace: Scope = SILENT) -> list[Array]:
    """Four maps (B, D, gh, gw) -> four maps of 4, 2, 1 and 1/2 times that height and width.

    Source: unilm beit/semantic_segmentation.
    """
    hidden = trace.record("0.hidden", ops.conv_transpose_bn_gelu(maps[0], p.deconv1, p.bn))
    return [
        trace.record("0", ops.conv_transpose(hidden, p.deconv2)),
        trace.record("1", ops.conv_transpose(maps[1], p.deconv3)),
        trace.record("2", maps[2]),
        trace.record("3", ops.max_pool2x2(maps[3])),
    ]


def pyramid_pooling(ops: Ops, p: UperHead, x: Array, config: BeitConfig, trace: Scope = SILENT) -> Array:
    """(B, D, h, w) -> (B, D, h, w): a convolution of x concatenated with its means over 1, 4, 9 and 36 cells.

    Source: Zhao et al. 2017 (PSPNet).
    """
    maps = [x]
    for i, (scale, layer) in enumerate(zip(config.pool_scales, p.psp_modules, strict=True)):
        means = trace.record(f"psp_pools.{i}", ops.adaptive_avg_pool(x, scale))  # (B, D, scale, scale)
        maps.append(trace.record(f"psp_modules.{i}", ops.conv_bn_relu(means, layer)))
    y = ops.conv_bn_relu_resized(maps, p.psp_bottleneck, tuple(x.shape[2:]))
    return trace.record("psp_bottleneck", y)


def lateral_maps(ops: Ops, p: UperHead, pyramid: list[Array], config: BeitConfig, trace: Scope = SILENT) -> list[Array]:
    """The pyramid's four maps after the lateral layers, fine to coarse, (B, D, h, w): input of the top-down path."""
    levels = enumerate(zip(pyramid[:3], p.lateral_convs, strict=True))
    laterals = [trace.record(f"lateral_convs.{i}", ops.conv_bn_relu(x, layer)) for i, (x, layer) in levels]
    return [*laterals, pyramid_pooling(ops, p, pyramid[3], config, trace)]


def uper_head(
    ops: Ops,
    p: SemanticSegmentation,
    maps: list[Array],
    config: BeitConfig,
    trace: Scope = SILENT,
    noise: Noise | None = None,
    dropout: float = 0.0,
) -> Array:  # four of (B, D, gh, gw) -> (B, K, 4 gh, 4 gw)
    """Class scores.  With `noise` channels are dropped before the last layer.  Source: Xiao et al. 2018 (UPerNet)."""
    head, scope = p.decode_head, trace.at("decode_head")
    pyramid = feature_pyramid(ops, p.fpn, maps, trace.at("fpn"))
    levels = lateral_maps(ops, head, pyramid, config, scope)
    del pyramid  # releases its finest maps, the largest arrays of the model
    for i in (2, 1, 0):  # top-down: the coarser level is added to each level
        size = tuple(levels[i].shape[2:])
        levels[i] = scope.record(f"laterals.{i}", ops.add(levels[i], ops.resize_bilinear(levels[i + 1], size)))
    for i, layer in enumerate(head.fpn_convs):
        levels[i] = scope.record(f"fpn_convs.{i}", ops.conv_bn_relu(levels[i], layer))
    y = ops.conv_bn_relu_resized(levels, head.fpn_bottleneck, tuple(levels[0].shape[2:]))
    y = channel_dropout(ops, noise, scope.record("fpn_bottleneck", y), dropout)
    return trace.record("logits", ops.conv2d(y, head.classifier))


def fcn_head(
    ops: Ops, p: FcnHead, x: Array, trace: Scope = SILENT, noise: Noise | None = None, dropout: float = 0.0
) -> Array:  # (B, D, gh, gw) -> (B, K, gh, gw)
    """A few convolutions and a classifier; used in training only.  With `noise` channels are dropped before the last.
    Source: Long et al. 2015.
    """
    scope, y = trace.at("auxiliary_head"), x
    for i, layer in enumerate(p.convs):
        y = scope.record(f"convs.{i}", ops.conv_bn_relu(y, layer))
    if p.conv_cat is not None:
        y = scope.record("conv_cat", ops.conv_bn_relu(ops.concatenate([x, y], axis=1), p.conv_cat))
    y = channel_dropout(ops, noise, y, dropout)
    return trace.record("auxiliary_logits", ops.conv2d(y, p.classifier))


def segmentation_loss(
    ops: Ops, logits: Array, auxiliary_logits: Array | None, labels: Array, config: BeitConfig
) -> Array:  # (B, K, h, w), (B, K, gh, gw), (B, height, width) -> ()
    """Mean cross-entropy of the logits (B, K, h, w), resized to the labels (B, height, width), plus
    `auxiliary_loss_weight` times that of the auxiliary head's logits.
    """
    losses = [
        pixel_loss(ops, scores, labels, config.semantic_loss_ignore_index)
        for scores in (logits, auxiliary_logits)
        if scores is not None
    ]
    return ops.weighted_sum(losses, (1.0, config.auxiliary_loss_weight)[: len(losses)])


def pixel_loss(ops: Ops, logits: Array, labels: Array, ignore_index: int) -> Array:  # (B, K, h, w), (B, h', w') -> ()
    """Mean cross-entropy of every pixel whose label is not `ignore_index`."""
    resized = ops.resize_bilinear(logits, tuple(labels.shape[1:]))
    rows = resized.transpose(0, 2, 3, 1).reshape(-1, resized.shape[1])  # (pixels, K)
    return ops.cross_entropy(rows, labels.reshape(-1), ignore_index)
