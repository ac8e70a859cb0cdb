"""BeitConfig: the fields of a Hub `config.json` for BEiT, DiT and Data2Vec-Vision, checked on construction."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config_checks import (
    MOST_PATCHES,
    check_count,
    check_number,
    counts,
    label_map,
    labels_for,
    name_list,
    pair_or_int,
    stage_indices,
)
from .errors import CheckpointError, nearest, unknown_keywords
from .file_names import CONFIG_NAME
from .files import atomic_write
from .hub import resolve_settings
from .labels import numbered, renumbered
from .signatures import show_fields
from .strict_json import brief, read_json

MODEL_TYPES = ("beit", "data2vec-vision")
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")
ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2",
    "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh",
)  # fmt: skip # all of transformers' ACT2FN that have no learned parameters; defined in ops/activations.py
COMPAT = (None, "transformers")
FEATURE_CONVENTIONS = ("transformers", "unilm")
FILLER_INDICES = (3, 5, 7, 11)  # written by Data2VecVisionConfig and by transformers before 4.36 at any depth
OLD_WORDS = ("num_labels", "segmentation_indices")  # keywords that stand for fields


@dataclass(frozen=True, init=False)
class BeitConfig:
    """The configuration of a BEiT: every field of the Hub's `config.json`, under the name it has there.

    `image_size` and `patch_size` are in pixels, an int or a (height, width) pair.  `hidden_dropout_prob`,
    `attention_probs_dropout_prob` and `drop_path_rate` are used only if a model is called with `rng=`.
    Keys that minibeit does not use are kept in `extra` and written back by `save_pretrained`.

    Two fields are minibeit's own.  `compat="transformers"` reproduces what transformers computes for non-square
    `image_size` (it reads the position bias table with height and width swapped).  `feature_convention` says which
    hidden state the segmentation head takes for index i of `out_indices`: "transformers" takes hidden_states[i - 1],
    "unilm" the output of block i, hidden_states[i + 1], as the published model was trained.

    Raises ValueError, one sentence, for a value that no model can have.
    Source: BeitConfig of transformers 4.x and 5.x; BEiT section 2.5 and appendix G for base and large.
    """

    vocab_size: int = 8192
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    num_channels: int = 3
    use_mask_token: bool = False
    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = False
    use_shared_relative_position_bias: bool = False
    layer_scale_init_value: float = 0.1
    drop_path_rate: float = 0.1
    use_mean_pooling: bool = True
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    use_auxiliary_head: bool = True
    auxiliary_loss_weight: float = 0.4
    auxiliary_channels: int = 256
    auxiliary_num_convs: int = 1
    auxiliary_concat_input: bool = False
    semantic_loss_ignore_index: int = 255
    out_features: tuple[str, ...] | None = None
    out_indices: tuple[int, ...] | None = None
    add_fpn: bool = False
    reshape_hidden_states: bool = True
    id2label: dict[int, str] = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"})
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    architectures: tuple[str, ...] | None = None
    model_type: str = "beit"
    compat: str | None = None
    feature_convention: str = "transformers"
    extra: dict[str, Any] = field(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        """Fields by name, also `num_labels` and `segmentation_indices` (see `from_dict`); other keys go to `extra`.

        Raises TypeError for a key that looks like a misspelt field.
        """
        known = _known(type(self))
        if near := [name for name in values if name not in known and nearest(name, known, 0.85)]:
            raise unknown_keywords("BeitConfig", near, known)
        values = _normalised(values)
        for f in dataclasses.fields(self):
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            self._set(f.name, values.pop(f.name, default))
        hidden = [name for name in self.extra if name in _NOT_EXTRA]
        if hidden:
            raise ValueError(f"config: extra holds {brief(hidden)}, which are fields or keywords of the config itself")
        self._set("extra", {**self.extra, **values})
        self._check()

    def _check(self) -> None:
        for name in _COUNTS:
            check_count(name, getattr(self, name), least=1)
        for name in ("num_hidden_layers", "auxiliary_num_convs"):
            check_count(name, getattr(self, name), least=0)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"config: {name} must be true or false, found {brief(getattr(self, name))}")
        for name in _PROBABILITIES:
            check_number(name, getattr(self, name), 0.0, 1.0)
        for name in ("initializer_range", "layer_norm_eps", "auxiliary_loss_weight"):
            check_number(name, getattr(self, name), 0.0, 1e6)
        check_number("layer_scale_init_value", self.layer_scale_init_value, -1e6, 1e6)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"config: {name} must be one of {', '.join(map(str, allowed))}, found {brief(getattr(self, name))}"
                )
        if not isinstance(self.out_indices, (list, tuple, type(None))):
            raise ValueError(f"config: out_indices must be a list, found {brief(self.out_indices)}")
        for name in ("out_features", "architectures"):
            self._set(name, name_list(name, getattr(self, name)))
        if not isinstance(self.label2id, (dict, type(None))):
            raise ValueError(f"config: label2id must be a mapping, found {brief(self.label2id)}")
        self._set("image_size", pair_or_int("image_size", self.image_size))
        self._set("patch_size", pair_or_int("patch_size", self.patch_size))
        self._set("pool_scales", counts("pool_scales", self.pool_scales))
        if not isinstance(self.semantic_loss_ignore_index, int) or isinstance(self.semantic_loss_ignore_index, bool):
            raise ValueError(
                f"config: semantic_loss_ignore_index must be an integer, found {brief(self.semantic_loss_ignore_index)}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config: hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}; every head needs the same size"
            )
        height, width = self.grid
        if height < 1 or width < 1:
            raise ValueError(f"config: patch_size {self.patch_size} is larger than image_size {self.image_size}")
        if height * width > MOST_PATCHES:
            raise ValueError(
                f"config: image_size {self.image_size} gives {height}x{width} patches, more than {MOST_PATCHES}"
            )
        self._check_labels()
        self._align_stages()

    # Derived sizes -------------------------------------------------------------------------------------------------

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return _as_pair(self.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """(height, width) of one patch in pixels."""
        return _as_pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(gh, gw): how many patches high and wide an image of the native size is."""
        (height, width), (patch_height, patch_width) = self.image_shape, self.patch_shape
        return height // patch_height, width // patch_width

    @property
    def head_size(self) -> int:
        """d = D / H."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_labels(self) -> int:
        """K, the number of classes: the length of `id2label`."""
        return len(self.id2label)

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Names of the L + 1 hidden states: "stem" (the embeddings), "stage1" ... "stageL"."""
        return ("stem", *(f"stage{i}" for i in range(1, self.num_hidden_layers + 1)))

    # Reading and writing -------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> BeitConfig:
        """The config of a dictionary read from a `config.json` of any transformers version.

        `num_labels=K` means K labels named LABEL_0, LABEL_1, ...; `segmentation_indices` is the old name of
        `out_indices`.
        """
        if not isinstance(values, dict):
            raise ValueError(f"config: expected a mapping of settings, found {type(values).__name__}")
        for names in ("out_features", "out_indices"):  # both name the same stages: overriding one replaces both
            if names in overrides:
                values = {k: v for k, v in values.items() if k not in ("out_features", "out_indices")}
        known = _known(cls)
        if unknown := [name for name in overrides if name not in known]:
            raise unknown_keywords("BeitConfig", unknown, known)
        values = {**renumbered(values), **overrides}
        values.pop("stage_names", None)  # written by transformers 5; follows from num_hidden_layers
        extra = {name: values.pop(name) for name in list(values) if name not in known}
        if isinstance(values.get("extra", {}), dict):
            values["extra"] = {**values.get("extra", {}), **extra}
        return cls(**values)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **keywords: Any) -> BeitConfig:
        """Reads `config.json`, given the file, its folder, or an id on the Hub.

        `keywords` are fields to replace, and those of `loading_options.Where`, which say where the files are.
        Raises TypeError for any other keyword, FileNotFoundError if there is no such file and CheckpointError, naming
        the file, if it cannot be used.
        """
        file, overrides = resolve_settings(path, keywords, _known(cls), CONFIG_NAME)
        try:
            return cls.from_dict(read_json(file), **overrides)
        except (ValueError, TypeError) as error:  # json and unicode errors are ValueErrors
            raise CheckpointError(f"{file}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that `save_pretrained` writes: the Hub's keys, lists for tuples."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        if self.compat is None:
            del values["compat"]
        if self.feature_convention == "transformers":
            del values["feature_convention"]
        for name in ("problem_type", "architectures"):
            if values[name] is None:
                del values[name]
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {**self.extra, **values}

    def to_json_string(self) -> str:
        """`to_dict()` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `config.json` into `folder`, which is created if necessary."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / CONFIG_NAME) as file:
            file.write(self.to_json_string().encode())

    def replace(self, **changes: Any) -> BeitConfig:
        """A copy with some fields changed (`num_labels=` included)."""
        return BeitConfig.from_dict(self.to_dict(), **changes)

    # Checks --------------------------------------------------------------------------------------------------------

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen, except for its own checks

    def _check_labels(self) -> None:
        names = numbered(self.id2label)
        if names is not self.id2label:
            self._set("id2label", names)
            self._set("label2id", None)
        if self.label2id is None:
            self._set("label2id", {label: i for i, label in self.id2label.items()})

    def _align_stages(self) -> None:
        """Derives `out_features` from `out_indices` or the reverse: both name the same hidden states."""
        names = self.stage_names
        if tuple(self.out_indices or ()) == FILLER_INDICES and FILLER_INDICES[-1] >= len(names):
            self._set("out_indices", None)
            self._set("out_features", None)
        if self.out_indices is not None:
            indices = stage_indices(self.out_indices, len(names))
            if self.out_features is not None and tuple(self.out_features) != tuple(names[i] for i in indices):
                raise ValueError(
                    f"config: out_features {brief(list(self.out_features))} and "
                    f"out_indices {brief(list(self.out_indices))} "
                    "name different stages; give one of them"
                )
        elif self.out_features is not None:
            unknown = [name for name in self.out_features if name not in names]
            if unknown:
                raise ValueError(
                    f"config: out_features names {brief(unknown)}, but the stages are stem, stage1 to {names[-1]}"
                )
            indices = stage_indices(tuple(names.index(name) for name in self.out_features), len(names))
        else:
            indices = (len(names) - 1,)
        self._set("out_features", tuple(names[i] for i in indices))
        self._set("out_indices", tuple(self.out_indices) if self.out_indices is not None else indices)
        if self.add_fpn and len(indices) != 4:
            raise ValueError(
                f"config: add_fpn needs exactly 4 out_indices, found {brief(list(indices))}; "
                "base-sized models use [3, 5, 7, 11]"
            )


def _known(cls: type) -> tuple[str, ...]:
    return *(f.name for f in dataclasses.fields(cls)), *OLD_WORDS


show_fields(BeitConfig.__init__, BeitConfig, "num_labels")
CONFIG_FIELDS = _known(BeitConfig)  # what `from_pretrained` of configs and models takes


def _normalised(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with current names and types, whatever version wrote them."""
    values = dict(values)
    if "segmentation_indices" in values:
        old = values.pop("segmentation_indices")
        if values.get("out_indices") is None:
            values["out_indices"] = old
    num_labels = values.pop("num_labels", None)
    if num_labels is not None:
        values.update(labels_for(num_labels, values))
    elif values.get("id2label") is None:
        values.pop("id2label", None)
    else:
        values["id2label"] = label_map(values["id2label"])
    for name in ("pool_scales", "out_features", "out_indices", "architectures"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    if not isinstance(values.get("extra", {}), dict):
        raise ValueError(f"config: extra must be a mapping, found {brief(values['extra'])}")
    return values


_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "num_channels",
    "auxiliary_channels",
)
_NOT_EXTRA = {*CONFIG_FIELDS, "stage_names"}
_FLAGS = (
    "use_mask_token",
    "use_absolute_position_embeddings",
    "use_relative_position_bias",
    "use_shared_relative_position_bias",
    "use_mean_pooling",
    "use_auxiliary_head",
    "auxiliary_concat_input",
    "add_fpn",
    "reshape_hidden_states",
)
_PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ACTIVATIONS,
    "problem_type": PROBLEM_TYPES,
    "model_type": MODEL_TYPES,
    "compat": COMPAT,
    "feature_convention": FEATURE_CONVENTIONS,
}


def _as_pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
