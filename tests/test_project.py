"""The papers of the project say the same as the code: versions, links, what a source distribution holds."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import minibeit

ROOT = Path(__file__).resolve().parent.parent
PAPERS = ("README.md", "SECURITY.md", "CHANGELOG.md", "CITATION.cff")


def test_versions_agree():
    version = re.escape(minibeit.__version__)
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.search(rf"^## {version}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("paper", PAPERS)
def test_links_lead_somewhere(paper):
    links = re.findall(r"\]\(([^)#]+)", (ROOT / paper).read_text(encoding="utf-8"))
    assert not [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()]


def test_the_source_distribution_leaves_nothing_out():
    listing = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listing.returncode:
        pytest.skip("not a git checkout")
    endings, folders = set(), {"tests/data"}
    for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if words[:1] == ["recursive-include"]:
            endings |= {(words[1], pattern.removeprefix("*")) for pattern in words[2:]}
    taken = tuple((ROOT / "MANIFEST.in").read_text(encoding="utf-8").split())
    left = [
        name
        for name in listing.stdout.splitlines()
        if name not in (*taken, "MANIFEST.in", ".gitignore", ".ci/run")
        and not (name.startswith("minibeit/") and name.endswith(".py"))  # packages, which setup.cfg lists
        and not name.startswith(tuple(f"{folder}/" for folder in folders))
        and not any(name.startswith(f"{folder}/") and name.endswith(ending) for folder, ending in endings)
    ]
    assert not left
