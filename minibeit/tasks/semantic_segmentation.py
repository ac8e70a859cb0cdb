"""BeitForSemanticSegmentation: a class for every pixel, from UPerNet on four hidden states of the encoder."""

from __future__ import annotations

from typing import Any

from ..model.embeddings import patch_grid
from ..model.segmentation import (
    AUXILIARY_INPUT,
    fcn_head,
    feature_maps,
    feature_states,
    segmentation_loss,
    uper_head,
)
from ..noise import as_noise
from ..outputs import SemanticSegmenterOutput
from ..trace import Trace
from .base import BeitPreTrainedModel
from .inputs import label_map


class BeitForSemanticSegmentation(BeitPreTrainedModel[SemanticSegmenterOutput]):
    """The encoder, a feature pyramid, the UPerNet head, and in training an FCN head.  Source: BEiT appendix B.

    Which hidden states the pyramid reads depends on the config's `feature_convention`: see BeitConfig.
    """

    task = "semantic_segmentation"

    def _check_config(self) -> None:
        L = self.config.num_hidden_layers
        if len(self.config.out_indices or ()) != 4:
            raise ValueError(
                f"config: segmentation needs four out_indices, found {list(self.config.out_indices or ())}; "
                "base-sized models use [3, 5, 7, 11], large ones [7, 11, 15, 23]"
            )
        if self.config.feature_convention == "unilm" and max(feature_states(self.config)) > L:
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

    def forward(
        self,
        pixel_values: Any,
        labels: Any | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_auxiliary_logits: bool = False,
        head_dropout: float = 0.0,
        rng: Any | None = None,
        trace: Trace | None = None,
    ) -> SemanticSegmenterOutput:  # (B, C, height, width) -> (B, K, 4 gh, 4 gw)
        """Class scores for every pixel of a map four times as high and wide as the patch grid.

        `labels` (B, height', width') are integer classes.  The loss is the mean cross-entropy of the logits resized to
        that size, plus `auxiliary_loss_weight` times that of the auxiliary head, which runs only for a loss or if its
        logits are asked for.  With `rng`, `head_dropout` is the rate at which each head's channels are dropped before
        its last layer, in the training of the published models 0.1, in transformers 0.  Raises ValueError for input
        that does not fit.
        """
        pixels = self._pixels(pixel_values)
        target = None if labels is None else label_map(self.ops, labels, self.config, len(pixels))
        grid = patch_grid(pixels, self.config)
        if min(grid) < 2:
            raise ValueError(
                f"pixel_values: segmentation needs at least 2x2 patches, found a grid of {grid[0]}x{grid[1]}"
            )
        capture = self._capture(output_hidden_states, output_attentions, trace)
        collect = feature_states(self.config)
        depth = max(collect) if capture.empty else None
        noise = None if rng is None else as_noise(rng)
        heads = None if noise is None else noise.at(block=self.config.num_hidden_layers + 1)
        _, states = self._encode(pixels, capture.scope, rng=noise, collect=collect, depth=depth)
        maps = feature_maps(self.ops, states, grid, capture.scope)
        logits = uper_head(self.ops, self.params, maps, self.config, capture.scope, heads, head_dropout)
        auxiliary_logits, head = None, self.params.auxiliary_head
        wanted = output_auxiliary_logits or target is not None or capture.scope.wants("auxiliary_logits")
        if head is not None and wanted:
            own = None if heads is None else heads.at(place=1)
            auxiliary_logits = fcn_head(self.ops, head, maps[AUXILIARY_INPUT], capture.scope, own, head_dropout)
        loss = None
        if target is not None:
            loss = self.ops.to_host(segmentation_loss(self.ops, logits, auxiliary_logits, target, self.config))
        return SemanticSegmenterOutput(
            loss=loss,
            logits=self.ops.to_host(logits),
            hidden_states=capture.hidden_states,
            attentions=capture.attentions,
            auxiliary_logits=None if auxiliary_logits is None else self.ops.to_host(auxiliary_logits),
        )
