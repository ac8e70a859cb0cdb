"""What the numbers of a config may be: checks that cost nothing, and limits far above every real model."""

from __future__ import annotations

from typing import Any

from .strict_json import brief

# The most that a field may say.  A stranger writes it before any tensor vouches for it, and lists are made as long as
# it says; in brackets what is known to exist.
MOST = {
    "vocab_size": 1 << 18,  # (8192 of DALL-E's tokenizer, 2^18 of MAGVIT-v2)
    "hidden_size": 1 << 15,  # (6144 in ViT-22B)
    "num_attention_heads": 1 << 10,  # (48 in ViT-22B)
    "intermediate_size": 1 << 17,  # (24576 in ViT-22B)
    "num_hidden_layers": 1000,  # (48 in ViT-22B, 1000 in DeepNet)
    "num_channels": 1 << 10,  # (some 400 bands of a spectral camera)
    "image_size": 1 << 16,  # (896 in BEiT-3); the side of an image whose 65536 patches have 256 pixels a side
    "patch_size": 1 << 12,  # (32 pixels)
    "auxiliary_channels": 1 << 14,  # (256)
    "auxiliary_num_convs": 64,  # (1)
    "pool_scales": 64,  # (6); maps of scale x scale cells are made for every image
    "num_labels": 1 << 16,  # (21,841 of ImageNet-22k)
}
LONGEST_LIST = 64  # pool_scales (4 in UPerNet) and architectures (1)
MOST_PATCHES = 1 << 16  # (P + 1)^2 index entries must stay addressable


def check_count(name: str, value: Any, least: int) -> None:
    """Raises ValueError unless `value` is a whole number from `least` to the field's limit."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST[name]:
        raise ValueError(f"config: {name} must be an integer from {least} to {MOST[name]}, found {brief(value)}")


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Raises ValueError unless `value` is a number from `least` to `most`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"config: {name} must be a number from {least:g} to {most:g}, found {brief(value)}")


def counts(name: str, values: Any) -> tuple[int, ...]:
    """A short list of whole numbers as a tuple.  Raises ValueError for anything else."""
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"config: {name} must be a list of integers, found {brief(values)}")
    _check_length(name, values)
    for value in values:
        check_count(name, value, least=1)
    return tuple(values)


def name_list(name: str, values: Any) -> tuple[str, ...] | None:
    """A short list of texts as a tuple; None stays.  Raises ValueError for anything else."""
    if values is None:
        return None
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"config: {name} must be a list, found {brief(values)}")
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"config: {name} must be a list of names, found {brief(values)}")
    _check_length(name, values)
    return tuple(values)


def pair_or_int(name: str, value: Any) -> int | tuple[int, int]:
    """A size in pixels: one whole number or (height, width).  Raises ValueError for anything else."""
    if isinstance(value, (list, tuple)):
        if len(value) != 2:
            raise ValueError(f"config: {name} must be an integer or a (height, width) pair, found {brief(value)}")
        height, width = counts(name, value)
        return height, width
    check_count(name, value, least=1)
    return value


def stage_indices(indices: Any, count: int) -> tuple[int, ...]:
    """Checks stage numbers and makes negative ones, counted from the end, positive.  Raises ValueError."""
    whole = (isinstance(i, int) and not isinstance(i, bool) and -count <= i < count for i in indices)
    if not all(whole):
        raise ValueError(f"config: out_indices must be integers from {-count} to {count - 1}, found {_listed(indices)}")
    positive = tuple(i % count for i in indices)
    if list(positive) != sorted(set(positive)):
        raise ValueError(f"config: out_indices must rise and not repeat, found {_listed(indices)}")
    return positive


def label_map(labels: Any) -> dict[int, str]:
    """id2label with integer keys; JSON has only strings as keys.  Raises ValueError for anything else."""
    if not isinstance(labels, dict):
        raise ValueError(f"config: id2label must map class numbers to names, found {brief(labels)}")
    check_count("num_labels", len(labels), least=0)
    try:
        numbered = {int(key): label if isinstance(label, str) else _text(label) for key, label in labels.items()}
    except (TypeError, ValueError, OverflowError):
        numbered = {}
    if len(numbered) != len(labels):
        raise ValueError(f"config: id2label must map class numbers to names, found {brief(labels)}")
    return numbered


def labels_for(num_labels: Any, values: dict[str, Any]) -> dict[str, Any]:
    """id2label and label2id for `num_labels` classes: those of the file if they are as many, else LABEL_0 ..."""
    check_count("num_labels", num_labels, least=0)
    if values.get("id2label") is not None:
        known = label_map(values["id2label"])
        if len(known) == num_labels:
            return {"id2label": known}
    return {"id2label": {i: f"LABEL_{i}" for i in range(num_labels)}, "label2id": None}


def _text(label: Any) -> str:
    if isinstance(label, (dict, list, tuple)):
        raise TypeError("a container is no name")
    return str(label)


def _check_length(name: str, values: Any) -> None:
    limit = MOST["num_hidden_layers"] + 1 if name == "out_features" else LONGEST_LIST
    if len(values) > limit:
        raise ValueError(f"config: {name} must have at most {limit} entries, found {len(values)}")


def _listed(values: Any) -> str:
    return brief(list(values))
