"""What an evaluation needs to know of each image, found by Dask's workers: a row for each, and records of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..evaluate.classification import Judged
from ..evaluate.labelled import Labelled
from ..evaluate.masked_modeling import Predicted
from ..evaluate.reading import Measured
from ..evaluate.segmentation import Segmented
from .extra import needed


class Columns(NamedTuple):
    """How the records of a task are kept: {column: type}, the row of a record, and the record of a row."""

    types: Callable[[Any], dict[str, Any]]  # of pyarrow
    row: Callable[[Any], dict[str, Any]]
    record: Callable[[dict[str, Any]], Any]


JUDGED = Columns(
    lambda pa: {"label": pa.int32(), "rank": pa.int32(), "loss": pa.float64(), "predicted": pa.int32(),
                "probability": pa.float64()},
    lambda one: {"file": one.image.path, "label": one.image.label, "rank": one.rank, "loss": one.loss,
                 "predicted": one.predicted, "probability": one.probability},
    lambda row: Judged(Labelled(row["file"], row["label"]), row["rank"], row["loss"], row["predicted"],
                       row["probability"]),
)  # fmt: skip
SEGMENTED = Columns(
    lambda pa: {name: pa.list_(pa.int64()) for name in ("true", "predicted", "pixels")},
    lambda one: {"file": one.path, **dict(zip(("true", "predicted", "pixels"), zip(*one.entries)))},
    lambda row: Segmented(row["file"], tuple(zip(*(row[name] or () for name in ("true", "predicted", "pixels"))))),
)
PREDICTED = Columns(
    lambda pa: {"loss": pa.float64(), "right": pa.int32(), "masked": pa.int32(), "mask": pa.list_(pa.bool_())},
    lambda one: {"file": one.path, "loss": one.loss, "right": one.right, "masked": one.masked,
                 "mask": one.mask.tolist()},
    lambda row: Predicted(row["file"], row["loss"], row["right"], row["masked"], np.array(row["mask"], bool)),
)  # fmt: skip


@dataclass
class Measure:
    """The evaluation of a model: `measure` finds a record of each image, which is kept in `columns`.

    `facts` are what the result depends on; `backend` is the model's.
    """

    measure: Callable[[Sequence[Any]], Measured[Any]]
    columns: Columns
    facts: dict[str, Any]
    backend: str

    def settings(self) -> dict[str, Any]:
        """What the results depend on, for the manifest."""
        return {"command": "evaluate", "backend": self.backend, **self.facts}

    def table(self, images: Sequence[Any]) -> Any:
        """The rows of some images, a pyarrow.Table: first those that could be used, then the others."""
        pa, found = needed("pyarrow"), self.measure(images)
        rows = [self.columns.row(one) for one in found.records]
        rows += [{"file": path, "error": sentence} for path, sentence in zip(found.lost, found.left_out)]
        fields = [("file", pa.string()), *self.columns.types(pa).items(), ("error", pa.string())]
        return pa.Table.from_pylist(rows, pa.schema(fields))

    def measured(self, tables: Iterable[Any]) -> Measured[Any]:
        """What the tables of all shards hold, in their order."""
        all_of_them: Measured[Any] = Measured([], [], [])
        for table in tables:
            for row in table.to_pylist():
                if row["error"] is None:
                    all_of_them.records.append(self.columns.record(row))
                else:
                    all_of_them.lost.append(row["file"])
                    all_of_them.left_out.append(row["error"])
        return all_of_them
