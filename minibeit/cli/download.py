"""minibeit download: a checkpoint from the Hugging Face Hub."""

from __future__ import annotations

import argparse

HELP = "download a checkpoint from the Hugging Face Hub (extra: hub)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="owner/name, such as microsoft/beit-base-patch16-224; see `minibeit models`")
    parser.add_argument("--revision", help="a branch, tag or commit (default: main)")
    parser.add_argument("--output", metavar="FOLDER", help="where to put the files instead of the cache of the Hub")


def run(args: argparse.Namespace) -> int:
    from ..checkpoint.hub import download, is_hub_id

    if not is_hub_id(args.id):
        raise ValueError(f"{args.id!r}: an id on the Hub is owner/name, such as microsoft/beit-base-patch16-224")
    folder = download(args.id, args.revision, output=args.output)
    print(folder)
    return 0
