"""BeitForImageClassification: one label, several labels or numbers for an image."""

from __future__ import annotations

from typing import Any

from ..foreign import as_numpy
from ..model.encoder import pool
from ..outputs import ImageClassifierOutput
from ..trace import Trace
from .base import BeitPreTrainedModel, Capture

IGNORE_INDEX = -100  # a label that does not count, as in PyTorch's cross-entropy


class BeitForImageClassification(BeitPreTrainedModel):
    """The encoder, the pooled image vector, and a linear layer to K classes.  Source: BEiT section 2.5."""

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
        capture = Capture(self, output_hidden_states, output_attentions, trace)
        x, _ = self._encode(pixels, capture.scope, rng=rng)
        pooled = capture.scope.record("pooler", pool(self.ops, self.params.beit, x, self.config))  # (B, D)
        classifier = self.params.classifier
        logits = pooled if classifier is None else self.ops.linear(pooled, classifier)  # (B, K)
        logits = capture.scope.record("logits", logits)
        return ImageClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=self.ops.to_host(logits),
            hidden_states=capture.hidden_states,
            attentions=capture.attentions,
        )

    def _loss(self, logits: Any, labels: Any) -> Any:  # (B, K), labels -> ()
        B, K = logits.shape
        kind = getattr(getattr(labels, "dtype", None), "kind", None) or _kind(labels)
        problem = self.config.problem_type
        if problem is None:
            problem = (
                "regression"
                if K == 1
                else "single_label_classification"
                if kind in "iu"
                else "multi_label_classification"
            )
        if problem == "single_label_classification":
            labels = self._labels(labels, True, (B,))
            loss = self.ops.cross_entropy(logits, labels, IGNORE_INDEX)
        elif problem == "regression":
            flat = K == 1
            target = self._labels(labels, False, (B,) if flat else (B, K), or_shape=(B, K))
            loss = self.ops.mse_loss(logits.reshape(-1), target.reshape(-1))
        else:
            loss = self.ops.bce_with_logits(logits, self._labels(labels, False, (B, K)))
        return self.ops.to_host(loss)

    def _labels(self, labels: Any, classes: bool, shape: tuple[int, ...], or_shape: tuple[int, ...] = ()) -> Any:
        array = self._label_array(labels, classes)
        if array.shape not in (shape, or_shape):
            raise ValueError(f"labels: expected shape {shape} for this batch, found {tuple(array.shape)}")
        return array


def _kind(labels: Any) -> str:
    """The kind of number that labels are: "i" or "u" for integers, whoever holds them."""
    try:
        return as_numpy(labels).dtype.kind
    except (TypeError, ValueError):
        return "f"  # what is no array is refused where it is read
