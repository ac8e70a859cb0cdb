"""The head of image classification, and its losses."""

from __future__ import annotations

from typing import Any

from ..config import BeitConfig
from ..ops import Ops
from ..params import ImageClassification
from ..trace import SILENT, Scope
from .encoder import pool
from .masked_modeling import IGNORE_INDEX

Array = Any


def class_logits(
    ops: Ops, p: ImageClassification, x: Array, config: BeitConfig, trace: Scope = SILENT
) -> Array:  # (B, N, D) -> (B, K)
    """A linear layer on the pooled image vector; that vector itself, (B, D), if the config has no classes."""
    pooled = trace.record("pooler", pool(ops, p.beit, x, config))
    return trace.record("logits", pooled if p.classifier is None else ops.linear(pooled, p.classifier))


def classification_loss(ops: Ops, logits: Array, labels: Array, problem: str) -> Array:  # (B, K), labels -> ()
    """Cross-entropy for labels (B,), one class per image; mean squared error for `problem` "regression"; else binary
    cross-entropy for labels (B, K) in [0, 1], one per class.
    """
    if problem == "single_label_classification":
        return ops.cross_entropy(logits, labels, IGNORE_INDEX)
    if problem == "regression":
        return ops.mse_loss(logits.reshape(-1), labels.reshape(-1))
    return ops.bce_with_logits(logits, labels)
