"""Class names for a config without any: those stored with the weights, or else those of the training data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import labels
from ..catalogue import manifest
from ..config import BeitConfig


def unnamed(config: BeitConfig) -> bool:
    """Whether the classes are called LABEL_0, LABEL_1, ...: nobody has named them."""
    return all(label == f"LABEL_{i}" for i, label in config.id2label.items())


def named(config: BeitConfig, source: str) -> BeitConfig:
    """The config with the class names of a data set that has as many classes.  Raises ValueError otherwise."""
    names = labels.names(source)
    if len(names) != config.num_labels:
        raise ValueError(f"labels: {source} has {len(names)} names, the model has {config.num_labels} outputs")
    return config.replace(id2label=dict(enumerate(names)), label2id=None)


def with_names(config: BeitConfig, id: str) -> BeitConfig:
    """The config with names for its classes where it has none and `id` is a published checkpoint's."""
    if not unnamed(config):
        return config
    known = manifest()
    entry = known.get(id) or known.get(str(config.extra.get("_name_or_path")))
    source = entry["labels"] if entry else None
    return named(config, source) if source and len(labels.names(source)) == config.num_labels else config


def name_classes(
    config: BeitConfig, task: str, extra: Mapping[Any, Any], said: Any = None
) -> tuple[BeitConfig, list[str]]:
    """Names for the classes of an inferred config, and what was assumed for them.

    `said` are the names that a timm config lists, `extra` is what stands beside the weights (where mmseg has names).
    """
    if task not in ("image_classification", "semantic_segmentation") or not unnamed(config):
        return config, []
    meta = extra.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    dataset = meta.get("dataset_meta")
    for own in (said, meta.get("CLASSES"), dataset.get("classes") if isinstance(dataset, Mapping) else None):
        if isinstance(own, (list, tuple)) and len(own) == config.num_labels and all(isinstance(n, str) for n in own):
            return config.replace(id2label={i: name.strip() for i, name in enumerate(own)}, label2id=None), []
    source = labels.source_of(task, config.num_labels)
    if source is None:
        return config, []
    return named(config, source), [f"class names of {source}"]
