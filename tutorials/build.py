"""Builds the notebook of every tutorial: `python tutorials/build.py [NN ...]`; needs the extra `tutorials`.

The source is the script in percent format: `# %% [markdown]` starts a cell of text, `# %%` one of code, and `# %%
[solution]` one that is collapsed.  The script is run cell by cell, and the notebook beside it gets the text, the code,
what was printed and the figures, twice as fine as they are shown.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
REPOSITORY = ""  # "owner/name" on GitHub, once the project has an address: then each notebook links to Colab
COLOURS = 256  # of a picture: a palette makes the notebook three times smaller
SECONDS = 600  # the most that one cell may take
COLLAPSED = {"jupyter": {"outputs_hidden": True, "source_hidden": True}, "tags": ["solution"]}
RETINA = "--InlineBackend.figure_formats={'retina'}"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def tutorials() -> list[Path]:
    """The scripts, in reading order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def cells(script: Path) -> list[tuple[str, str]]:
    """("markdown", "code" or "solution", text) of every cell of a script; text loses its comment signs."""
    parts = re.split(r"^# %%(.*)\n", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = []
    for head, body in zip(parts[1::2], parts[2::2], strict=True):
        kind = head.strip(" []") or "code"
        text = re.sub(r"^# ?", "", body, flags=re.MULTILINE) if kind == "markdown" else body
        found.append((kind, text.strip("\n")))
    if REPOSITORY and found:
        found[0] = (found[0][0], f"{found[0][1]}\n\n{colab(script)}")
    return found


def colab(script: Path) -> str:
    """A line that opens the notebook in Colab and says what to install there."""
    address = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/tutorials/{script.stem}.ipynb"
    package = f"minibeit[tutorials] @ git+https://github.com/{REPOSITORY}"
    return f'[Open in Colab]({address}), and there first run `%pip install "{package}"`.'


def notebook(script: Path) -> dict[str, Any]:
    """The notebook of a script, not run yet.  Cells are numbered, so that a new build changes only what changed."""
    made = []
    for number, (kind, text) in enumerate(cells(script)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text}
        if kind != "markdown":
            cell.update(cell_type="code", execution_count=None, outputs=[])
        if kind == "solution":
            cell["metadata"] = COLLAPSED
        made.append(cell)
    return {"cells": made, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def run(script: Path) -> dict[str, Any]:
    """The notebook of a script with its output.  Raises CellExecutionError when a cell fails."""
    try:
        import nbformat
        from nbclient import NotebookClient
    except ImportError as error:
        raise SystemExit(f'{error}; install it with: pip install "minibeit[tutorials]"') from None
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ.pop("MPLBACKEND", None)  # the kernel chooses the one that draws into the notebook
    book = nbformat.from_dict(notebook(script))
    client = NotebookClient(
        book,
        timeout=SECONDS,
        kernel_name="python3",
        extra_arguments=[RETINA],
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute()
    return tidy(json.loads(nbformat.writes(book)))


def tidy(book: dict[str, Any]) -> dict[str, Any]:
    """`book` without times and stray metadata, its pictures in a palette of 256 colours."""
    book["metadata"] = METADATA
    for cell in book["cells"]:
        cell["metadata"] = COLLAPSED if "solution" in cell["metadata"].get("tags", []) else {}
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = _small_png(data["image/png"])
                data.pop("text/plain", None)  # <Figure size 640x480 with 1 Axes>
    return book


def _small_png(encoded: str) -> str:
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    file = io.BytesIO()
    picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=3).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs the tutorials and writes their notebooks.")
    parser.add_argument("numbers", nargs="*", metavar="NN", help="only these, for example 01 03; all by default")
    numbers = parser.parse_args().numbers
    scripts = [script for script in tutorials() if not numbers or script.name[:2] in numbers]
    if not scripts:
        print(f"no tutorial is numbered {' or '.join(numbers)}", file=sys.stderr)
        return 2
    for script in scripts:
        target = script.with_suffix(".ipynb")
        text = json.dumps(run(script), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        part = target.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(target)
        print(f"{target.name}  {len(text.encode()) / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
