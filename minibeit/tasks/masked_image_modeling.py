"""BeitForMaskedImageModeling: predicts the visual token of every patch, as in pre-training."""

from __future__ import annotations

from typing import Any

from ..outputs import MaskedLMOutput
from ..trace import Trace
from .base import BeitPreTrainedModel, Capture

IGNORE_INDEX = -100  # a label that does not count, as in PyTorch's cross-entropy


class BeitForMaskedImageModeling(BeitPreTrainedModel):
    """The encoder, a layer norm, and a linear layer to `vocab_size` visual tokens.  Source: BEiT section 2.3."""

    task = "masked_image_modeling"

    def forward(
        self,
        pixel_values: Any,
        bool_masked_pos: Any | None = None,
        labels: Any | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        rng: Any | None = None,
        trace: Trace | None = None,
    ) -> MaskedLMOutput:  # (B, C, height, width) -> (B, P, V)
        """Scores of all visual tokens for every patch.

        `labels` (number of masked patches in the batch,): the visual tokens of the patches that `bool_masked_pos`
        (B, P) marks, image by image; the loss is their mean cross-entropy, -100 not counting.  Raises ValueError.
        """
        pixels = self._pixels(pixel_values)
        mask = self._mask(bool_masked_pos, self._grid(pixels), len(pixels))
        capture = Capture(self, output_hidden_states, output_attentions, trace)
        x, _ = self._encode(pixels, capture.scope, mask, rng)
        x = self.ops.layer_norm(x, self.params.norm, self.config.layer_norm_eps)  # (B, N, D)
        x = capture.scope.record("layernorm", x)
        logits = self.ops.linear(x[:, 1:], self.params.lm_head)  # (B, P, V)
        logits = capture.scope.record("logits", logits)
        return MaskedLMOutput(
            loss=None if labels is None else self._loss(logits, mask, labels),
            logits=self.ops.to_host(logits),
            hidden_states=capture.hidden_states,
            attentions=capture.attentions,
        )

    def _loss(self, logits: Any, mask: Any | None, labels: Any) -> Any:  # (B, P, V), (B, P), (n,) -> ()
        if mask is None:
            raise ValueError("labels: a loss needs bool_masked_pos, since it counts masked patches only")
        labels = self._label_array(labels, classes=True)
        masked = logits[mask]  # (n, V), batch-major
        if labels.shape != masked.shape[:1]:
            raise ValueError(
                f"labels: expected one visual token per masked patch, shape ({len(masked)},), "
                f"found {tuple(labels.shape)}"
            )
        return self.ops.to_host(self.ops.cross_entropy(masked, labels, IGNORE_INDEX))
