"""docs/where.md leads where it says: every file and name in it exists, and it covers the papers' concepts."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "docs" / "where.md"
LINK = re.compile(r"\[`?([^`\]]+)`?\]\(([^)]+)\)((?: `[^`]+`)*)")

# What a reader of the papers will look for: a part of the first cell of some row.
WANTED = (
    "preprocessing", "patches", "patch embedding", "[CLS] token", "mask token", "absolute positions", "pre-norm",
    "eps 1e-12", "without a bias", "dot-product attention", "output projection", "relative position bias",
    "[CLS] rows", "shared or per-block", "table resizing", "non-square", "GELU", "layer scale", "stochastic depth",
    "hidden states", "mean pooling", "fc_norm", "no final norm", "block-wise masking", "visual tokens", "dVAE",
    "classification head", "21,841", "layer-wise decay", "i-1 or i+1", "FPN", "PSP", "UPerNet", "FCN", "batch norm",
    "DiT", "Data2Vec", "names of tensors", "list of ops", "float64 truth",
)  # fmt: skip

# The sections of arXiv 2106.08254 v2.
SECTIONS = {*"12345", "2.1", "2.1.1", "2.1.2", *(f"2.{i}" for i in range(2, 7)), *(f"3.{i}" for i in range(1, 5))}
CITED = re.compile(r"BEiT,?\s+sections?\s+([\d.]+\d|\d)((?:,\s+[\d.]*\d)*)(?:\s+and\s+([\d.]*\d))?")


def rows() -> list[list[str]]:
    """The three cells of every row of the tables."""
    lines = re.findall(r"^\| (?!concept).*$", INDEX.read_text(encoding="utf-8"), re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def places(cell: str) -> list[tuple[str, str, list[str]]]:
    """(label, path from the root, names) of every link in a cell."""
    found = []
    for label, link, names in LINK.findall(cell):
        path = (INDEX.parent / link).resolve().relative_to(ROOT).as_posix()
        found.append((label, path, re.findall(r"`([^`]+)`", names)))
    return found


@cache
def defined(path: str) -> frozenset[str]:
    """The functions, classes and constants at the top of a Python file, and `Class.member` for members of classes."""
    names = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(prefix + node.name)
                if isinstance(node, ast.ClassDef) and not prefix:
                    collect(node.body, f"{node.name}.")
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                if isinstance(target, ast.Name):
                    names.add(prefix + target.id)

    collect(ast.parse((ROOT / path).read_text(encoding="utf-8")).body, "")
    return frozenset(names)


def elsewhere(name: str) -> list[str]:
    files = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "minibeit").rglob("*.py"))]
    return [path for path in files if name in defined(path)]


ENTRIES = [(row[0], *place) for row in rows() for place in places(row[1])]


@pytest.mark.parametrize(("concept", "label", "path", "names"), ENTRIES, ids=lambda value: str(value)[:40])
def test_an_entry_leads_somewhere(concept, label, path, names):
    assert (ROOT / path).is_file(), f"{concept}: there is no {path}; its names are in {[elsewhere(n) for n in names]}"
    assert label == "background" or path.endswith("/" + label), f"{concept}: {label} leads to {path}"
    for name in names:
        assert name in defined(path), f"{concept}: {path} has no {name}; it is in {elsewhere(name) or 'no file'}"


def test_the_test_sees_what_is_not_there():
    assert "block" in defined("minibeit/model/block.py")
    assert "Block.lambda_1" in defined("minibeit/params.py")
    assert "blocks" not in defined("minibeit/model/block.py")
    assert "block_params" not in defined("minibeit/model/encoder.py")  # a local variable


def test_every_row_has_a_place_and_a_reason():
    assert all(len(row) == 3 and all(row) for row in rows())
    assert [row[0] for row in rows() if not places(row[1])] == []
    links = sum(row[1].count("](") for row in rows())
    assert links == len(ENTRIES)  # none of them was overlooked


def test_no_concept_stands_twice():
    concepts = [row[0] for row in rows()]
    assert sorted(concepts) == sorted(set(concepts))


def test_the_concepts_of_the_papers_are_there():
    concepts = [row[0] for row in rows()]
    assert len(concepts) >= 40
    assert [wanted for wanted in WANTED if not any(wanted in concept for concept in concepts)] == []


def test_sections_that_are_cited_exist():
    files = [*sorted((ROOT / "minibeit").rglob("*.py")), *sorted((ROOT / "docs").glob("*.md"))]
    cited = {}
    for path in files:
        for match in CITED.finditer(path.read_text(encoding="utf-8")):
            numbers = re.findall(r"[\d.]*\d", " ".join(filter(None, match.groups())))
            cited.update({f"{path.relative_to(ROOT).as_posix()} {number}": number for number in numbers})
    assert len(cited) > 10
    assert {where for where, number in cited.items() if number not in SECTIONS} == set()
    assert CITED.search("BEiT sections 2.1.1, 2.2 and 2.3;").groups() == ("2.1.1", ", 2.2", "2.3")
