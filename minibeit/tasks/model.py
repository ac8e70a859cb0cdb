"""BeitModel: the encoder without a head."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from ..config import BeitConfig
from ..model.encoder import pool
from ..outputs import BeitModelOutputWithPooling
from ..trace import Trace
from .base import BeitPreTrainedModel

Self = TypeVar("Self", bound="BeitModel")


class BeitModel(BeitPreTrainedModel[BeitModelOutputWithPooling]):
    """The bare encoder.  With `add_pooling_layer=False` there is no `pooler_output`."""

    task = "model"

    def __init__(self, config: BeitConfig, *, add_pooling_layer: bool = True, **options: Any) -> None:
        super().__init__(config, **options)
        self.add_pooling_layer = add_pooling_layer

    @classmethod
    def from_pretrained(
        cls: type[Self], path: str | os.PathLike[str], *, add_pooling_layer: bool = True, **keywords: Any
    ) -> Self:
        """The encoder of a checkpoint, see `BeitPreTrainedModel.from_pretrained`; without its pooling layer if so."""
        model = super().from_pretrained(path, **keywords)
        model.add_pooling_layer = add_pooling_layer
        return model

    def forward(
        self,
        pixel_values: Any,
        bool_masked_pos: Any | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        rng: Any | None = None,
        trace: Trace | None = None,
    ) -> BeitModelOutputWithPooling:  # (B, C, height, width) -> (B, N, D), (B, D)
        """Hidden states of a batch of images.

        `bool_masked_pos` (B, P) marks patches to replace by the mask token.  `rng`, a NumPy generator, switches dropout
        and stochastic depth on.  `trace` collects intermediates.  Raises ValueError for input that does not fit.
        """
        pixels = self._pixels(pixel_values)
        mask = self._mask(bool_masked_pos, pixels)
        capture = self._capture(output_hidden_states, output_attentions, trace)
        x, _ = self._encode(pixels, capture.scope, mask, rng)
        pooled = None
        if self.add_pooling_layer:
            pooled = capture.scope.record("pooler", pool(self.ops, self.params.beit, x, self.config))
        return BeitModelOutputWithPooling(
            last_hidden_state=self.ops.to_host(x),
            pooler_output=None if pooled is None else self.ops.to_host(pooled),
            hidden_states=capture.hidden_states,
            attentions=capture.attentions,
        )
