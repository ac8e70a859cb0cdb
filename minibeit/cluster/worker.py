"""What runs in Dask's workers: a run's work, loaded once in each process, and the shards that it computes."""

from __future__ import annotations

import pickle
import signal
import threading
from collections.abc import Sequence
from typing import Any

from distributed import WorkerPlugin, get_worker

from ..ops import get_ops
from .folder import Folder


class Holder(WorkerPlugin):
    """Keeps one work, pickled, in every worker process, those that come later included.

    It is unpickled at the first shard and shared by the threads of the process.  Of a model whose weights are mapped
    from a file the pickle holds the file's name (see `checkpoint.travel`).
    """

    def __init__(self, pickled: bytes, place: str) -> None:
        self.pickled, self.place = pickled, place

    def setup(self, worker: Any) -> None:
        """Called by Dask in the worker."""
        self.lock, self.loaded = threading.Lock(), None

    def work(self) -> Any:
        """The work.  Raises what its loading raises, such as CheckpointError for a file that is not on this host."""
        with self.lock:
            if self.loaded is None:
                self.loaded = pickle.loads(self.pickled)
            return self.loaded


def compute_shard(name: str, number: int, items: Sequence[Any]) -> tuple[int, int]:
    """Computes the work `name` on items and writes a shard; how many rows it has, and how many of them are errors.

    One thread of the worker computes: as many shards are computed at a time as the worker has threads.  Dask asks again
    for what a worker had finished before it died: a shard that is there is only counted.
    """
    holder: Holder = get_worker().plugins[name]  # which a worker has before it is given shards
    folder = Folder(holder.place)
    if folder.has(number):
        table = folder.read(number, ["error"])
    else:
        work = holder.work()
        with get_ops(work.backend).num_threads(1):
            table = work.table(list(items))
        folder.write(number, table)
    return len(table), len(table) - table["error"].null_count


def dask_setup(worker: Any) -> None:
    """Called by Dask in a worker of this machine as it starts: on Ctrl-C the program that started it ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def version() -> str:
    """The worker's version of minibeit."""
    from .. import __version__

    return __version__
