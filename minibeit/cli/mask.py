"""`minibeit mask`: hide blocks of an image and predict their visual tokens."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.found import STDIN, Found, from_stdin
from ..runs.results import check_finite
from ..text import shown_name
from .inputs import check_output
from .loading import add_model_arguments, check_decoder, load_model, load_processor, load_tokenizer
from .terminal import UsageError, out, print_json

if TYPE_CHECKING:
    import numpy as np

HELP = "hide blocks of an image and predict their visual tokens"
DESCRIPTION = """\
Hides blocks of patches of an image, as in BEiT's pre-training, and predicts the visual token of each hidden patch.

Prints the tokens in the grid of the patches, with a dot for each visible patch; --output draws the image next to what
the model sees of it.  Needs a checkpoint of masked image modelling, such as microsoft/beit-base-patch16-224-pt22k.

With --tokenizer, the one whose tokens the model predicts, it also prints how many hidden tokens are predicted
correctly, and draws a third image: what the predicted tokens, and the image's own where it is visible, stand for.
"""
EXAMPLES = """\
  minibeit mask photo.jpg --model microsoft/beit-base-patch16-224-pt22k --output masked.png
  minibeit mask photo.jpg --model DIR --ratio 0.6 --seed 7 --json
  minibeit mask photo.jpg --model DIR --tokenizer dall-e/ --output guessed.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="an image file; - for standard input")
    add_model_arguments(parser, "a checkpoint of masked image modelling")
    parser.add_argument("-t", "--tokenizer", metavar="DIR|FILE", help="the tokenizer whose tokens are predicted")
    parser.add_argument("--ratio", type=_ratio, default=0.4, help="share of the patches to hide (default 0.4)")
    parser.add_argument(
        "--seed", type=int, default=0, help="for drawing the blocks; the same seed hides the same patches (default 0)"
    )
    parser.add_argument("-o", "--output", metavar="PNG", help="draw the mask")
    parser.add_argument("--json", action="store_true", help="print JSON: tokens with their probabilities")
    parser.add_argument("-q", "--quiet", action="store_true", help="no notes")


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from ..errors import CheckpointError, ImageError
    from ..evaluate.drawing import as_seen
    from ..masking import block_mask
    from ..tasks.masked_image_modeling import BeitForMaskedImageModeling

    if args.seed < 0:
        raise UsageError(f"--seed: expected a number of at least 0, found {args.seed}")
    if not args.model:
        raise UsageError("mask needs a checkpoint of masked image modelling; give it with --model")
    if args.output:
        if Path(args.output).suffix.lower() != ".png":
            raise UsageError(f"--output: expected a file name ending in .png, found {args.output}")
        check_output(Path(args.output), [args.image], args.model)
        if args.tokenizer:
            check_output(Path(args.output), [], args.tokenizer)
    picture = from_stdin() if args.image == STDIN else Found(args.image)
    if picture.error:
        raise UsageError(picture.error)
    model = load_model(BeitForMaskedImageModeling, args)
    if not model.config.use_mask_token:
        raise CheckpointError(f"{args.model}: mask needs a model with a mask token, use_mask_token in its config")
    tokenizer = _tokenizer(args, model.config) if args.tokenizer else None
    processor = load_processor(args.model, model.config, args.quiet)
    try:
        pixels = processor(picture.source).pixel_values
    except ImageError as error:
        raise ImageError(picture.named(str(error))) from None
    grid = pixels.shape[2] // model.config.patch_shape[0], pixels.shape[3] // model.config.patch_shape[1]
    count = round(args.ratio * grid[0] * grid[1])
    mask = block_mask(grid, count, np.random.default_rng(args.seed))
    logits = check_finite(model(pixels, bool_masked_pos=mask.reshape(1, -1)).logits[0])  # (P, V)
    hidden = [_prediction(logits[r * grid[1] + c], int(r), int(c)) for r, c in np.argwhere(mask)]
    seen = as_seen(pixels[0], processor)
    own = None if tokenizer is None else _own_tokens(tokenizer, seen, grid)
    if own is not None:
        for place in hidden:
            place["own"] = int(own[place["row"], place["column"]])
    if args.output:
        from ..drawing import save_png
        from .pictures import masked

        drawn = [] if own is None else [_guessed(tokenizer, own, hidden)]
        save_png(masked(seen, mask, *drawn), Path(args.output))
    if args.json:
        facts = {"file": args.image, "grid": list(grid), "ratio": args.ratio, "seed": args.seed}
        print_json({**facts, "hidden": len(hidden), "patches": mask.size, "tokens": hidden})
    else:
        _print_grid(args, mask, hidden)
    return 0


def _ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, found {text!r}")
    return value


def _prediction(logits: np.ndarray, row: int, column: int) -> dict[str, Any]:
    import numpy as np

    from ..ops.reference import softmax

    token = int(logits.argmax())
    return {"row": row, "column": column, "token": token, "score": float(softmax(logits.astype(np.float64))[token])}


def _tokenizer(args: argparse.Namespace, config: Any) -> Any:
    """The tokenizer, which has as many visual tokens as the model, and a decoder if it is to draw."""
    from ..errors import CheckpointError

    tokenizer = load_tokenizer(args, beside_model=True)
    if tokenizer.config.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{args.tokenizer}: has {tokenizer.config.vocab_size} visual tokens, but {args.model} predicts "
            f"{config.vocab_size}; give the tokenizer that it was pre-trained with"
        )
    if args.output:
        check_decoder(tokenizer, args.tokenizer)
    return tokenizer


def _own_tokens(tokenizer: Any, seen: np.ndarray, grid: tuple[int, int]) -> np.ndarray:  # -> (gh, gw)
    """The visual tokens of what the model would see without a mask, one for each patch."""
    size = grid[0] * tokenizer.pooling, grid[1] * tokenizer.pooling
    return tokenizer.encode(tokenizer.preprocess(seen, size))[0]


def _guessed(tokenizer: Any, own: np.ndarray, hidden: list[dict[str, Any]]) -> np.ndarray:  # -> (H, W, 3) uint8
    """The image of the predicted tokens at the hidden places and of its own elsewhere."""
    from ..evaluate.drawing import levels

    ids = own.copy()
    for place in hidden:
        ids[place["row"], place["column"]] = place["token"]
    return levels(tokenizer.decode(ids[None])[0])


def _print_grid(args: argparse.Namespace, mask: np.ndarray, hidden: list[dict[str, Any]]) -> None:
    width = max([len(str(p["token"])) for p in hidden] + [1])
    tokens = {(p["row"], p["column"]): str(p["token"]) for p in hidden}
    sure = sum(p["score"] for p in hidden) / len(hidden) if hidden else 0.0
    drawn = shown_name(f", drawn in {args.output}") if args.output else ""
    right = sum(p["token"] == p["own"] for p in hidden) if args.tokenizer else 0
    share = f", {right} of them the image's own" if args.tokenizer else ""
    out(
        f"{shown_name(args.image)}: {len(hidden)} of {mask.size} patches hidden (seed {args.seed}){drawn}; "
        f"their visual tokens, with a mean probability of {sure:.2%}{share}:"
    )
    for row in range(mask.shape[0]):
        out("  " + " ".join(tokens.get((row, column), "·").rjust(width) for column in range(mask.shape[1])))
