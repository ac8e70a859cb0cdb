"""BeitForImageClassification: one label, several labels, or regression values for an image."""

from __future__ import annotations

from typing import Any

from ..model.classification import class_logits, classification_loss
from ..outputs import ImageClassifierOutput
from ..trace import Trace
from .base import BeitPreTrainedModel
from .inputs import class_labels


class BeitForImageClassification(BeitPreTrainedModel[ImageClassifierOutput]):
    """The encoder, the pooled image vector, and a linear layer to K classes.  Source: BEiT section 2.6."""

    task = "image_classification"

    def forward(
        self,
        pixel_values: Any,
        labels: Any | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        rng: Any | None = None,
        trace: Trace | None = None,
    ) -> ImageClassifierOutput:  # (B, C, height, width) -> (B, K)
        """Class scores (logits) of a batch of images, and the loss if `labels` are given.

        The loss is chosen by the config's `problem_type` or, without one, as transformers does: mean squared error for
        one output, cross-entropy for integer labels (B,), binary cross-entropy for float labels (B, K).
        Raises ValueError for input that does not fit.
        """
        pixels = self._pixels(pixel_values)
        capture = self._capture(output_hidden_states, output_attentions, trace)
        x, _ = self._encode(pixels, capture.scope, rng=rng)
        logits = class_logits(self.ops, self.params, x, self.config, capture.scope)  # (B, K)
        loss = None
        if labels is not None:
            target, problem = class_labels(self.ops, labels, self.config, tuple(logits.shape), self.dtype)
            loss = self.ops.to_host(classification_loss(self.ops, logits, target, problem))
        return ImageClassifierOutput(
            loss=loss,
            logits=self.ops.to_host(logits),
            hidden_states=capture.hidden_states,
            attentions=capture.attentions,
        )
