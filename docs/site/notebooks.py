"""Notebooks as pages: their text, code and output as Markdown, their figures as files, their formulas as MathML."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

from latex2mathml.converter import convert

FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\w\\$])\$([^$\n]+?(?:\n[^$\n]+?)?)\$(?!\w)", re.DOTALL)
MARK = re.compile(r"FORMULA([0-9a-f]+)AS(block|inline)END")


def files(root: Path) -> list[Path]:
    """The tutorials' notebooks, in reading order."""
    return sorted((root / "tutorials").glob("[0-9][0-9]_*.ipynb"))


def page_of(path: Path) -> str:
    """The page of a notebook."""
    return f"tutorials/{path.stem}.md"


def markdown(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its figures by file name."""
    book = json.loads(path.read_text(encoding="utf-8"))
    parts: list[str] = []
    figures: dict[str, bytes] = {}
    heading = path.stem
    for cell in book["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
            heading = re.sub(r"[`$\\]", "", headings[-1]) if headings else heading
            parts.append(_without_formulas(text))
            continue
        shown = [_fenced("python", text)]
        for output in cell["outputs"]:
            if "text" in output:
                shown.append(_fenced("text", "".join(output["text"])))
            if "image/png" in output.get("data", {}):
                name = f"{path.stem}_{len(figures) + 1:02}.png"
                figures[name] = base64.b64decode("".join(output["data"]["image/png"]))
                width = output.get("metadata", {}).get("image/png", {}).get("width")
                size = f"{{ width={width} }}" if width else ""
                shown.append(f"![Figure {len(figures)}, {heading}]({name}){size}")
        parts.append(
            _collapsed("\n\n".join(shown)) if "solution" in cell["metadata"].get("tags", []) else "\n\n".join(shown)
        )
    return "\n\n".join(parts) + "\n", figures


def with_formulas(html: str) -> str:
    """HTML with the formulas that `markdown` has put aside."""
    return MARK.sub(_formula, html)


def _fenced(language: str, text: str) -> str:
    fence = "`" * (1 + max((len(run) for run in re.findall("`{3,}", text)), default=2))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _collapsed(text: str) -> str:
    return '??? success "Solution"\n\n' + re.sub(r"^(?=.)", "    ", text, flags=re.MULTILINE)


def _without_formulas(text: str) -> str:
    """Text in which every formula is a word that Markdown leaves alone.  Code keeps its dollar signs."""
    parts = re.split(r"(```.*?```|`[^`\n]+`)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("`") else FORMULA.sub(_marked, part) for part in parts)


def _marked(formula: re.Match[str]) -> str:
    kind = "block" if formula[1] else "inline"
    return f"FORMULA{(formula[1] or formula[2]).encode().hex()}AS{kind}END"


def _formula(mark: re.Match[str]) -> str:
    return convert(bytes.fromhex(mark[1]).decode(), display=mark[2])
