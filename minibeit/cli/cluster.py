"""The options that send a command's work to Dask, and the run that they ask for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..places import is_address, place
from ..runs.found import Found, find_images
from .terminal import UsageError, counter, note, out, positive

if TYPE_CHECKING:
    from ..cluster.engine import Summary
    from ..cluster.evaluation import Columns
    from ..evaluate.reading import Measured

FEW = 5  # sentences that are printed of many
OPTIONS = ("workers", "threads", "shard_size", "output")  # which mean nothing without --dask


def add_cluster_arguments(parser: argparse.ArgumentParser, workers: bool = True) -> None:
    """--dask and what goes with it; `workers`: --workers too, which some commands have already."""
    group = parser.add_argument_group(
        "many images, on many machines",
        "With --dask images may also be at addresses (s3://, gs://, hf://, https://, ...)\n"
        "and in .txt lists; results go to Parquet files in the folder --output, and a run\n"
        "that was stopped goes on where it was.  Needs the extra \"cluster\"."
        + ("" if workers else "\nWith --dask local, --workers are processes (default: one a core)."),
    )  # fmt: skip
    group.add_argument(
        "--dask", metavar="ADDRESS", help="a scheduler, such as tcp://host:8786, or 'local' for workers here"
    )
    if workers:
        group.add_argument(
            "--workers", type=positive, metavar="N", help="processes, with --dask local (default: one a core)"
        )
    group.add_argument("--threads", type=positive, metavar="N", help="of each process, with --dask local (default 1)")
    group.add_argument("--shard-size", type=positive, metavar="N", help="images in a shard, with --dask (default 256)")


def check_cluster_options(
    args: argparse.Namespace, printing: Sequence[str] = (), options: Sequence[str] = OPTIONS
) -> None:
    """Raises UsageError for options that do not go together, and makes the path of --output absolute.

    `printing` are options that say how results are printed, `options` those that mean nothing without --dask.
    """
    if args.dask is None:
        given = [name for name in options if getattr(args, name) is not None]
        if given:
            raise UsageError(f"--{given[0].replace('_', '-')} goes with --dask, which is not given")
        return
    from ..cluster import LOCAL
    from ..cluster.extra import needed

    for library in ("distributed", "pyarrow", "fsspec"):
        needed(library)
    if args.output is None:
        raise UsageError("--dask needs --output FOLDER, where all workers can write")
    if args.dask != LOCAL and (args.workers or args.threads):
        raise UsageError("--workers and --threads are for --dask local; this cluster has workers of its own")
    said = [name for name in printing if getattr(args, name)]
    if said:
        raise UsageError(f"--{said[0]} says how results are printed; with --dask they are in Parquet files")
    if is_address(args.output):
        return
    if os.path.exists(args.output) and not os.path.isdir(args.output):
        raise UsageError(f"--output: {args.output} is a file, expected a folder")
    args.output = os.path.abspath(args.output)


def named_images(args: argparse.Namespace) -> list[Found]:
    """The images that the arguments name, with --dask also by addresses and in lists."""
    if args.dask is None:
        return find_images(args.images, args.recursive)
    from ..cluster import find

    return [Found(place) for place in find(args.images, args.recursive)]


def named_place(args: argparse.Namespace, word: str) -> Path:
    """The path or the address of data, with --dask one that workers in other folders understand."""
    return place(word if args.dask is None or is_address(word) else os.path.abspath(word))


def run_shards(args: argparse.Namespace, work: Any, images: Sequence[Any], output: str) -> Summary:
    """Computes `work` on the cluster of --dask, with a progress bar; the shards go to `output`."""
    from ..cluster import SHARD_SIZE, run_on_dask

    with counter(len(images), args.quiet) as tell:
        summary = run_on_dask(
            images,
            work,
            output,
            dask=args.dask,
            workers=args.workers,
            threads=args.threads or 1,
            shard_size=args.shard_size or SHARD_SIZE,
            tell=tell,
        )
    return summary


def measured_on_dask(
    args: argparse.Namespace,
    measure: Callable[[Sequence[Any]], Measured[Any]],
    columns: Columns,
    model: Any,
    depends: Mapping[str, Any],
    images: Sequence[Any],
) -> tuple[Measured[Any], float]:
    """(what workers `measure` of all images, the seconds that it took).  Raises ValueError if a shard is missing.

    `depends` is what the result depends on, beside the model: shards that were made otherwise are refused.
    """
    from ..cluster.evaluation import Measure
    from ..cluster.folder import Folder
    from ..cluster.works import fingerprint

    work = Measure(measure, columns, {**depends, "model": fingerprint(model)}, model.ops.backend)
    summary = run_shards(args, work, images, args.output)
    if summary.failed:
        raise ValueError(f"{summary.failed[0]}; without it there are no figures, and the same command tries it again")
    if not args.quiet:
        note(f"{args.output}: {summary.sentence()}")
    folder = Folder(args.output)
    return work.measured(folder.read(number) for number in range(summary.shards)), summary.seconds


def run_command(args: argparse.Namespace, work: Any, images: Sequence[Any], within: str = "") -> int:
    """The whole of a command with --dask; its exit code.  The shards go to --output, or to the folder `within` it."""
    summary = run_shards(args, work, images, str(place(args.output) / within))
    out(f"{args.output}: {summary.sentence()}")
    for sentence in summary.failed[:FEW]:
        note(sentence)
    if summary.failed:
        note(f"{len(summary.failed)} shards could not be finished; the same command tries them again")
    if summary.broken and not args.quiet:
        note(f"{summary.broken} images could not be used: column error of their rows says why")
    return 1 if summary.broken or summary.failed else 0
