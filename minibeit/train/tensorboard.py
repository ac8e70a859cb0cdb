"""Events for TensorBoard, written by tensorboardX."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def events(folder: str | os.PathLike[str]) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A `record` for `Trainer` that writes each number as a scalar of that name into `folder`.

    Raises ImportError, naming the extra, if tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ImportError('events need tensorboardX: pip install "minibeit[tensorboard]"') from None
    with SummaryWriter(os.fspath(folder)) as writer:

        def record(step: int, numbers: dict[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        yield record
