"""The documentation site builds without a warning, its links lead somewhere, and it needs nothing from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import minibeit

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ROOT / "docs" / "site" / "mkdocs.yml"
pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """What a page links to, loads, and can be linked to by."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()
        self.images_without_text = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        facts = dict(attributes)
        self.places |= {facts[name] for name in ("id", "name") if facts.get(name)}
        if tag == "a" and facts.get("href"):
            self.links.append(facts["href"])
        if tag in ("script", "img", "iframe", "source") and facts.get("src"):
            self.loaded.append(facts["src"])
        if tag == "link" and facts.get("href") and facts.get("rel") != "canonical":
            self.loaded.append(facts["href"])
        self.images_without_text += tag == "img" and not facts.get("alt")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """{path below the site: page}, of a fresh build in which a warning is an error."""
    pytest.importorskip("mkdocs", reason='the site needs: pip install "minibeit[docs]"')
    pytest.importorskip("mkdocstrings", reason='the site needs: pip install "minibeit[docs]"')
    folder = tmp_path_factory.mktemp("site")
    words = ["-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(SETTINGS), "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return {path.relative_to(folder).as_posix(): Page(path) for path in folder.rglob("*.html")}, folder


def test_there_is_a_site(site):
    pages, _ = site
    assert {"index.html", "where.html", "benchmarks.html", "changelog.html", "reference/models.html"} <= set(pages)
    assert {f"tutorials/{path.stem}.html" for path in (ROOT / "tutorials").glob("*.ipynb")} <= set(pages)
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= set(pages)


def test_every_guide_is_in_the_navigation(site):
    pages, _ = site
    linked = {unquote(link) for link in pages["photos.html"].links}
    guides = {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    reached = linked | {page for tab in ("benchmarks.html", "where.html", "index.html") for page in pages[tab].links}
    assert guides - reached == set()


def test_links_lead_somewhere(site):
    pages, folder = site
    lost = []
    for name, page in pages.items():
        if name == "404.html":  # its addresses start at the root of the site
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or not (parts.path or parts.fragment):
                continue
            target = (folder / name).parent / unquote(parts.path) if parts.path else folder / name
            path = Path(os.path.normpath(target))
            known = pages.get(path.relative_to(folder).as_posix()) if folder in path.parents else None
            if not path.exists() or (parts.fragment and known and unquote(parts.fragment) not in known.places):
                lost.append(f"{name}: {link}")
    assert lost == []


def test_nothing_is_loaded_from_elsewhere(site):
    pages, _ = site
    assert [(name, part) for name, page in pages.items() for part in page.loaded if urlsplit(part).scheme] == []


def test_every_public_name_has_its_place_in_the_reference(site):
    pages, _ = site
    places = {place for name, page in pages.items() if name.startswith("reference/") for place in page.places}
    names = [name for name in minibeit.__all__ if not name.startswith("_")]
    assert [name for name in names if f"minibeit.{name}" not in places] == []


def test_every_image_has_a_text(site):
    pages, _ = site
    assert {name: page.images_without_text for name, page in pages.items() if page.images_without_text} == {}


def test_formulas_and_shapes_are_shown(site):
    _, folder = site
    tutorial = (folder / "tutorials" / "06_one_step_by_hand.html").read_text(encoding="utf-8")
    assert tutorial.count("<math") > 5 and "FORMULA" not in tutorial
    assert "Shapes: <code>" in (folder / "reference" / "ops.html").read_text(encoding="utf-8")
    index = (folder / "where.html").read_text(encoding="utf-8")
    assert index.count("#__codelineno-0-") > 100
