"""What workers compute: each kind of work turns a list of images into a table with a row for each of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from ..places import place
from ..runs.maps import segmented
from ..runs.results import SHARD_READERS, Result, pooled, predictions, results_of, unusable
from .extra import needed
from .places import copies

BLOCKS, BLOCK = 64, 512  # elements of each array that a model is recognised by
PREDICTION = {"labels": "label", "indices": "index", "scores": "score", "logits": "logit"}  # column: of a prediction


@dataclass
class Work:
    """A model and an image processor; `kind` is the name of the command that does the same on one machine."""

    model: Any
    processor: Any
    batch_size: int = 8

    kind: ClassVar[str]

    @cached_property
    def model_digest(self) -> str:
        """Made once, then pickled with the work."""
        return fingerprint(self.model)

    @property
    def backend(self) -> str:
        """Of the model."""
        return str(self.model.ops.backend)

    def settings(self) -> dict[str, Any]:
        """What the results depend on, for the manifest."""
        return {
            "command": self.kind,
            "model": self.model_digest,
            "dtype": self.model.dtype,
            "backend": self.backend,
            "processor": self.processor.to_dict(),
        }

    def table(self, images: Sequence[Any]) -> Any:
        """The rows of some images, a pyarrow.Table whose column `error` is null but for what could not be used."""
        raise NotImplementedError

    def _results(self, images: Sequence[str], compute: Callable[[np.ndarray], np.ndarray]) -> Iterator[Result]:
        return results_of(copies(images), self.processor, compute, self.batch_size, SHARD_READERS)

    def _table(self, rows: Iterable[dict[str, Any]], columns: Sequence[tuple[str, Any]]) -> Any:
        """The rows as a table with the columns `file` and `error` around the given ones."""
        pa = needed("pyarrow")
        fields = [("file", pa.string()), *columns, ("error", pa.string())]
        return pa.Table.from_pylist(list(rows), pa.schema(fields, {"minibeit": json.dumps(self.settings())}))


@dataclass
class Classify(Work):
    """The `top_k` most probable classes of each image.

    Columns: `file`; `labels`, `indices`, `scores` (softmax, of multi-label models sigmoid, of regression the value) and
    `logits`, lists of equal length, the largest score first; `error`, null but for an image that could not be used,
    where the lists are null.  `names` are those of the classes, by default the model's.
    """

    top_k: int = 5
    names: Sequence[str] | None = None

    kind = "classify"

    def settings(self) -> dict[str, Any]:
        """What the results depend on, for the manifest."""
        names = None if self.names is None else hashlib.sha256(json.dumps(list(self.names)).encode()).hexdigest()
        return {**super().settings(), "top_k": self.top_k, "names": names}

    def table(self, images: Sequence[str]) -> Any:
        """The rows of some images, a pyarrow.Table."""
        pa, config = needed("pyarrow"), self.model.config
        names = self.names or [config.id2label[i] for i in range(config.num_labels)]
        rows = []
        for result in self._results(images, lambda pixels: self.model(pixels).logits):
            row: dict[str, Any] = {"file": result.file, "error": result.error}
            if result.error is None:
                best = predictions(result.value, config.problem_type, names, self.top_k)
                row |= {column: [one[key] for one in best] for column, key in PREDICTION.items()}
            rows.append(row)
        kinds = (pa.string(), pa.int32(), pa.float64(), pa.float64())
        count = min(self.top_k, config.num_labels)
        return self._table(rows, [(name, pa.list_(kind, count)) for name, kind in zip(PREDICTION, kinds)])


@dataclass
class Features(Work):
    """The output of a block of the encoder for each image: the mean of the patches, the [CLS] token, or all tokens.

    `model` is a `BeitBackbone` with one of `out_indices`, `add_fpn=False` and `reshape_hidden_states=False`.  Columns:
    `file`; `features`, a list of D numbers, with pool "none" of N * D, token by token; `error`, null but for an image
    that could not be used, where the list is null.
    """

    pool: str = "mean"

    kind = "features"

    def settings(self) -> dict[str, Any]:
        """What the results depend on, for the manifest."""
        return {**super().settings(), "pool": self.pool, "layer": self.model.out_indices[0]}

    def table(self, images: Sequence[str]) -> Any:
        """The rows of some images, a pyarrow.Table."""
        pa, config = needed("pyarrow"), self.model.config
        width = config.hidden_size
        shape = (1 + config.grid[0] * config.grid[1], width) if self.pool == "none" else (width,)
        rows = []
        for result in self._results(images, lambda pixels: pooled(self.model(pixels).feature_maps[0], self.pool)):
            if result.error is None and result.value.shape != shape:
                result = unusable(result.file, f"its features have shape {result.value.shape}, expected {shape}")
            features = None if result.error is not None else result.value.ravel()
            rows.append({"file": result.file, "features": features, "error": result.error})
        kind = pa.float64() if self.model.dtype == "float64" else pa.float32()
        return self._table(rows, [("features", pa.list_(kind, int(np.prod(shape))))])


@dataclass
class Segment(Work):
    """The class of every pixel of each image, drawn into files, as `minibeit segment` does.

    Images are pairs of a path or address and {kind: path or address of the file to write}, of which "labels" and
    "legend" must be there and "overlay", "figure" and "scores" may be.  `how` says which views are computed, `colours`
    are those of the classes, `mark` is the model's name in the maps.  Columns: `file`, `height`, `width`, `labels`
    (where the map is), `classes` (those that occur, with `index`, `label`, `pixels` and `share`, the largest first),
    `error`.
    """

    how: Any = None
    colours: Sequence[tuple[int, int, int]] = ()
    mark: str = ""

    kind = "segment"

    def settings(self) -> dict[str, Any]:
        """What the results depend on, for the manifest."""
        views = {name: value for name, value in asdict(self.how).items() if name != "batch_size"}
        return {**super().settings(), "views": views, "colours": [list(colour) for colour in self.colours]}

    def table(self, images: Sequence[tuple[str, dict[str, str]]]) -> Any:
        """Writes the maps of some images; their rows, a pyarrow.Table."""
        pa = needed("pyarrow")
        found = copies([image for image, _ in images])
        files = ({kind: place(path) for kind, path in paths.items()} for _, paths in images)
        drawn = self.how, list(self.colours), self.mark, SHARD_READERS
        rows = list(segmented(zip(found, files), self.model, self.processor, *drawn))
        fields = [("index", pa.int32()), ("label", pa.string()), ("pixels", pa.int64()), ("share", pa.float64())]
        columns = [("height", pa.int32()), ("width", pa.int32()), ("labels", pa.string())]
        return self._table(rows, [*columns, ("classes", pa.list_(pa.struct(fields)))])


def fingerprint(model: Any) -> str:
    """A digest of the config of a model, or a tokenizer, and of samples of its weights: it tells two trainings apart at
    little cost."""
    prepared = getattr(model, "_prepared", None)  # a tokenizer has none
    arrays = model.arrays if prepared is None else prepared.arrays
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(repr((name, array.shape, array.dtype.str)).encode())
        elements = array.reshape(-1)
        for start in np.linspace(0, max(0, elements.size - BLOCK), BLOCKS if elements.size > BLOCK else 1, dtype=int):
            digest.update(elements[start : start + BLOCK].tobytes())
    return digest.hexdigest()[:16]
