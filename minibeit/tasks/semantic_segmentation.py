"""BeitForSemanticSegmentation: a class for every pixel, by UPerNet on four hidden states of the encoder."""

from __future__ import annotations

from typing import Any

from ..config import BeitConfig
from ..outputs import SemanticSegmenterOutput
from ..params import FcnHead, FeaturePyramid, UperHead
from ..trace import SILENT, Scope, Trace
from .base import BeitPreTrainedModel, Capture

Array = Any
AUXILIARY_INPUT = 2  # the FCN head reads the map at the patch grid's own resolution


def feature_pyramid(ops: Any, p: FeaturePyramid, maps: list[Array], trace: Scope = SILENT) -> list[Array]:
    """Four maps (B, D, gh, gw) -> at 4, 2, 1 and 1/2 times the patch grid.

    Source: unilm beit/semantic_segmentation.
    """
    hidden = trace.record("0.hidden", ops.conv_transpose_bn_gelu(maps[0], p.deconv1, p.bn))
    return [
        trace.record("0", ops.conv_transpose(hidden, p.deconv2)),
        trace.record("1", ops.conv_transpose(maps[1], p.deconv3)),
        trace.record("2", maps[2]),
        trace.record("3", ops.max_pool2x2(maps[3])),
    ]


def pyramid_pooling(ops: Any, p: UperHead, x: Array, config: BeitConfig, trace: Scope) -> Array:
    """(B, D, h, w) -> (B, D, h, w): x beside its means over 1, 4, 9 and 36 cells, mixed by a convolution.

    Source: Zhao et al. 2017 (PSPNet).
    """
    maps = [x]
    for i, (scale, layer) in enumerate(zip(config.pool_scales, p.psp_modules, strict=True)):
        means = trace.record(f"psp_pools.{i}", ops.adaptive_avg_pool(x, scale))  # (B, D, scale, scale)
        maps.append(trace.record(f"psp_modules.{i}", ops.conv_bn_relu(means, layer)))
    y = ops.conv_bn_relu_resized(maps, p.psp_bottleneck, tuple(x.shape[2:]))
    return trace.record("psp_bottleneck", y)


def uper_head(ops: Any, p: UperHead, pyramid: list[Array], config: BeitConfig, trace: Scope = SILENT) -> Array:
    """Four maps, fine to coarse -> (B, K, h, w) at the finest.  Source: Xiao et al. 2018 (UPerNet).

    Uses the list `pyramid` up: the finest maps are the largest arrays of the model, and memory holds few of them.
    """
    levels = enumerate(zip(pyramid[:3], p.lateral_convs, strict=True))
    laterals = [trace.record(f"lateral_convs.{i}", ops.conv_bn_relu(x, layer)) for i, (x, layer) in levels]
    laterals.append(pyramid_pooling(ops, p, pyramid[3], config, trace))
    pyramid.clear()
    for i in (2, 1, 0):  # top-down: each level takes up what the coarser one saw
        size = tuple(laterals[i].shape[2:])
        laterals[i] = ops.add(laterals[i], ops.resize_bilinear(laterals[i + 1], size))
        laterals[i] = trace.record(f"laterals.{i}", laterals[i])
    for i, layer in enumerate(p.fpn_convs):
        laterals[i] = trace.record(f"fpn_convs.{i}", ops.conv_bn_relu(laterals[i], layer))
    y = ops.conv_bn_relu_resized(laterals, p.fpn_bottleneck, tuple(laterals[0].shape[2:]))
    y = trace.record("fpn_bottleneck", y)
    return ops.conv2d(y, p.classifier)


def fcn_head(ops: Any, p: FcnHead, x: Array, trace: Scope = SILENT) -> Array:  # (B, D, gh, gw) -> (B, K, gh, gw)
    """A few convolutions and a classifier; used in training only.  Source: Long et al. 2015."""
    y = x
    for i, layer in enumerate(p.convs):
        y = trace.record(f"convs.{i}", ops.conv_bn_relu(y, layer))
    if p.conv_cat is not None:
        y = trace.record("conv_cat", ops.conv_bn_relu(ops.concatenate([x, y], axis=1), p.conv_cat))
    return ops.conv2d(y, p.classifier)


