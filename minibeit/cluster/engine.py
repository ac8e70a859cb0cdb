"""Shards of images through Dask: submitted as workers become free, kept once finished, tried again when one dies."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from .. import __version__
from ..images.ahead import read_ahead
from ..machine import usable_cpus
from ..places import is_address
from .extra import needed
from .folder import Folder
from .places import find

LOCAL = "local"
SHARD_SIZE = 256  # images
RETRIES = 2  # of a shard that an error ended; one whose worker died is tried again as Dask's `allowed-failures` says
LEAST_WAITING = 64  # shards that the scheduler knows at a time, so that a cluster without workers yet asks for some
WAITING = 4  # times the threads of all workers, if that is more
CONNECTING, JOINING = 30, 300  # seconds until an unreachable scheduler, and a cluster without workers, is an error
REFRESH = 10.0  # seconds after which the threads of the cluster are counted anew


@dataclass
class Summary:
    """What a run did: images and shards of all runs into the folder, those `kept` from earlier ones included.

    `failed` are sentences about shards that no worker could finish; the next run tries them again.
    """

    images: int = 0
    broken: int = 0
    shards: int = 0
    kept: int = 0
    computed: int = 0
    seconds: float = 0.0
    failed: list[str] = field(default_factory=list)

    def sentence(self) -> str:
        """In one line."""
        kept = f" ({self.kept} of them finished before)" if self.kept else ""
        broken = f", {self.broken} of them could not be used" if self.broken else ""
        rate = self.computed / max(self.seconds, 1e-9)
        return (
            f"{self.images} images in {self.shards} shards{kept}{broken}; {self.computed} images in this run, "
            f"{self.seconds:.1f} s, {rate:.1f} images/s"
        )


def run_on_dask(
    images: Any,
    work: Any,
    output: str | os.PathLike[str],
    *,
    dask: Any = LOCAL,
    workers: int | None = None,
    threads: int = 1,
    shard_size: int = SHARD_SIZE,
    tell: Callable[[int], None] = lambda images: None,
) -> Summary:
    """Computes `work` on images and writes a Parquet file for each shard into the folder (or at the address) `output`.

    `images` is a list of what `work` takes, for `Classify` and `Features` paths or addresses of images, in shards of
    `shard_size`; or a word that `find` makes such a list of; or a Dask bag, each of whose partitions is a shard.
    `dask` is the address of a scheduler, the file in which it stands, a `distributed.Client`, or "local" for `workers`
    processes of `threads` threads on this machine (by default one thread on each core).  Every thread of a worker
    computes a shard of its own.  Finished shards are kept: a second run with the same images, work and output computes
    those that are missing.
    `tell` gets the number of images of each shard as it is finished, those of kept ones too.

    Raises ValueError for an output with shards of other work, OSError for a cluster that cannot be reached, and
    whatever stops the work itself, such as CheckpointError where a worker does not have the model's file.
    """
    started, where = time.monotonic(), os.fspath(output)
    folder = Folder(where if is_address(where) else os.path.abspath(where))
    if isinstance(images, (str, os.PathLike)):
        images = find([os.fspath(images)])
    bag = hasattr(images, "to_delayed")
    manifest = {"work": work.settings(), "images": _identity(images, bag), "minibeit": __version__}
    if not bag:
        manifest["shard size"] = shard_size
        images = list(images)
    kept = folder.prepare(manifest)
    summary = Summary(shards=images.npartitions if bag else -(-len(images) // shard_size), kept=len(kept))
    for table in read_ahead(sorted(kept), lambda number: folder.read(number, ["error"])):
        _count(summary, len(table), len(table) - table["error"].null_count, tell)
    if len(kept) < summary.shards:
        with _connected(dask, workers, threads) as client, _held(client, work, folder) as name:
            if bag:
                futures = _partitions(client, name, images, kept)
            else:
                futures = _shards(client, name, images, shard_size, kept)
            _gather(futures, summary, tell)
    summary.seconds = time.monotonic() - started
    return summary


# Parts of a run -------------------------------------------------------------------------------------------------------


def _identity(images: Any, bag: bool) -> dict[str, Any]:
    """What tells one list of images from another."""
    if bag:
        return {"bag": images.name, "partitions": images.npartitions}
    digest = hashlib.sha256()
    for image in images:
        digest.update(repr(image).encode("utf-8", "backslashreplace") + b"\n")
    return {"count": len(images), "sha256": digest.hexdigest()}


def _count(summary: Summary, images: int, broken: int, tell: Callable[[int], None]) -> None:
    summary.images += images
    summary.broken += broken
    tell(images)


@contextmanager
def _held(client: Any, work: Any, folder: Folder) -> Iterator[str]:
    """The name under which every worker, of now and later, has the work."""
    from .worker import Holder, version

    name = f"minibeit-{uuid4().hex}"
    found = set(_asked(client, version).values())
    if found != {__version__}:
        raise ValueError(
            f"the workers have minibeit {', '.join(sorted(found))}, expected {__version__}, which is here; install the "
            "same version everywhere"
        )
    client.register_plugin(Holder(needed("cloudpickle").dumps(work), str(folder.place)), name=name)
    try:
        yield name
    finally:
        with suppress(Exception):  # of a cluster that has gone; the error to show is another one
            client.unregister_worker_plugin(name)


def _asked(client: Any, function: Callable[[], str]) -> dict[str, str]:
    try:
        return dict(client.run(function))
    except ModuleNotFoundError as error:
        raise ImportError(f'the workers lack {error.name}; install "minibeit[cluster]" there as it is here') from None


def _shards(client: Any, name: str, images: Sequence[Any], size: int, kept: set[int]) -> Iterator[tuple[str, Any]]:
    """(what it is, finished future) of every shard that is missing, a limited number submitted at a time."""
    from distributed import as_completed

    from .worker import compute_shard

    missing = iter(number for number in range(-(-len(images) // size)) if number not in kept)
    waiting = as_completed(loop=client.loop)
    names: dict[str, str] = {}
    most, counted = 0, -REFRESH
    while True:
        if time.monotonic() - counted > REFRESH:
            most, counted = max(LEAST_WAITING, WAITING * sum(client.nthreads().values())), time.monotonic()
        while len(names) < most and (number := next(missing, None)) is not None:
            items = images[number * size : (number + 1) * size]
            future = client.submit(
                compute_shard, name, number, items, key=f"{name}-{number}", pure=False, retries=RETRIES
            )
            names[future.key] = f"shard {number} (images {number * size + 1} to {number * size + len(items)})"
            waiting.add(future)
        if not names:
            return
        future = next(waiting)
        yield names.pop(future.key), future


def _partitions(client: Any, name: str, bag: Any, kept: set[int]) -> Iterator[tuple[str, Any]]:
    """(what it is, finished future) of every partition that is missing, all submitted at once."""
    from distributed import as_completed

    from .worker import compute_shard

    delayed = needed("dask").delayed(compute_shard, pure=False)
    parts = [(number, part) for number, part in enumerate(bag.to_delayed()) if number not in kept]
    futures = client.compute([delayed(name, number, part) for number, part in parts], retries=RETRIES)
    names = {future.key: f"partition {number}" for future, (number, _) in zip(futures, parts)}
    for future in as_completed(futures, loop=client.loop):
        yield names[future.key], future


def _gather(finished: Iterable[tuple[str, Any]], summary: Summary, tell: Callable[[int], None]) -> None:
    """Counts what is finished.  A shard that killed its workers is noted; any other error ends the run.

    Dask blames all that a dead worker had been given, so that each of them is tried once more when it is alone.
    """
    killed, suspects = needed("distributed").KilledWorker, []

    def counted(future: Any) -> None:
        images, broken = future.result()
        summary.computed += images
        _count(summary, images, broken, tell)

    for what, future in finished:
        try:
            counted(future)
        except killed:
            suspects.append((what, future))
    for what, future in suspects:
        future.retry()
        try:
            counted(future)
        except killed as error:
            summary.failed.append(f"{what}: {error.allowed_failures + 1} workers died of it, one after another")


# The cluster ----------------------------------------------------------------------------------------------------------


@contextmanager
def _connected(dask: Any, workers: int | None, threads: int) -> Iterator[Any]:
    """A client of the scheduler `dask` with at least one worker."""
    distributed = needed("distributed")
    if isinstance(dask, distributed.Client):
        yield dask
        return
    if dask == LOCAL:
        with _local(distributed, workers, threads) as cluster, _client(distributed, address=cluster) as client:
            yield client
        return
    try:
        client = _client(distributed, **{"scheduler_file" if os.path.isfile(dask) else "address": dask})
    except (OSError, ValueError) as error:
        raise OSError(f"{dask}: no Dask scheduler can be reached there ({error})") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=JOINING)
        except TimeoutError:
            raise OSError(f"{dask}: no worker has joined the scheduler within {JOINING} seconds") from None
        yield client


def _client(distributed: Any, **place: Any) -> Any:
    return distributed.Client(**place, timeout=CONNECTING, set_as_default=False)


def _local(distributed: Any, workers: int | None, threads: int) -> Any:
    """Processes on this machine, each started anew when it dies."""
    return distributed.LocalCluster(
        n_workers=workers or max(1, usable_cpus() // threads),
        threads_per_worker=threads,
        processes=True,
        dashboard_address=":0",
        silence_logs=logging.CRITICAL,
        preload=["minibeit.cluster.worker"],
    )
