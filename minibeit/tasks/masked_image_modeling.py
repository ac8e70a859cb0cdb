"""BeitForMaskedImageModeling: predicts the visual token of every patch, as in pre-training."""

from __future__ import annotations

from typing import Any

from ..model.masked_modeling import masked_modeling_loss, token_logits
from ..outputs import MaskedLMOutput
from ..trace import Trace
from .base import BeitPreTrainedModel
from .inputs import masked_labels


class BeitForMaskedImageModeling(BeitPreTrainedModel[MaskedLMOutput]):
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
        return_all_tokens: bool = True,
    ) -> MaskedLMOutput:  # (B, C, height, width) -> (B, P, V)
        """Scores of all visual tokens for every patch.

        `labels` (number of masked patches in the batch,): the visual tokens of the patches that `bool_masked_pos`
        (B, P) marks, image by image.  The loss is their mean cross-entropy; labels of -100 are ignored.  With
        `return_all_tokens=False` the scores are those of the masked patches alone, (n, V), as in pre-training.  Raises
        ValueError for input that does not fit.
        """
        pixels = self._pixels(pixel_values)
        mask = self._mask(bool_masked_pos, pixels)
        target = None if labels is None else masked_labels(self.ops, labels, mask)
        capture = self._capture(output_hidden_states, output_attentions, trace)
        x, _ = self._encode(pixels, capture.scope, mask, rng)
        wanted = None if return_all_tokens else mask
        logits = token_logits(self.ops, self.params, x, self.config, wanted, capture.scope)  # (B, P, V) or (n, V)
        loss = None
        if target is not None:
            masked = logits if wanted is not None else self.ops.masked_patches(logits, mask)  # (n, V)
            loss = masked_modeling_loss(self.ops, masked, target)
        return MaskedLMOutput(
            loss=None if loss is None else self.ops.to_host(loss),
            logits=self.ops.to_host(logits),
            hidden_states=capture.hidden_states,
            attentions=capture.attentions,
        )