class BeitForSemanticSegmentation(BeitPreTrainedModel):
    """The encoder, a feature pyramid, the UPerNet head, and in training an FCN head.  Source: BEiT section 2.5.

    Which hidden states feed the pyramid depends on the config's `feature_convention`: see BeitConfig.
    """

    task = "semantic_segmentation"

    def _check_config(self) -> None:
        L = self.config.num_hidden_layers
        if len(self.config.out_indices or ()) != 4:
            raise ValueError(
                f"config: segmentation needs four out_indices, found {list(self.config.out_indices or ())}; "
                "base-sized models use [3, 5, 7, 11], large ones [7, 11, 15, 23]"
            )
        if self.config.feature_convention == "unilm" and max(self._feature_states()) > L:
            raise ValueError(
                "config: feature_convention 'unilm' takes the outputs of blocks "
                f"{list(self.config.out_indices or ())}, "
                f"but the blocks are 0 to {L - 1}"
            )
        c = self.config
        if c.use_auxiliary_head and c.auxiliary_num_convs == 0 and c.auxiliary_channels != c.hidden_size:
            raise ValueError(
                "config: with auxiliary_num_convs 0 the auxiliary head reads the encoder's map itself, so "
                f"auxiliary_channels must equal hidden_size {c.hidden_size}, found {c.auxiliary_channels}"
            )

    def _feature_states(self) -> tuple[int, ...]:
        """Numbers of the hidden states that feed the pyramid."""
        L = self.config.num_hidden_layers
        indices = [i % (L + 1) for i in self.config.out_indices or ()]
        if self.config.feature_convention == "unilm":
            return tuple(i + 1 for i in indices)
        return tuple((i - 1) % (L + 1) for i in indices)  # index 0 wraps to the last state, as hidden_states[-1]

    def forward(
        self,
        pixel_values: Any,
        labels: Any | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_auxiliary_logits: bool = False,
        rng: Any | None = None,
        trace: Trace | None = None,
    ) -> SemanticSegmenterOutput:  # (B, C, height, width) -> (B, K, 4 gh, 4 gw)
        """Class scores for every cell of a map four times as fine as the patch grid.

        `labels` (B, height', width') integer classes: the loss is the mean cross-entropy of the logits resized to that
        size, plus `auxiliary_loss_weight` times the auxiliary head's.  The auxiliary head runs for a loss or when its
        logits are asked for.  Raises ValueError for input that does not fit.
        """
        pixels = self._pixels(pixel_values)
        if labels is not None:
            labels = self._labels(labels, len(pixels))
        grid = self._grid(pixels)
        if min(grid) < 2:
            raise ValueError(
                f"pixel_values: segmentation needs at least 2x2 patches, found a grid of {grid[0]}x{grid[1]}"
            )
        capture = Capture(self, output_hidden_states, output_attentions, trace)
        collect = self._feature_states()
        depth = max(collect) if capture.empty else None
        _, states = self._encode(pixels, capture.scope, rng=rng, collect=collect, depth=depth)
        maps = [self.ops.tokens_to_map(x, grid) for x in states]
        maps = [capture.scope.record(f"feature_maps.{i}", x) for i, x in enumerate(maps)]
        pyramid = feature_pyramid(self.ops, self.params.fpn, maps, capture.scope.at("fpn"))
        auxiliary_input = pyramid[AUXILIARY_INPUT]
        logits = uper_head(self.ops, self.params.decode_head, pyramid, self.config, capture.scope.at("decode_head"))
        logits = capture.scope.record("logits", logits)
        auxiliary_logits = None
        wanted = output_auxiliary_logits or labels is not None or capture.scope.wants("auxiliary_logits")
        if self.params.auxiliary_head is not None and wanted:
            head, scope = self.params.auxiliary_head, capture.scope.at("auxiliary_head")
            auxiliary_logits = fcn_head(self.ops, head, auxiliary_input, scope)
            auxiliary_logits = capture.scope.record("auxiliary_logits", auxiliary_logits)
        return SemanticSegmenterOutput(
            loss=None if labels is None else self._loss(logits, auxiliary_logits, labels),
            logits=self.ops.to_host(logits),
            hidden_states=capture.hidden_states,
            attentions=capture.attentions,
            auxiliary_logits=None if auxiliary_logits is None else self.ops.to_host(auxiliary_logits),
        )

    def _labels(self, labels: Any, batch: int) -> Array:  # -> (B, height', width')
        if self.config.num_labels == 1:
            raise ValueError("labels: a segmentation loss needs more than one class, the config has one")
        array = self._label_array(labels, classes=True)
        if array.ndim != 3 or array.shape[0] != batch:
            raise ValueError(f"labels: expected shape ({batch}, height, width), found {tuple(array.shape)}")
        return array

    def _loss(self, logits: Array, auxiliary_logits: Array | None, labels: Array) -> Array:
        loss = self._pixel_loss(logits, labels)
        if auxiliary_logits is not None:
            loss = loss + self.config.auxiliary_loss_weight * self._pixel_loss(auxiliary_logits, labels)
        return self.ops.to_host(loss)

    def _pixel_loss(self, logits: Array, labels: Array) -> Array:  # (B, K, h, w), (B, height', width') -> ()
        resized = self.ops.resize_bilinear(logits, tuple(labels.shape[1:]))
        rows = resized.transpose(0, 2, 3, 1).reshape(-1, resized.shape[1])  # (pixels, K)
        return self.ops.cross_entropy(rows, labels.reshape(-1), self.config.semantic_loss_ignore_index)
