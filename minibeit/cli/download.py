"""minibeit download: a checkpoint from the Hugging Face Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..files import check_writable
from .terminal import out

HELP = "download a checkpoint from the Hugging Face Hub (extra: hub)"
EXAMPLES = """\
  minibeit download microsoft/beit-base-patch16-224
  minibeit download microsoft/beit-base-patch16-224 --output DIR
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="owner/name, such as microsoft/beit-base-patch16-224; see `minibeit models`")
    parser.add_argument("-q", "--quiet", action="store_true", help="no notes")
    parser.add_argument("--revision", help="a branch, tag or commit (default: main)")
    parser.add_argument("--output", metavar="FOLDER", help="where to put the files, instead of the Hub's cache")


def run(args: argparse.Namespace) -> int:
    from ..hub import download, is_hub_id, not_here
    from ..loading_options import Where

    if not is_hub_id(args.id):
        raise not_here(args.id)
    if args.output:
        check_writable(Path(args.output) / "config.json")
    out(str(download(args.id, Where(revision=args.revision), args.output)))
    return 0
