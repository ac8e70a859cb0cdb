"""`minibeit classify`: the most probable labels of images."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.found import Found
from ..runs.results import Result, predictions
from ..text import shown_name
from .cluster import add_cluster_arguments, check_cluster_options, named_images, run_command
from .inputs import add_image_arguments, run_batches
from .loading import add_draft_argument, add_model_arguments, load_model, load_processor, shipped_checkpoint
from .terminal import UsageError, note, out, positive, print_csv_line, print_json_line, print_json_list

if TYPE_CHECKING:
    from ..config import BeitConfig

HELP = "classify images: print the most probable labels"
DESCRIPTION = """\
Prints the labels with the highest scores for each image, in the order of the images.

A score is a probability: softmax over the classes, or in multi-label models the sigmoid of each class.  For regression
it is the predicted number.  Images that cannot be read are named on stderr and skipped; the exit code is then 1.
With --dask the labels are written to Parquet files instead.
"""
EXAMPLES = """\
  minibeit classify photo.jpg --model microsoft/beit-base-patch16-224
  minibeit classify holiday/ --recursive --model DIR --csv > holiday.csv
  minibeit classify 'shots/**/*.png' --model DIR --jsonl --top-k 1
  curl -s https://example.org/photo.jpg | minibeit classify - --model DIR
  minibeit classify cells/ --model DIR --labels names.txt
  minibeit classify s3://bucket/photos/ --model DIR --dask tcp://scheduler:8786 --output labels/
"""
SHIPPED = (
    "without --model the included model is used, which knows only handwritten digits; choose another, such as "
    "--model microsoft/beit-base-patch16-224"
)
COLUMNS = ("file", "rank", "label", "index", "score", "logit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    add_model_arguments(
        parser, "a checkpoint fine-tuned for classification (default: the shipped model of handwritten digits)"
    )
    parser.add_argument("-k", "--top-k", type=positive, default=5, metavar="K", help="labels per image (default 5)")
    parser.add_argument(
        "-b", "--batch-size", type=positive, default=8, metavar="B", help="images per batch (default 8)"
    )
    add_draft_argument(parser)
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="names of the classes: one per line in the order of the outputs, or JSON (a list, or {number: name})",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a JSON array of {file, predictions}, in full precision")
    form.add_argument("--jsonl", action="store_true", help="the same as JSON Lines, one object per image")
    form.add_argument("--csv", action="store_true", help=f"a CSV table: {', '.join(COLUMNS)}")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="with --dask: folder or address of the results")
    add_cluster_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..tasks.image_classification import BeitForImageClassification

    check_cluster_options(args, printing=("json", "jsonl", "csv"))
    if args.model is None:
        args.model = str(shipped_checkpoint())
        if not args.quiet:
            note(SHIPPED)
    names = None if args.labels is None else given_names(Path(args.labels))
    found = named_images(args)
    model = load_model(BeitForImageClassification, args)
    if names is None:
        names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    elif len(names) != model.config.num_labels:
        raise UsageError(
            f"--labels {args.labels}: expected {model.config.num_labels} names, one for each output of the model, "
            f"found {len(names)}"
        )
    processor = load_processor(args.model, model.config, args.quiet)
    processor.draft = processor.draft or args.draft
    if args.dask is not None:
        from ..cluster import Classify

        work = Classify(model, processor, args.batch_size, args.top_k, names)
        return run_command(args, work, [entry.file for entry in found])
    results = run_batches(found, processor, lambda pixels: model(pixels).logits, args.batch_size, args.quiet)
    errors: list[str] = []
    rows = (_row(result, model.config, names, args.top_k, errors) for result in results)
    if args.json:
        print_json_list(rows)
    elif args.jsonl:
        for row in rows:
            print_json_line(row)
    elif args.csv:
        _print_csv(rows)
    else:
        _print_table(rows, found, model.config)
    return 1 if errors else 0


def given_names(path: Path) -> list[str]:
    """The class names in a file, in the order of the outputs.  Raises UsageError for a file of another format."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text) if text.lstrip()[:1] in ("[", "{") else text.splitlines()
        if isinstance(values, dict):
            by_number = {int(key): value for key, value in values.items()}
            values = [by_number[i] for i in range(len(by_number))]
    except KeyError as error:
        raise UsageError(f"--labels {path}: expected names for 0, 1, 2, ..., found none for {error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--labels {path}: expected a name per line or JSON, found neither ({error})") from None
    while values and values[-1] == "":
        values.pop()
    if not all(isinstance(value, str) for value in values):
        raise UsageError(f"--labels {path}: expected names of classes as text, found other values among them")
    return values


def _row(result: Result, config: BeitConfig, names: list[str], top_k: int, errors: list[str]) -> dict[str, Any]:
    if result.error is not None:
        errors.append(result.error)
        return {"file": result.file, "error": result.error}
    return {"file": result.file, "predictions": predictions(result.value, config.problem_type, names, top_k)}


def _print_csv(rows: Iterable[dict[str, Any]]) -> None:
    print_csv_line(COLUMNS)
    for row in rows:
        for rank, prediction in enumerate(row.get("predictions", ()), 1):
            print_csv_line((row["file"], rank, *prediction.values()))


def _print_table(rows: Iterable[dict[str, Any]], found: list[Found], config: BeitConfig) -> None:
    from ..scores import is_regression

    width = max(len("image"), *(len(shown_name(entry.file)) for entry in found if entry.error is None), 0)
    regression = is_regression(config.problem_type, config.num_labels)
    heading = f"{'image':{width}}  {'value' if regression else 'probability':>11}  label"
    for row in rows:
        if heading and "error" not in row:
            out(heading)
            heading = ""
        for file, score, label in _cells(row, regression):
            out(f"{file:{width}}  {score:>11}  {label}")


def _cells(row: dict[str, Any], regression: bool) -> Iterator[tuple[str, str, str]]:
    """The lines for one image; only the first shows its name."""
    for rank, prediction in enumerate(row.get("predictions", ())):
        score = prediction["score"]
        yield (
            shown_name(row["file"]) if rank == 0 else "",
            f"{score:.6g}" if regression else f"{score:.2%}",
            shown_name(prediction["label"]),
        )
