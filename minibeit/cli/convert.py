"""`minibeit convert`: converts any checkpoint to a folder in the Hub's layout."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from ..files import check_writable, identity
from ..text import one_line
from .terminal import UsageError, out, progress

MOST_IMAGES = 64  # for calibration; channels hardly grow with more
HELP = "turn a checkpoint of any origin into a folder with config.json and model.safetensors"
EXAMPLES = """\
  minibeit convert beit_base_patch16_224_pt22k_ft22k.pth DIR
  minibeit convert DIR LARGER --image-size 384
  minibeit convert DIR START --task image_classification --num-labels 10
  minibeit convert DIR FAST --prepared
  minibeit convert DIR SMALL --dtype int8 --calibrate photos
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..checkpoint.names import ALIASES, DIALECTS
    from ..checkpoint.save import FILE_DTYPES
    from ..loading_options import RESIZE_METHODS
    from ..task_table import TASKS

    parser.add_argument("source", help="a checkpoint file, a folder, or an id on the Hub")
    parser.add_argument("destination", help="the folder to write; it must be empty or new")
    parser.add_argument(
        "--dialect", choices=[*DIALECTS, *ALIASES], help="which software named the tensors, if it is not recognised"
    )
    parser.add_argument(
        "--task", choices=list(TASKS), help="make a model of this task (a missing head gets random weights)"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="resize to this size: one number, or height and width",
    )
    parser.add_argument(
        "--resize-method", choices=RESIZE_METHODS, default="unilm", help="how to resize (default: %(default)s)"
    )
    parser.add_argument("--num-labels", type=int, metavar="K", help="number of classes of a head with random weights")
    parser.add_argument(
        "--dtype",
        choices=[*FILE_DTYPES, "int8"],
        default="float32",
        help="dtype of the file (default: %(default)s); int8 is for minibeit alone, on any CPU",
    )
    parser.add_argument(
        "--calibrate",
        metavar="FOLDER",
        help="images (up to 64) that tell, for int8, which channels are large; without them the norms' weights do",
    )
    parser.add_argument(
        "--prepared",
        action="store_true",
        help="write prepared.safetensors, the weights as the numba backend packs them for this CPU: the fastest start",
    )
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty")


def run(args: argparse.Namespace) -> int:
    from ..checkpoint.convert import convert
    from ..file_names import PREPARED_NAME, WEIGHTS_NAME

    if args.image_size is not None and len(args.image_size) > 2:
        raise ValueError(f"--image-size: expected one or two numbers, found {len(args.image_size)}")
    image_size = args.image_size if args.image_size is None else args.image_size[0]
    if args.image_size is not None and len(args.image_size) == 2:
        image_size = tuple(args.image_size)
    if args.prepared and args.dtype == "float16":
        raise UsageError("--prepared: packed weights are float32, bfloat16 or int8, so --dtype float16 is not possible")
    if args.calibrate and args.dtype != "int8":
        raise UsageError(f"--calibrate is for --dtype int8, found {args.dtype}")
    images = _calibration_images(args.calibrate) if args.calibrate else []
    packs = args.prepared or args.dtype == "int8"
    _check_destination(args)
    done = convert(
        args.source,
        args.destination,
        task=args.task,
        dialect=args.dialect,
        image_size=image_size,
        resize_method=args.resize_method,
        dtype="float32" if packs else args.dtype,
        force=args.force,
        finish=partial(_prepare, args.dtype, not args.prepared, images) if packs else None,
        **({} if args.num_labels is None else {"num_labels": args.num_labels}),
    )
    for sentence in done.notes:
        out(one_line(sentence))
    if args.dtype == "int8":
        out("the weights of the blocks are int8: load them with --dtype int8 (dtype='int8' in Python)")
    if packs and (done.folder / WEIGHTS_NAME).exists():
        out(f"{done.folder} also holds {WEIGHTS_NAME}, which comes first; name {PREPARED_NAME} to use that")
    out(f"{done.folder}: {done.config.architectures[0] if done.config.architectures else done.task}")
    return 0


def _check_destination(args: argparse.Namespace) -> None:
    """Raises UsageError or OSError, before any work, if the result could not be written or would overwrite data."""
    source, destination = Path(args.source), Path(args.destination)
    same = identity(destination) in {identity(source), identity(source.parent) if source.is_file() else None}
    changed = args.image_size or args.task or args.num_labels
    if same and args.force and (changed or not (args.prepared or args.dtype == "int8")):
        raise UsageError(
            f"{destination}: holds the checkpoint that is read, which would be lost; choose another folder"
        )
    check_writable(destination / "config.json" if destination.is_dir() else destination)


def _calibration_images(folder: str) -> list[str]:
    """Images of the folder, spread evenly over it.  Raises ValueError if there are none."""
    from ..runs.found import find_images

    found = [entry.source for entry in find_images([folder], recursive=True) if entry.error is None]
    if not found:
        raise ValueError(f"--calibrate {folder}: expected a folder of images, found none in it")
    return [found[i * len(found) // MOST_IMAGES] for i in range(MOST_IMAGES)] if len(found) > MOST_IMAGES else found


def _prepare(dtype: str, portable: bool, images: list[str], folder: Path, task: str) -> None:
    """Replaces the weights in `folder` by prepared ones, or by portable ones of low precision."""
    from ..file_names import WEIGHTS_NAME
    from ..tasks import task_class

    model_class = task_class(task)
    spans = None
    if images:
        from ..images.ahead import read_ahead
        from ..tasks.calibration import channel_spans
        from .loading import load_processor

        model = model_class.from_pretrained(folder, backend="numba")
        processor = load_processor(str(folder), model.config)
        pixels = (inputs.pixel_values for inputs in read_ahead(images, processor))
        spans = channel_spans(model, progress(pixels, len(images), quiet=False))
        del model
    model = model_class.from_pretrained(folder, backend="numba", dtype=dtype)
    model.save_prepared(folder, portable=portable, spans=spans)
    (folder / WEIGHTS_NAME).unlink()
