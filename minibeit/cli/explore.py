"""`minibeit explore`: one image and one model, as a page to look into."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..runs.found import STDIN, STDIN_NAME, Found, from_stdin
from ..text import shown_name
from .inputs import check_output
from .loading import add_model_arguments, load_model, load_processor, load_tokenizer, shipped_checkpoint
from .terminal import StatusLine, UsageError, note, out, positive

HELP = "look into a model: a page of one image, every head, and what masking changes"
DESCRIPTION = """\
Writes one HTML page that needs no network: the image in patches; for the patch that you choose, where every head of
every block looks, with and without the position bias; the bias itself; how far heads look; attention rollout.

What else is there depends on the checkpoint.  Classification: the scores, and what they become when squares of patches
are covered.  Masked image modelling: the visual tokens predicted where patches are hidden, with --tokenizer also the
image's own and what both stand for.  Segmentation: the classes of pixels over the image.
"""
EXAMPLES = """\
  minibeit explore photo.jpg --model microsoft/beit-base-patch16-224 --output photo.html
  minibeit explore photo.jpg --model DIR --mask-side 1 -o photo.html         every patch masked by itself
  minibeit explore photo.jpg --model microsoft/beit-base-patch16-224-pt22k --tokenizer dall-e/ -o photo.html
  minibeit explore digit.png -o digit.html         with the included model of handwritten digits
"""
BARE = "model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="an image file; - for standard input")
    add_model_arguments(parser, "a checkpoint of any task (default: the shipped model of handwritten digits)")
    parser.add_argument("-o", "--output", metavar="HTML", required=True, help="the page to write")
    parser.add_argument("-t", "--tokenizer", metavar="DIR|FILE", help="the tokenizer whose tokens are predicted")
    parser.add_argument(
        "--mask-side",
        type=positive,
        metavar="N",
        help="side of the squares that are masked, in patches: 1 for every patch by itself (default: the least with "
        "which all passes take about ten seconds on two cores)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no notes")


def run(args: argparse.Namespace) -> int:
    from ..errors import ImageError
    from ..explorer.exploration import explore
    from ..files import atomic_write
    from ..tasks import task_class

    output = Path(args.output)
    if output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--output: expected a file name ending in .html, found {args.output}")
    if args.model is None:
        args.model = str(shipped_checkpoint())
    for read in (args.model, args.tokenizer):
        check_output(output, [args.image], read)
    image = from_stdin() if args.image == STDIN else Found(args.image)
    if image.error:
        raise UsageError(image.error)
    task = task_of(args.model)
    if args.tokenizer and task != "masked_image_modeling":
        raise UsageError("--tokenizer: is for checkpoints of masked image modelling, which the given one is not")
    model = load_model(task_class(task), args, fetched=True)
    tokenizer = load_tokenizer(args) if args.tokenizer else None
    processor = load_processor(args.model, model.config, args.quiet)
    names = STDIN_NAME if image.copy else Path(args.image).name, Path(args.model).name
    with StatusLine(args.quiet) as line:
        try:
            found = explore(
                model,
                image.source,
                processor,
                tokenizer,
                mask_side=args.mask_side,
                names=names,
                progress=lambda done, count: line.show(f"masked: {done} of {count}"),
            )
        except ImageError as error:
            raise ImageError(image.named(str(error))) from None
    page = found.html().encode()
    with atomic_write(output) as file:
        file.write(page)
    _report(args, found.facts, len(page))
    return 0


def task_of(model: str) -> str:
    """The task that a checkpoint was made for; the bare encoder where it has no head that is known."""
    from ..checkpoint.load import open_checkpoint
    from ..checkpoint.packed_file import prepared_file, read_prepared

    file = prepared_file(model)
    return (read_prepared(file).task if file else open_checkpoint(model).task) or BARE


def _report(args: argparse.Namespace, facts: dict[str, Any], size: int) -> None:
    out(f"{shown_name(args.output)}: {facts['title']}, {size / 1e6:.1f} MB")
    if args.quiet:
        return
    regions = facts["regions"]
    if regions and regions["side"] > 1:
        side, count = regions["side"], regions["rows"] * regions["columns"]
        note(f"masked in {count} squares of {side}x{side} patches; --mask-side 1 masks every patch by itself")
    if len(facts["blocks"]) < facts["depth"]:
        kept = ", ".join(map(str, facts["blocks"]))
        note(f"of {facts['depth']} blocks, {kept} can be looked into, so that the page stays below 25 MB")
