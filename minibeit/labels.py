"""Class names for checkpoints whose config has none, and the manifest of published checkpoints."""

from __future__ import annotations

import difflib
import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import BeitConfig

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


def palette(source: str = "ade20k") -> list[tuple[int, int, int]]:
    """One (red, green, blue) colour per class, each 0 to 255; only ADE20K has one."""
    colours = _labels(source).get("palette")
    if colours is None:
        raise ValueError(f"labels: {source} has no palette; ade20k has one")
    return [(red, green, blue) for red, green, blue in colours]


def manifest() -> dict[str, dict[str, Any]]:
    """{id: entry} of every published checkpoint: Hub ids, timm names and the files of microsoft/unilm.

    An entry has `task`, `size`, `config` (fields that differ from the defaults), `parameters`, `labels`,
    `preprocessing`, `license`, and `expected`: outputs that others have published.
    """
    return dict(_manifest())


def nearest(id: str, most: int = 3) -> list[str]:
    """The ids of published checkpoints most similar to `id`, nearest first; empty if none is similar."""
    known = {known.lower(): known for known in _manifest()}
    known |= {key.rpartition("/")[2]: value for key, value in known.items()}
    found = [known[key] for key in difflib.get_close_matches(id.lower(), known, 2 * most, 0.6)]
    return list(dict.fromkeys(found))[:most]


def source_of(task: str, count: int) -> str | None:
    """The data set that a head with `count` outputs was probably trained on; None for an unusual count."""
    return KNOWN_HEADS.get((task, count))


def unnamed(config: BeitConfig) -> bool:
    """Whether the classes have only placeholder names: LABEL_0, LABEL_1, ..."""
    return all(label == f"LABEL_{i}" for i, label in config.id2label.items())


def named(config: BeitConfig, source: str) -> BeitConfig:
    """The config with the class names of a data set.  Raises ValueError for another number of classes."""
    labels = names(source)
    if len(labels) != config.num_labels:
        raise ValueError(f"labels: {source} has {len(labels)} names, the model has {config.num_labels} outputs")
    return config.replace(id2label=dict(enumerate(labels)), label2id=None)


def with_names(config: BeitConfig, id: str) -> BeitConfig:
    """The config, with class names added if it has none and `id` is a published checkpoint."""
    if not unnamed(config):
        return config
    entry = _manifest().get(id) or _manifest().get(str(config.extra.get("_name_or_path")))
    source = entry["labels"] if entry else None
    return named(config, source) if source and len(names(source)) == config.num_labels else config


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


def weights_folder() -> Path:
    """The folder of the manifest and the labels: minibeit/weights if installed, weights/ in a source checkout.

    Raises FileNotFoundError for an installation without them.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "weights", package.parent / "weights"):
        if (folder / "manifest.json").is_file():
            return folder
    raise FileNotFoundError(f"{package / 'weights'}: the manifest is not here; install minibeit again")


@functools.lru_cache(maxsize=len(SOURCES))
def _labels(source: str) -> dict[str, Any]:
    if source not in SOURCES:
        raise ValueError(f"labels: expected one of {', '.join(SOURCES)}, found {source!r}")
    return json.loads((weights_folder() / f"labels-{source}.json").read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=1)
def _manifest() -> dict[str, dict[str, Any]]:
    return json.loads((weights_folder() / "manifest.json").read_text(encoding="utf-8"))["checkpoints"]
