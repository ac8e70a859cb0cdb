"""`minibeit tokenize`: the visual tokens of images, and the images that they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..runs.found import find_images
from ..runs.results import Result
from ..text import shown_name
from .inputs import add_image_arguments, check_output, run_batches
from .loading import add_backend_arguments, check_decoder, load_tokenizer
from .terminal import UsageError, note, out, positive, print_json_list

if TYPE_CHECKING:
    import numpy as np

HELP = "turn images into visual tokens, and back"
DESCRIPTION = """\
Gives every square of an image a visual token, as BEiT's pre-training does with the discrete VAE of DALL-E.

Prints the tokens as a grid or as JSON; --output draws each image, as the tokenizer sees it, beside what its tokens
stand for, which takes a tokenizer with a decoder.  Tokenizers are a folder with DALL-E's encoder.pkl and decoder.pkl
(read as data, nothing in them is run), Flava's codebook, such as facebook/flava-image-codebook, which has no decoder,
or a folder that minibeit wrote.
"""
EXAMPLES = """\
  minibeit tokenize photo.jpg --tokenizer dall-e/ --output tokens.png
  minibeit tokenize photos/ --tokenizer facebook/flava-image-codebook --json > tokens.json
  minibeit tokenize photo.jpg --tokenizer dall-e/ --size 256 --center-crop -o large.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument("-t", "--tokenizer", metavar="DIR|FILE", help="the tokenizer (see above)")
    add_backend_arguments(parser)
    parser.add_argument(
        "--size", type=positive, metavar="PIXELS", help="side that images are resized to (default: 112, or as trained)"
    )
    parser.add_argument(
        "--center-crop", action="store_true", help="resize the shorter side and cut out the middle, not the whole image"
    )
    parser.add_argument("-o", "--output", metavar="PNG", help="draw each image beside what its tokens stand for")
    parser.add_argument("--json", action="store_true", help="print JSON: the tokens of each image, row by row")
    parser.add_argument(
        "-b", "--batch-size", type=positive, default=8, metavar="B", help="images per batch (default 8)"
    )


def run(args: argparse.Namespace) -> int:
    if not args.tokenizer:
        raise UsageError("tokenize needs a tokenizer, such as a folder with DALL-E's files; give it with --tokenizer")
    found = find_images(args.images, args.recursive)
    if args.output:
        if Path(args.output).suffix.lower() != ".png":
            raise UsageError(f"--output: expected a file name ending in .png, found {args.output}")
        check_output(Path(args.output), [entry.file for entry in found], args.tokenizer)
    tokenizer = load_tokenizer(args)
    if args.output:
        check_decoder(tokenizer, args.tokenizer)

    def processor(source: Any) -> SimpleNamespace:
        return SimpleNamespace(pixel_values=tokenizer.preprocess(source, args.size, args.center_crop))

    drawn: list[list[np.ndarray]] = []  # a row for each image that has tokens, as bytes: the pixel values are let go

    def compute(pixels: np.ndarray) -> np.ndarray:
        ids = tokenizer.encode(pixels)
        if args.output:
            drawn.extend(_pair(tokenizer, *one) for one in zip(pixels, ids))
        return ids

    results = list(run_batches(found, processor, compute, args.batch_size, args.quiet))
    good = [result for result in results if result.error is None]
    if args.output and good:
        from ..drawing import save_png
        from .pictures import beside

        save_png(beside(drawn), Path(args.output))
        if not args.json and not args.quiet:
            note(f"drawn in {shown_name(args.output)}: left the image, right what its tokens stand for")
    if args.json:
        print_json_list(map(_row, results))
    else:
        _print_grids(good, tokenizer.pooling)
    return 0 if len(good) == len(results) else 1


def _row(result: Result) -> dict[str, Any]:
    if result.error is not None:
        return {"file": result.file, "error": result.error}
    return {"file": result.file, "grid": list(result.value.shape), "tokens": result.value.tolist()}


def _print_grids(results: Iterable[Result], pooling: int) -> None:
    import numpy as np

    for result in results:
        ids, different = result.value, len(np.unique(result.value))
        width = len(str(ids.max()))
        out(
            f"{shown_name(result.file)}: {ids.shape[0]}x{ids.shape[1]} visual tokens of {pooling}x{pooling} pixels, "
            f"{different} different:"
        )
        for row in ids:
            out("  " + " ".join(str(token).rjust(width) for token in row))


def _pair(tokenizer: Any, pixels: np.ndarray, ids: np.ndarray) -> list[np.ndarray]:  # (C, H, W) -> (H, W, 3) twice
    """What the tokenizer saw of an image, and what it makes of the tokens."""
    from ..evaluate.drawing import levels
    from ..tokenizer.preprocess import unmap_pixels

    return [levels(unmap_pixels(pixels)), levels(tokenizer.decode(ids[None])[0])]
