"""`minibeit segment`: the class of every pixel of images, drawn as images."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_writable
from ..places import Address, is_address, place
from ..runs import marks
from ..runs.found import STDIN, Found
from ..runs.maps import segmented
from ..text import one_line
from .cluster import add_cluster_arguments, check_cluster_options, named_images, run_command
from .inputs import add_image_arguments, check_outputs
from .loading import add_model_arguments, load_model, load_processor
from .terminal import UsageError, note, out, positive, print_json_list, progress, table
from .views import add_view_arguments, config_changes, inference_of, processor_of

if TYPE_CHECKING:
    from ..colours import Colour

HELP = "find the class of every pixel, drawn as images"
DESCRIPTION = """\
Finds the class of every pixel.  For each image NAME it writes to the output folder

  NAME_labels.png    a palette image of the original size whose pixel values are the class numbers
  NAME_legend.png    the colours with the names of the classes and their shares of the area
  NAME_overlay.png   with --overlay, the colours laid over the image
  NAME_figure.png    with --figure, the overlay and the legend in one image
  NAME_scores.npz    with --scores, the model's `logits` (K, h, w), before they are resized

and prints the shares.  A folder holds the results of one model; --overwrite replaces those of another.
Images that cannot be read are named on stderr and skipped; the exit code is then 1.
With --dask the shares are written to Parquet files in the output's shards/, where such images have a row that says
why, and the output may be an address (s3://, ...).
"""
EXAMPLES = """\
  minibeit segment street.jpg --model microsoft/beit-base-finetuned-ade-640-640 --output out --overlay
  minibeit segment street.jpg --model DIR --output out --figure        overlay and legend in one image
  minibeit segment street.jpg --model DIR --output out --slide         as the papers' numbers are made
  minibeit segment street.jpg --model DIR --output out --slide --flip --scales 0.5 0.75 1 1.25 1.5 1.75
  minibeit segment scans/ --model DIR --output out --scores --json
  minibeit segment scans/ --model OTHER --output out --overwrite
  minibeit segment s3://bucket/scans/ --model DIR --dask tcp://scheduler:8786 --output s3://bucket/maps
"""
SHARDS = "shards"  # with --dask, the folder of tables in that of the maps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    add_model_arguments(
        parser, "a checkpoint of semantic segmentation, such as microsoft/beit-base-finetuned-ade-640-640"
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", required=True,
        help="folder to write to, created if necessary; with --dask also an address",
    )  # fmt: skip
    parser.add_argument(
        "--palette",
        choices=["auto", "ade20k"],
        default="auto",
        help="colours of the classes: ade20k, or auto, which takes ADE20K's for its 150 classes and otherwise colours "
        "as distinct as possible (default auto)",
    )
    parser.add_argument("--overlay", action="store_true", help="also draw the colours over the image")
    parser.add_argument("--figure", action="store_true", help="also draw the overlay with the legend beside it")
    parser.add_argument("--scores", action="store_true", help="also write the scores of all classes")
    parser.add_argument("--overwrite", action="store_true", help="remove the results of another model from the folder")
    parser.add_argument("--json", action="store_true", help="print a JSON array instead of tables")
    parser.add_argument("-b", "--batch-size", type=positive, metavar="B", help="windows computed at a time (default 1)")
    add_cluster_arguments(parser)
    add_view_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..tasks.semantic_segmentation import BeitForSemanticSegmentation

    if not args.model:
        raise UsageError("segment needs a checkpoint of semantic segmentation; give it with --model")
    check_cluster_options(args, printing=["json"], options=("workers", "threads", "shard_size"))
    if is_address(args.output) and (args.dask is None or args.overwrite):
        said = "--overwrite removes maps from a folder" if args.overwrite else "without --dask maps go to a folder"
        raise UsageError(f"--output: {said}, found the address {args.output}")
    found = named_images(args)
    folder = place(args.output)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output: {folder} is a file, expected a folder")
    outputs = _output_names(found, args)
    check_outputs([path for paths in outputs for path in paths.values()], [entry.file for entry in found], args.model)
    mark = marks.mark_of(args.model)
    others = _of_others(folder, mark, args.overwrite)
    model = load_model(BeitForSemanticSegmentation, args, fetched=True, **config_changes(args))  # by `mark_of`
    how = inference_of(args, model.config)
    if args.scores and how.views > 1:
        raise UsageError(f"--scores are the logits of one view, the options ask for {how.views} of each image")
    processor = processor_of(args, load_processor(args.model, model.config, args.quiet))
    colours = palette(args.palette, model.config.num_labels)
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
    _remove(others)
    if args.dask is not None:
        from ..cluster import Segment

        names = ({kind: str(path) for kind, path in paths.items()} for paths in outputs)
        images = list(zip((entry.file for entry in found), names))
        return run_command(args, Segment(model, processor, how.batch_size, how, colours, mark), images, SHARDS)
    errors: list[str] = []
    rows = segmented(zip(found, outputs), model, processor, how, colours, mark)
    rows = _noted(progress(rows, len(found), args.quiet), errors)
    if args.json:
        print_json_list(rows)
    else:
        for row in rows:
            _print_table(row)
    return 1 if errors else 0


def palette(name: str, count: int) -> list[Colour]:
    """A colour per class.  Raises UsageError for more classes than ADE20K has colours."""
    from ..colours import ADE20K_CLASSES, class_colours

    if name != "ade20k":
        return class_colours(count)
    if count > ADE20K_CLASSES:
        raise UsageError(f"--palette ade20k has {ADE20K_CLASSES} colours, the model has {count} classes; leave it out")
    return class_colours(ADE20K_CLASSES)[:count]


def _of_others(folder: Path, mark: str, overwrite: bool) -> list[Path]:
    """The label maps of another model in a folder, which are to be removed.

    Raises UsageError if they are not to be overwritten, and for maps at an address that no shards there tell of.
    """
    if isinstance(folder, Address):
        from ..cluster.folder import MANIFEST

        if (folder / SHARDS / MANIFEST).is_file() or not folder.is_dir():
            return []  # the manifest says of which model the maps are
        for entry in folder.iterdir():
            if entry.name.endswith(marks.LABELS):
                raise UsageError(f"{entry}: is a map that this command has not made; choose another --output")
        return []
    check_writable(folder / "labels.png")
    others = marks.of_others(folder, mark)
    if others and not overwrite:
        raise UsageError(
            f"{others[0]}: is the result of another model, {marks.model_in(others[0])}; choose another --output, or "
            f"--overwrite removes its {len(others)} results"
        )
    return others


def _remove(others: list[Path]) -> None:
    """Removes label maps, what was drawn with them, and the shards that tell of them."""
    from ..cluster.folder import Folder

    for folder in {labels.parent for labels in others}:
        Folder(str(folder / SHARDS)).clear()
    for labels in others:
        marks.remove(labels)


def _output_names(found: list[Found], args: argparse.Namespace) -> list[dict[str, Path]]:
    """The files to write for each input; inputs with the same name in several folders get a number."""
    kinds = {"labels": ".png", "legend": ".png"}
    for kind in ("overlay", "figure"):
        if getattr(args, kind):
            kinds[kind] = ".png"
    if args.scores:
        kinds["scores"] = ".npz"
    folder = place(args.output)
    taken: dict[str, int] = {}  # a name and the last number that was given to it
    outputs = []
    for entry in found:
        stem = "stdin" if entry.file == STDIN else Path(entry.file).stem
        name, number = stem, taken.get(stem.lower(), 1)
        while name.lower() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken[stem.lower()] = number
        taken.setdefault(name.lower(), 1)
        outputs.append({kind: folder / f"{name}_{kind}{suffix}" for kind, suffix in kinds.items()})
    return outputs


def _noted(rows: Iterator[dict[str, Any]], errors: list[str]) -> Iterator[dict[str, Any]]:
    """The rows; the errors among them are shown, and added to `errors`."""
    for row in rows:
        if "error" in row:
            note(row["error"])
            errors.append(row["error"])
        yield row


def _print_table(row: dict[str, Any]) -> None:
    if "error" in row:
        return
    from ..drawing import share_text

    kinds = ("labels", "legend", "overlay", "figure", "scores")
    files = ", ".join(str(row[kind]) for kind in kinds if kind in row)
    out(f"{one_line(row['file'])} ({row['width']}x{row['height']}) -> {one_line(files)}")
    rows = [(share_text(c["share"]), str(c["index"]), c["label"]) for c in row["classes"]]
    for line in table([("area", "class", "name"), *rows], right=(0, 1)):
        out("  " + line)
