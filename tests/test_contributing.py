"""CONTRIBUTING.md names files, folders and constants that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PATH = re.compile(r"(?<![\w/.-])(?:minibeit|tests|tutorials|weights|docs|\.ci)/[\w./*-]*[\w*/]")


def test_paths_lead_somewhere():
    paths = set(PATH.findall(TEXT))
    assert len(paths) > 15
    assert [path for path in sorted(paths) if not any(ROOT.glob(path.rstrip("/")))] == []


def test_names_in_code_exist():
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "minibeit").rglob("*.py"))
    names = set(re.findall(r"`([A-Za-z_]\w+)`", TEXT)) - {"mypy"}
    assert {"Ops", "DIALECTS", "Place", "COMMANDS", "compile_kernel"} <= names
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", code)] == []


def test_each_word_is_explained_once():
    words = re.findall(r"^\| ([\w ,()]+?) \| .* \| .*\|$", TEXT.split("## Words")[1], re.MULTILINE)
    assert len(words) > 20 and len(words) == len(set(words))
