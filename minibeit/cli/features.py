"""`minibeit features`: hidden states of images as arrays in a file."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.results import Result, pooled
from .cluster import add_cluster_arguments, check_cluster_options, named_images, run_command
from .inputs import add_image_arguments, check_output, failed, run_batches
from .loading import add_draft_argument, add_model_arguments, config_of, load_processor
from .terminal import UsageError, note, out, positive

if TYPE_CHECKING:
    import numpy as np

HELP = "write hidden states of images to a file"
DESCRIPTION = """\
Writes the output of a layer of the encoder, for search, clustering or a classifier of your own.

The file holds `features`, one row per image in the order of the images: (n, D), or with --pool none (n, N, D) with the
CLS token first.  An .npz file also has `files`, `layer`, `pool` and `model`; a .safetensors file has them as metadata,
`files` as a JSON list.  Images that cannot be read are named on stderr and have no row; the exit code is then 1.
With --dask the output is a folder of Parquet files, where such images have a row that says why.
"""
EXAMPLES = """\
  minibeit features photos/ --model microsoft/beit-base-patch16-224-pt22k --output features.npz
  minibeit features photos/ --model DIR --layer 8 --pool cls --output features.safetensors
  minibeit features s3://bucket/photos/ --model DIR --dask tcp://scheduler:8786 --output features/
"""
POOLS = ("mean", "cls", "none")
SUFFIXES = (".safetensors", ".npz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    add_model_arguments(parser, "a checkpoint of any task, such as microsoft/beit-base-patch16-224-pt22k")
    parser.add_argument(
        "-o", "--output", metavar="FILE", required=True,
        help="file to write: .safetensors or .npz; with --dask a folder, or its address",
    )  # fmt: skip
    parser.add_argument(
        "--layer",
        type=int,
        default=-1,
        metavar="I",
        help="0 for the embeddings, i for the output of block i, negative from the end (default -1: the last); "
        "hidden states are taken as they leave the block, before any final norm",
    )
    parser.add_argument(
        "--pool", choices=POOLS, default="mean", help="mean of the patches (default), CLS token, or all tokens"
    )
    parser.add_argument(
        "-b", "--batch-size", type=positive, default=8, metavar="B", help="images per batch (default 8)"
    )
    add_draft_argument(parser)
    add_cluster_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..tasks.backbone import BeitBackbone

    check_cluster_options(args, options=("workers", "threads", "shard_size"))
    output = Path(args.output)
    if args.dask is None and output.suffix not in SUFFIXES:
        raise UsageError(f"--output: expected a file name ending in {' or '.join(SUFFIXES)}, found {args.output}")
    if not args.model:
        raise UsageError("features needs a checkpoint, of any task; name it with --model")
    found = named_images(args)
    if args.dask is None:
        check_output(output, [entry.file for entry in found], args.model)
    depth = config_of(args.model).num_hidden_layers
    if not -depth - 1 <= args.layer <= depth:
        raise UsageError(f"--layer: the model has hidden states 0 to {depth}, found {args.layer}")
    layer = args.layer % (depth + 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*another task's head are not used")  # features need no head
        model = BeitBackbone.from_pretrained(
            args.model,
            local_files_only=True,  # `config_of` has fetched it
            dtype=args.dtype,
            backend=args.backend,
            device=args.device,
            out_indices=(layer,),
            add_fpn=False,
            reshape_hidden_states=False,
        )
    processor = load_processor(args.model, model.config, args.quiet)
    processor.draft = processor.draft or args.draft
    if args.dask is not None:
        from ..cluster import Features

        work = Features(model, processor, args.batch_size, args.pool)
        return run_command(args, work, [entry.file for entry in found])

    def compute(pixels: np.ndarray) -> np.ndarray:
        return pooled(model(pixels).feature_maps[0], args.pool)

    files, rows = _collect(run_batches(found, processor, compute, args.batch_size, args.quiet))
    if not rows:
        note(f"error: no image could be used, so {output} was not written")
        return 1
    _write(output, rows, files, {"layer": layer, "pool": args.pool, "model": args.model})
    shape = (len(rows), *rows[0].shape)
    out(f"{output}: features {shape}, hidden state {layer} of {depth}, pool {args.pool}")
    return 0 if len(files) == len(found) else 1


def _collect(results: Iterable[Result]) -> tuple[list[str], list[np.ndarray]]:
    """The files for which features were computed, and the features, all of one shape."""
    files: list[str] = []
    rows: list[np.ndarray] = []
    for result in results:
        if result.error is not None:
            continue
        if rows and result.value.shape != rows[0].shape:
            failed(result.file, f"its features have shape {result.value.shape}, those of {files[0]} {rows[0].shape}")
            continue
        files.append(result.file)
        rows.append(result.value)
    return files, rows


def _write(output: Path, rows: list[np.ndarray], files: list[str], facts: dict[str, Any]) -> None:
    import numpy as np

    from ..checkpoint.formats import write_safetensors
    from ..checkpoint.formats.npz_file import write_npz

    features = np.stack(rows)
    if output.suffix == ".npz":
        write_npz(output, {"features": features, "files": files, **facts})
    else:
        metadata = {"files": json.dumps(files), **{k: str(v) for k, v in facts.items()}}
        write_safetensors(output, {"features": features}, metadata)
