"""minibeit models: the published checkpoints that the manifest knows."""

from __future__ import annotations

import argparse
import json

HELP = "list the published checkpoints: task, size, parameters, labels, licence"
COLUMNS = ("id", "task", "size", "pixels", "parameters", "labels", "licence")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", help="show only ids that contain all of these")
    parser.add_argument("--json", action="store_true", help="everything the manifest says, as JSON")


def run(args: argparse.Namespace) -> int:
    from .. import labels

    found = {id: entry for id, entry in labels.manifest().items() if all(word in id for word in args.words)}
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    rows = [COLUMNS]
    for id, entry in found.items():
        pixels, count = str(entry["image_size"]), f"{entry['parameters']:,}"
        rows.append((id, entry["task"], entry["size"], pixels, count, entry["labels"] or "-", entry["license"]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        cells = [cell.rjust(w) if i in (3, 4) else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())
    return 0 if found else 1
