"""LoRA adapters of PEFT: small tensors in a folder, merged into the weights of the model they were trained on."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import BeitConfig
from ..errors import CheckpointError
from ..file_names import ADAPTER_CONFIG, ADAPTER_FILES
from ..strict_json import read_json
from .dialects import DIALECTS
from .formats import TensorInfo, Tensors, load_file
from .formats.lazy_tensors import FLOATS, narrowed
from .match import every_variant
from .names import Naming

PREFIX = "base_model.model."
PART = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.(weight|bias))?")
# Initialisations that change the base model's weights too, so merging into the published weights would be wrong.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Update:
    """The update of one tensor of the base model: W + scaling * B @ A, with rows rescaled to `magnitude`, if any."""

    A: np.ndarray  # (r, in) or (r, in, kh, kw)
    B: np.ndarray  # (out, r) or (out, r, 1, 1)
    scaling: float
    transposed: bool
    magnitude: np.ndarray | None  # (out,)

    def applied(self, weight: np.ndarray) -> np.ndarray:
        """The updated weight, in float64.  Raises ValueError for shapes that do not fit."""
        flat = self.A.astype(np.float64).reshape(len(self.A), -1)
        delta = self.B.astype(np.float64).reshape(len(self.B), -1) @ flat
        delta = (delta.T if self.transposed else delta).reshape(weight.shape)
        new = weight.astype(np.float64) + self.scaling * delta
        if self.magnitude is None:
            return new
        norms = np.sqrt((new.reshape(len(new), -1) ** 2).sum(axis=1))  # DoRA: the length of each output's row
        return new * (self.magnitude.reshape(-1) / norms).reshape(-1, *(1,) * (new.ndim - 1))


class Merged(Tensors):
    """The tensors of the base model with an adapter merged in: some updated, some replaced, some new."""

    def __init__(self, base: Tensors, updates: Mapping[str, Update], added: Tensors, names: Mapping[str, str]) -> None:
        super().__init__(base.stored())
        self._base, self._updates, self._added = base, dict(updates), added
        self._names = dict(names)  # base file's name of a replaced or new tensor -> the adapter's name

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name, "float32")

    def __iter__(self) -> Iterator[str]:
        yield from self._base
        yield from (name for name in self._names if name not in self._base)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._names or name in self._base

    def info(self, name: str) -> TensorInfo:
        return self._added.info(self._names[name]) if name in self._names else self._base.info(name)

    def read(self, name: str, dtype: npt.DTypeLike = np.float32) -> np.ndarray:
        if name in self._names:
            return self._added.read(self._names[name], dtype)
        if name not in self._updates:
            return self._base.read(name, dtype)
        try:
            return narrowed(name, self._updates[name].applied(self._base[name]), np.dtype(dtype).name)
        except ValueError as error:
            raise CheckpointError(f"tensor {name}: the adapter's update does not fit it: {error}") from None


@dataclass(frozen=True)
class Adapter:
    """An adapter as read from its folder."""

    folder: Path
    settings: dict[str, Any]
    tensors: Tensors

    @property
    def base(self) -> str | None:
        """Path or id of the model that it was trained on."""
        return self.settings.get("base_model_name_or_path")

    def merged(self, base: Tensors, naming: Naming, config: BeitConfig) -> Merged:
        """The base model's tensors with this adapter merged in.  Raises CheckpointError if that is impossible."""
        names = {name.removeprefix(PREFIX).replace(".base_layer.", "."): name for name in self.tensors}
        parts: dict[str, dict[str, str]] = {}
        whole = []
        for name in names:
            part = PART.fullmatch(name)
            if part is None:
                whole.append(name)
            else:
                kind = part[2] if part[3] != "bias" else f"{part[2]}.bias"
                parts.setdefault(part[1], {})[kind] = name
        wanted = [f"{module}.weight" for module in parts]
        theirs = self._places([*wanted, *whole], base, naming, config)
        updates = {}
        for module, kinds in parts.items():
            arrays = {kind: self.tensors[names[name]] for kind, name in kinds.items()}
            updates[theirs[f"{module}.weight"]] = self._update(module, arrays)
        return Merged(base, updates, self.tensors, {theirs[name]: names[name] for name in whole})

    def _update(self, module: str, arrays: Mapping[str, np.ndarray]) -> Update:
        if not {"A", "B"} <= set(arrays) or set(arrays) - {"A", "B", "magnitude_vector"}:
            raise self._error(f"holds {', '.join(sorted(arrays))} for {module}, of which LoRA's A and B can be merged")
        settings, rank = self.settings, len(arrays["A"])
        alpha = _by_pattern(settings.get("alpha_pattern") or {}, module, settings.get("lora_alpha", 8))
        if not isinstance(alpha, (int, float)) or rank < 1:
            raise self._error(f"has lora_alpha {alpha!r} and rank {rank} for {module}, which give no scale")
        return Update(
            arrays["A"],
            arrays["B"],
            alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank),
            bool(settings.get("fan_in_fan_out")),
            arrays.get("magnitude_vector"),
        )

    def _places(self, wanted: list[str], base: Collection[str], naming: Naming, config: BeitConfig) -> dict[str, str]:
        """{the adapter's name of a tensor: the base file's name}, matched by canonical name."""
        places = naming.known(dict.fromkeys(name for shapes in every_variant(config) for name in shapes))
        # Two parameters may share one name in the adapter: the one that the base has, or else the first, is meant.
        ours = sorted(places, key=lambda name: places[name].name not in base)
        best: dict[str, str] = {}
        for dialect in DIALECTS.values():
            for encoder in dialect.encoders:
                found: dict[str, str] = {}
                for name, place in Naming(dialect, encoder).known(ours).items():
                    if place.name in wanted and place.how == places[name].how:  # an update fits that layout alone
                        found.setdefault(place.name, places[name].name)
                best = max(best, found, key=len)
        lost = [name for name in wanted if name not in best]
        if lost:
            raise self._error(f"has {len(lost)} tensors with no place in its base model: {', '.join(lost[:8])}")
        return best

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: the adapter {message}")


