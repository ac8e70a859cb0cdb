"""BeitBackbone: hidden states as feature maps, for heads defined elsewhere."""

from __future__ import annotations

from typing import Any

from ..model.embeddings import patch_grid
from ..model.segmentation import feature_maps, feature_pyramid
from ..outputs import BackboneOutput
from ..trace import Trace
from .base import BeitPreTrainedModel


class BeitBackbone(BeitPreTrainedModel[BackboneOutput]):
    """The hidden states named by the config's `out_features` or `out_indices`; "stem" (0) is the embeddings.

    With `add_fpn` there are four, and they pass through the feature pyramid of the segmentation model.
    """

    task = "backbone"

    def _check_config(self) -> None:
        if self.config.add_fpn and not self.config.reshape_hidden_states:
            raise ValueError("config: add_fpn needs maps, so reshape_hidden_states must be true")

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names of all L + 1 hidden states."""
        return self.config.stage_names

    @property
    def out_features(self) -> tuple[str, ...]:
        """Names of the hidden states that are returned."""
        return self.config.out_features or ()

    @property
    def out_indices(self) -> tuple[int, ...]:
        """Numbers of the hidden states that are returned."""
        return tuple(self.stage_names.index(name) for name in self.out_features)

    @property
    def channels(self) -> list[int]:
        """Channels of every returned map."""
        return [self.config.hidden_size] * len(self.out_features)

    def forward(
        self,
        pixel_values: Any,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        rng: Any | None = None,
        trace: Trace | None = None,
    ) -> BackboneOutput:  # (B, C, height, width) -> maps (B, D, gh, gw)
        """Feature maps of a batch of images, or (B, N, D) sequences without `reshape_hidden_states`.

        Raises ValueError for input that does not fit.
        """
        pixels = self._pixels(pixel_values)
        grid = patch_grid(pixels, self.config)
        if self.params.fpn is not None and min(grid) < 2:
            raise ValueError(
                f"pixel_values: the feature pyramid needs at least 2x2 patches, found a grid of {grid[0]}x{grid[1]}"
            )
        capture = self._capture(output_hidden_states, output_attentions, trace)
        collect = self.out_indices
        depth = max(collect) if capture.empty else None
        _, maps = self._encode(pixels, capture.scope, rng=rng, collect=collect, depth=depth)
        if self.config.reshape_hidden_states:
            maps = feature_maps(self.ops, maps, grid, capture.scope)
        else:
            maps = [capture.scope.record(f"feature_maps.{i}", x) for i, x in enumerate(maps)]
        if self.params.fpn is not None:
            maps = feature_pyramid(self.ops, self.params.fpn, maps, capture.scope.at("fpn"))
        return BackboneOutput(
            feature_maps=tuple(self.ops.to_host(x) for x in maps),
            hidden_states=capture.hidden_states,
            attentions=capture.attentions,
        )
