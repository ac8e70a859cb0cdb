"""Class names as data, for checkpoints whose config has none, and the numbering of those that it has."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping
from typing import Any

from .catalogue import weights_folder

SOURCES = ("imagenet-1k", "imagenet-22k", "ade20k", "rvl-cdip")

# (task, number of outputs) -> the data set that such published checkpoints were trained on.
KNOWN_HEADS = {
    ("image_classification", 1000): "imagenet-1k",
    ("image_classification", 21841): "imagenet-22k",
    ("image_classification", 16): "rvl-cdip",
    ("semantic_segmentation", 150): "ade20k",
}

# Two synsets of Google's list of 21,843 classes that the training data, with 21,841, lacks.
REMOVED_FROM_22K = (9205, 15027)


def names(source: str) -> list[str]:
    """The class names of a data set, one per output: "imagenet-1k", "imagenet-22k", "ade20k" or "rvl-cdip"."""
    return list(_labels(source)["names"])


def synsets() -> list[str]:
    """The WordNet ids of the classes of ImageNet-1k, one per output; they are sorted."""
    return list(_labels("imagenet-1k")["synsets"])


def outputs_of_22k() -> list[int | None]:
    """The output of each class of ImageNet-1k among the 21,841 of ImageNet-22k; None for n04399382, which it lacks.

    Source: the lists of synsets in timm/data/_info.
    """
    return list(_labels("imagenet-1k")["outputs of 22k"])


def palette(source: str = "ade20k") -> list[tuple[int, int, int]]:
    """One (red, green, blue) colour per class, each 0 to 255; only ADE20K has one."""
    colours = _labels(source).get("palette")
    if colours is None:
        raise ValueError(f"labels: {source} has no palette; ade20k has one")
    return [(red, green, blue) for red, green, blue in colours]


def source_of(task: str, count: int) -> str | None:
    """The data set that a head with `count` outputs was probably trained on; None for an unusual count."""
    return KNOWN_HEADS.get((task, count))


def renumbered(values: Any) -> Any:
    """The content of a config.json with its 21,841 ImageNet-22k names renumbered 0, 1, ... without gaps.

    Published files took Google's list of 21,843 classes and deleted keys 9205 (n03931044) and 15027 (n09859684), which
    the training data lacks, but did not renumber the others: from output 9205 on, every name is one or two outputs too
    high.  Once the gaps are closed, the list is that of the training data's 21,841 classes (equal to timm's
    imagenet22k_synsets.txt).
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("id2label"), Mapping):
        return values
    labels = values["id2label"]
    if len(labels) != 21841 or str(21842) not in map(str, labels):
        return values
    try:
        by_number = {int(key): label for key, label in labels.items()}
    except ValueError:
        return values
    if set(range(21843)) - set(by_number) != set(REMOVED_FROM_22K):
        return values
    in_order = dict(enumerate(by_number[i] for i in sorted(by_number)))
    return {**values, "id2label": in_order, "label2id": None}


def numbered(labels: dict[int, str]) -> dict[int, str]:
    """Names for the outputs 0 to K - 1 of a head, where K is the number of names, as in transformers.

    A name whose number is outside that range is left out, and an output without a name is called LABEL_i, with a
    warning that lists both.  Returns `labels` itself if they are numbered so already.
    """
    count = len(labels)
    if set(labels) == set(range(count)):
        return labels
    strays = ", ".join(f"{i} {label!r}" for i, label in labels.items() if i not in range(count))
    unnamed = ", ".join(str(i) for i in range(count) if i not in labels)
    warnings.warn(
        f"config: id2label has {count} names, for the outputs 0 to {count - 1}: {strays[:200]} name no output, "
        f"the outputs {unnamed[:100]} are called LABEL_i",
        stacklevel=7,
    )
    return {i: labels.get(i, f"LABEL_{i}") for i in range(count)}


@functools.lru_cache(maxsize=len(SOURCES))
def _labels(source: str) -> dict[str, Any]:
    if source not in SOURCES:
        raise ValueError(f"labels: expected one of {', '.join(SOURCES)}, found {source!r}")
    return json.loads((weights_folder() / f"labels-{source}.json").read_text(encoding="utf-8"))