def read_adapter(folder: Path) -> Adapter | None:
    """The adapter in a folder; None if there is none.

    Raises CheckpointError for one that is not LoRA, is incomplete, or whose initialisation changed the base weights.
    """
    present = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        if present:
            raise CheckpointError(
                f"{folder}: holds the adapter {present[0]}, but no {ADAPTER_CONFIG}, without which it cannot be "
                "merged; add that file, or call merge_and_unload() where it was trained and save the model"
            )
        return None
    try:
        settings = read_json(file)
    except ValueError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: expected a mapping of settings, found {type(settings).__name__}")
    if not present:
        raise CheckpointError(f"{folder}: has {ADAPTER_CONFIG}, but none of {', '.join(ADAPTER_FILES)}")
    start = settings.get("init_lora_weights")
    unmergeable = None
    if settings.get("peft_type") != "LORA":
        unmergeable = f"is of type {settings.get('peft_type')!r}, of PEFT's only LORA is read"
    elif isinstance(start, str) and start.startswith(CHANGES_BASE):
        unmergeable = f"started with init_lora_weights {start!r}, which changes the base model's weights too"
    elif settings.get("trainable_token_indices") or settings.get("megatron_config"):
        unmergeable = "trains tokens or is Megatron's, which is not read"
    if unmergeable:
        raise CheckpointError(
            f"{folder}: the adapter {unmergeable}; call merge_and_unload() where it was trained and save the model"
        )
    return Adapter(folder, settings, load_file(folder / present[0]).tensors)


def base_of(adapter: Adapter) -> str:
    """Path or id of the adapter's base model; a relative path starts at the working directory or the adapter's folder.

    Raises CheckpointError if the adapter names none.
    """
    base = adapter.base
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{adapter.folder}: holds only an adapter, whose {ADAPTER_CONFIG} names no base model")
    beside = adapter.folder / base
    return str(beside) if not Path(base).exists() and beside.exists() else base


def saved_classes(adapter: Adapter) -> int | None:
    """The number of classes of a complete classification head in the adapter; None if it has none."""
    for name in adapter.tensors:
        if name.removeprefix(PREFIX) in ("classifier.weight", "head.weight"):
            info = adapter.tensors.info(name)
            return info.shape[0] if info.dtype in FLOATS and len(info.shape) == 2 else None
    return None


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that equals the module's name or its end; only plain names are accepted."""
    for pattern, value in patterns.items():
        if re.search(r"[^\w.]", pattern):  # an untrusted regular expression may run for ever
            raise CheckpointError(f"{ADAPTER_CONFIG}: alpha_pattern has {pattern!r}; only plain module names are read")
        if module == pattern or module.endswith(f".{pattern}"):
            return value
    return default
