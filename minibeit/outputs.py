"""What a model returns: one dataclass per task, named as in transformers.

Fields that were not asked for are None.  As in transformers, an output is also a mapping of the fields that are not
None: `out["logits"]`, `out.keys()`, `out[0]`, `out.to_tuple()`.

Letters: B batch, N tokens, D width, H heads, P patches, L blocks, K classes, V visual tokens, h x w map.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import numpy as np

from .foreign import as_numpy

Array = Any  # NumPy's, or PyTorch's for tensors of PyTorch
Self = TypeVar("Self", bound="ModelOutput")
SHOWN = 448  # pixels of the longer side that Jupyter shows a map with
MOST_IMAGES, MOST_CLASSES = 8, 5  # that Jupyter's table has


class ModelOutput:
    """Attributes, keys and positions for the fields that are not None."""

    names: ClassVar[Mapping[int, str] | None] = None  # of the classes, for people; set for each output

    def named(self: Self, names: Mapping[int, str]) -> Self:
        """The output, which from now on knows what its classes are called."""
        object.__setattr__(self, "names", names)
        return self

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

    def converted(self: Self, convert: Callable[[Array], Any]) -> Self:
        """The output with every array replaced by convert(array)."""

        def one(value: Any) -> Any:
            return tuple(map(convert, value)) if isinstance(value, tuple) else convert(value)

        new = type(self)(**{name: one(value) for name, value in self.items()})
        return new if self.names is None else new.named(self.names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={described(value)}' for name, value in self.items())})"

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


@dataclass(repr=False)
class BeitModelOutputWithPooling(ModelOutput):
    """The encoder's output: last_hidden_state (B, N, D), pooler_output (B, D), and the intermediates asked for."""

    last_hidden_state: Array = None
    """(B, N, D): the output of the last block, with a final norm only where there is no mean pooling."""
    pooler_output: Array = None
    """(B, D): one vector per image; None without a pooling layer."""
    hidden_states: tuple[Array, ...] | None = None
    """L + 1 of (B, N, D): the embeddings, then the output of every block; with `output_hidden_states`."""
    attentions: tuple[Array, ...] | None = None
    """L of (B, H, N, N): the probabilities of every block; with `output_attentions`."""


@dataclass(repr=False)
class MaskedLMOutput(ModelOutput):
    """Scores of visual tokens: logits (B, P, V), the loss () for labels, and the intermediates asked for."""

    loss: Array = None
    """(): the mean cross-entropy of the hidden patches; None without labels."""
    logits: Array = None
    """(B, P, V): a score for every visual token at every patch; of hidden patches alone, (n, V), if so asked."""
    hidden_states: tuple[Array, ...] | None = None
    """L + 1 of (B, N, D): the embeddings, then the output of every block; with `output_hidden_states`."""
    attentions: tuple[Array, ...] | None = None
    """L of (B, H, N, N): the probabilities of every block; with `output_attentions`."""


@dataclass(repr=False)
class ImageClassifierOutput(ModelOutput):
    """Scores of classes: logits (B, K), the loss () for labels, and the intermediates asked for."""

    loss: Array = None
    """(): None without labels."""
    logits: Array = None
    """(B, K): a score for every class, before any softmax."""
    hidden_states: tuple[Array, ...] | None = None
    """L + 1 of (B, N, D): the embeddings, then the output of every block; with `output_hidden_states`."""
    attentions: tuple[Array, ...] | None = None
    """L of (B, H, N, N): the probabilities of every block; with `output_attentions`."""

    def _repr_html_(self) -> str | None:
        """For Jupyter: the classes with the largest logits of the first images."""
        return None if self.logits is None else class_table(as_numpy(self.logits), self.names)


@dataclass(repr=False)
class SemanticSegmenterOutput(ModelOutput):
    """Scores of classes for a map: logits (B, K, 4 gh, 4 gw), the loss () for labels, and what else was asked for."""

    loss: Array = None
    """(): None without labels."""
    logits: Array = None
    """(B, K, 4 gh, 4 gw): a score for every class, at four times the patch grid."""
    hidden_states: tuple[Array, ...] | None = None
    """L + 1 of (B, N, D): the embeddings, then the output of every block; with `output_hidden_states`."""
    attentions: tuple[Array, ...] | None = None
    """L of (B, H, N, N): the probabilities of every block; with `output_attentions`."""
    auxiliary_logits: Array | None = None
    """(B, K, gh, gw): those of the auxiliary head; for a loss, or with `output_auxiliary_logits`."""

    def _repr_png_(self) -> bytes | None:
        """For Jupyter: the classes of the first image in their colours, with a legend."""
        if self.logits is None:
            return None
        from .colours import class_colours
        from .drawing import class_map, png  # and Pillow, which a model needs for nothing else

        labels = as_numpy(self.logits)[0].argmax(0)
        zoom = max(1, SHOWN // max(labels.shape))
        large = labels.repeat(zoom, 0).repeat(zoom, 1)
        count = self.logits.shape[1]
        return png(class_map(large, self.names or _numbers(count), class_colours(count)))


@dataclass(repr=False)
class BackboneOutput(ModelOutput):
    """Maps of features, one for each of the config's `out_features`, and the intermediates asked for."""

    feature_maps: tuple[Array, ...] = None  # type: ignore[assignment]  # None is what was not computed
    """(B, D, h, w) each, or (B, N, D) without `reshape_hidden_states`."""
    hidden_states: tuple[Array, ...] | None = None
    """L + 1 of (B, N, D): the embeddings, then the output of every block; with `output_hidden_states`."""
    attentions: tuple[Array, ...] | None = None
    """L of (B, H, N, N): the probabilities of every block; with `output_attentions`."""


@dataclass(repr=False)
class FlaxBeitModelOutputWithPooling(BeitModelOutputWithPooling):
    """The output of FlaxBeitModel."""


@dataclass(repr=False)
class FlaxMaskedLMOutput(MaskedLMOutput):
    """The output of FlaxBeitForMaskedImageModeling; `loss` is always None."""


@dataclass(repr=False)
class FlaxSequenceClassifierOutput(ImageClassifierOutput):
    """The output of FlaxBeitForImageClassification; `loss` is always None."""


def described(value: Any) -> str:
    """An array as "float32 (1, 3, 224, 224)", a single number as itself, arrays of one shape as "13 x ..."."""
    if isinstance(value, tuple) and value:
        parts = [described(part) for part in value]
        return f"{len(parts)} x {parts[0]}" if len(set(parts)) == 1 else f"({', '.join(parts)})"
    shape = getattr(value, "shape", None)
    if shape is None:
        return repr(value)
    if not len(shape):
        return f"{float(value):.6g}"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(shape)}"


def class_table(logits: np.ndarray, names: Mapping[int, str] | None) -> str:  # (B, K)
    """The classes with the largest logits of the first images, as HTML."""
    rows = []
    for image, values in enumerate(logits[:MOST_IMAGES]):
        x = np.exp(values.astype(np.float64) - values.max())
        for i in np.argsort(-values, kind="stable")[:MOST_CLASSES].tolist():
            name = html.escape((names or {}).get(i, f"LABEL_{i}"))
            rows.append(
                f"<tr><td>{image}</td><td>{name}</td><td>{values[i]:.3f}</td><td>{x[i] / x.sum():.1%}</td></tr>"
            )
    left = len(logits) - MOST_IMAGES
    more = f"<p>and {left} more images</p>" if left > 0 else ""
    head = "<tr><th>image</th><th>class</th><th>logit</th><th>softmax</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>{more}"


def _numbers(count: int) -> dict[int, str]:
    return {i: str(i) for i in range(count)}
