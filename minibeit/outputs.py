"""What a model returns: one dataclass per task, named as in transformers.

Fields that were not asked for are None.  As in transformers, an output is also a mapping of the fields that are not
None: `out["logits"]`, `out.keys()`, `out[0]`, `out.to_tuple()`.

Letters: B batch, N tokens, D width, H heads, P patches, L blocks, K classes, V visual tokens, h x w map.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

Array = Any


class ModelOutput:
    """Attributes, keys and positions for the fields that are not None."""

    def keys(self) -> list[str]:
        """Names of the fields that are not None, in order."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]  # type: ignore[arg-type]

    def values(self) -> list[Any]:
        """Values of the fields that are not None, in order."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """(name, value) of the fields that are not None, in order."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values of the fields that are not None, in order."""
        return tuple(self.values())

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, or `default` if it is None or unknown."""
        return getattr(self, name) if name in self.keys() else default

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"{type(self).__name__} has {', '.join(self.keys())}, not {key!r}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()


@dataclass
class BeitModelOutputWithPooling(ModelOutput):
    last_hidden_state: Array | None = None  # (B, N, D); not normalised with mean pooling
    pooler_output: Array | None = None  # (B, D)
    hidden_states: tuple[Array, ...] | None = None  # L + 1 of (B, N, D)
    attentions: tuple[Array, ...] | None = None  # L of (B, H, N, N)


@dataclass
class MaskedLMOutput(ModelOutput):
    loss: Array | None = None  # ()
    logits: Array | None = None  # (B, P, V)
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@dataclass
class ImageClassifierOutput(ModelOutput):
    loss: Array | None = None  # ()
    logits: Array | None = None  # (B, K)
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@dataclass
class SemanticSegmenterOutput(ModelOutput):
    loss: Array | None = None  # ()
    logits: Array | None = None  # (B, K, 4 gh, 4 gw)
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None
    auxiliary_logits: Array | None = None  # (B, K, gh, gw)


@dataclass
class BackboneOutput(ModelOutput):
    feature_maps: tuple[Array, ...] | None = None  # (B, D, h, w) each, or (B, N, D) without reshape_hidden_states
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@dataclass
class FlaxBeitModelOutputWithPooling(BeitModelOutputWithPooling):
    """The output of FlaxBeitModel."""


@dataclass
class FlaxMaskedLMOutput(MaskedLMOutput):
    """The output of FlaxBeitForMaskedImageModeling; `loss` is always None."""


@dataclass
class FlaxSequenceClassifierOutput(ImageClassifierOutput):
    """The output of FlaxBeitForImageClassification; `loss` is always None."""
