"""What a model says of each of many images, or why it says nothing: read ahead, computed in batches, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..text import one_line
from .found import STDIN, STDIN_NAME, Found

if TYPE_CHECKING:
    import numpy as np

SHARD_READERS = 1  # threads that read ahead for a shard on Dask, since each thread of a worker has a shard


class Result(NamedTuple):
    """The outcome for one file: a value, or the reason why there is none."""

    file: str
    value: Any = None
    error: str | None = None


def results_of(
    found: Iterable[Found],
    processor: Any,
    compute: Callable[[np.ndarray], np.ndarray],
    batch_size: int,
    workers: int | None = None,
) -> Iterator[Result]:
    """The value of `compute`, or why there is none, for every file in their order.

    `compute` takes pixel values (B, C, H, W) and gives a value for each image.
    `workers` threads read the images of the next batches while it computes.  Images of different shapes do not share a
    batch.
    """
    from ..images.ahead import computed

    def read(entry: Found) -> np.ndarray:
        if entry.error is not None:
            raise ValueError(entry.error)
        try:
            return processor(entry.source).pixel_values[0]
        except ValueError as error:
            raise ValueError(entry.named(str(error))) from None

    for entry, value in computed(found, read, lambda pixels: check_finite(compute(pixels)), batch_size, workers):
        yield unusable(entry.file, value) if isinstance(value, ValueError) else Result(entry.file, value)


def unusable(file: str, error: Exception | str) -> Result:
    """The result for a file that could not be used: one line, which names it."""
    message = one_line(error)
    if one_line(STDIN_NAME if file == STDIN else file) not in message:
        message = f"{one_line(file)}: {message}"
    return Result(file, error=message)


def check_finite(values: np.ndarray) -> np.ndarray:
    """A model's outputs, unchanged.  Raises CheckpointError for NaNs, since the pixels were checked before."""
    import numpy as np

    from ..errors import CheckpointError

    if not np.isfinite(values).all():
        raise CheckpointError("the model computes NaN or infinite values, so its checkpoint must be damaged")
    return values


def predictions(
    logits: np.ndarray, problem: str | None, names: Sequence[str], top_k: int
) -> list[dict[str, Any]]:  # (K,)
    """Label, index, score and logit of the `top_k` classes with the highest scores, the highest first."""
    import numpy as np

    from ..scores import scores

    values = scores(logits, problem)
    best = np.argsort(-values, kind="stable")[:top_k]
    return [
        {"label": names[int(i)], "index": int(i), "score": float(values[i]), "logit": float(logits[i])} for i in best
    ]


def pooled(states: np.ndarray, pool: str) -> np.ndarray:  # (B, N, D) -> (B, D) or (B, N, D)
    """One vector per image, or all tokens with "none"."""
    if pool == "cls":
        return states[:, 0]
    return states[:, 1:].mean(axis=1) if pool == "mean" else states
