"""Refuses a checkpoint without the head of a task: a head drawn at random would give random answers."""

from __future__ import annotations

import os

from ..errors import CheckpointError
from ..loading_options import Loading
from ..task_table import in_words
from .load import listed, match_names, open_checkpoint
from .packed_file import prepared_file


def check_head(model: str | os.PathLike[str], task: str, loading: Loading | None = None) -> None:
    """Raises CheckpointError for a checkpoint that lacks tensors of `task`."""
    if prepared_file(model):
        return  # loading refuses missing tensors, so no weights are random
    checkpoint = open_checkpoint(model, loading=loading)
    missing = match_names(checkpoint.tensors, checkpoint.config, task, checkpoint.naming).missing
    if not missing:
        return
    if checkpoint.task not in (None, task):
        raise CheckpointError(
            f"{model}: this needs a checkpoint of {in_words(task)}, the given one was made for "
            f"{in_words(str(checkpoint.task))}"
        )
    raise CheckpointError(
        f"{model}: {len(missing)} tensors that {in_words(task)} needs are missing: {listed(missing.values())}; "
        "`minibeit inspect` shows what is there"
    )
