"""Chromium without a window, for tests of pages; skips with a reason where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
AXE = "axe-core@4.14.1"


@contextmanager
def browser() -> Iterator[Any]:
    """A browser that playwright drives: one that the system has."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")
    place = os.environ.get("MINIBEIT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if place is None:
        pytest.skip("needs Chromium: none of " + ", ".join(NAMES) + " is here; MINIBEIT_CHROMIUM may name one")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=place, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def opened(started: Any, file: Path, **options: Any) -> Iterator[Any]:
    """A page from disk, without a network; an error in its scripts, or a request, fails the test."""
    context = started.new_context(offline=True, viewport={"width": 1400, "height": 1000}, **options)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready=yes]", timeout=60_000)
    yield page
    assert not wrong
    context.close()


def axe_script(folder: Path) -> str:
    """axe-core: the file that MINIBEIT_AXE names, or else from npm."""
    if named := os.environ.get("MINIBEIT_AXE"):
        return Path(named).read_text(encoding="utf-8")
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs axe-core: npm is not here; MINIBEIT_AXE may name its axe.min.js")
    command = [npm, "install", "--no-save", "--ignore-scripts", "--prefix", str(folder), AXE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"needs axe-core, which npm could not fetch: {done.stderr.strip().splitlines()[-1:]}")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
