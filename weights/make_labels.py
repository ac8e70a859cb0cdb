"""Writes weights/labels-*.json: the class names of the data sets that published checkpoints were trained for.

    python weights/make_labels.py TIMM_INFO MMSEG_CLASS_NAMES

TIMM_INFO is the folder timm/data/_info of an installed timm (Apache-2.0; the lemmas are WordNet's), MMSEG_CLASS_NAMES
the file mmseg/utils/class_names.py of mmsegmentation (Apache-2.0), which is parsed, not run.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent
RVL_CDIP = (
    "letter", "form", "email", "handwritten", "advertisement", "scientific report", "scientific publication",
    "specification", "file folder", "news article", "budget", "invoice", "presentation", "questionnaire", "resume",
    "memo",
)  # fmt: skip


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[: -1 if path.read_bytes().endswith(b"\n") else None]


def returned_list(tree: ast.Module, function: str) -> Any:
    """The literal that a function of a parsed module returns."""
    body = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function).body
    return ast.literal_eval(next(node for node in body if isinstance(node, ast.Return)).value)


def write(name: str, content: dict[str, Any]) -> None:
    """One class per line, so that a change of a name is a change of one line."""
    parts = []
    for key, value in content.items():
        if isinstance(value, list):
            items = ",\n".join(json.dumps(item, ensure_ascii=False) for item in value)
            parts.append(f"{json.dumps(key)}: [\n{items}\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    (HOME / f"labels-{name}.json").write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def main(timm_info: Path, mmseg_names: Path) -> None:
    lemmas = dict(line.split("\t") for line in lines(timm_info / "imagenet_synset_to_lemma.txt"))
    wordnet = "WordNet lemmas by way of timm/data/_info (Apache-2.0)"
    synsets, more = (lines(timm_info / file) for file in ("imagenet_synsets.txt", "imagenet22k_synsets.txt"))
    places = {synset: i for i, synset in enumerate(more)}
    write(
        "imagenet-1k",
        {
            "source": wordnet,
            "names": [lemmas[synset] for synset in synsets],
            "synsets": synsets,
            "outputs of 22k": [places.get(synset) for synset in synsets],  # one is not among them
        },
    )
    write("imagenet-22k", {"source": wordnet, "names": [lemmas[synset] for synset in more]})
    tree = ast.parse(mmseg_names.read_text(encoding="utf-8"))
    names = [name.strip() for name in returned_list(tree, "ade_classes")]
    source = "mmsegmentation 1.2.2, mmseg/utils/class_names.py (Apache-2.0)"
    write("ade20k", {"source": source, "names": names, "palette": returned_list(tree, "ade_palette")})
    write("rvl-cdip", {"source": "the data set's own list of classes", "names": list(RVL_CDIP)})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
