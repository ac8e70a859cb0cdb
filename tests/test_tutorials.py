"""Every tutorial runs from its first line to its last assertion, and its notebook is the one its script makes."""

from __future__ import annotations

import ast
import base64
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

HOME = Path(__file__).resolve().parent.parent
FOLDER = HOME / "tutorials"
SCRIPTS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
LARGEST = 800_000  # bytes of a notebook, whose figures have twice the pixels that they are shown with
SECONDS = 600


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_tutorials", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kind_of(cell) -> str:
    return "solution" if "solution" in cell["metadata"].get("tags", []) else cell["cell_type"]


def each_script(test):
    return pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)(test)


def test_there_are_tutorials_and_the_index_names_them_all():
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(SCRIPTS) >= 3
    assert [name for name in (script.stem for script in SCRIPTS) if f"{name}.ipynb" not in index] == []


@pytest.mark.slow
@each_script
def test_runs_to_its_end(script):
    pytest.importorskip("matplotlib")
    pytest.importorskip("skimage")
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8"}
    environment.pop("MINIBEIT_BACKEND", None)  # the tutorials choose their own
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HOME), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=HOME,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@each_script
def test_ends_in_what_it_shows(script):
    tree = ast.parse(script.read_text(encoding="utf-8"))
    assert any(isinstance(node, ast.Assert) for node in ast.walk(tree)), "a tutorial that asserts nothing shows nothing"


@each_script
def test_links_lead_somewhere(script):
    text = script.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (FOLDER / link.split("#")[0]).exists()] == []
    assert "](\n" not in text


@each_script
def test_notebook_is_made_from_the_script_and_was_run(script, build):
    file = script.with_suffix(".ipynb")
    assert file.is_file(), f"python tutorials/build.py {script.name[:2]} makes it"
    book = json.loads(file.read_text(encoding="utf-8"))
    found = [(kind_of(cell), "".join(cell["source"])) for cell in book["cells"]]
    assert found == build.cells(script), f"python tutorials/build.py {script.name[:2]} brings it up to date"
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert figures
    assert all(sharp(output) for output in figures)
    assert not any(output["output_type"] == "error" for output in outputs)


def sharp(output) -> bool:
    """Whether a figure has two pixels for each that it is shown with, so that it is sharp on today's screens."""
    picture = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
    return abs(picture.width / output["metadata"]["image/png"]["width"] - 2) < 0.02


@each_script
def test_ends_in_two_exercises_with_solutions(script, build):
    found = build.cells(script)
    place = [i for i, (kind, text) in enumerate(found) if kind == "markdown" and "## Exercises" in text]
    assert len(place) == 1
    text = found[place[0]][1]
    assert re.findall(r"^(\d)\. ", text, re.MULTILINE) == ["1", "2"]
    solutions = [text for kind, text in found[place[0] + 1 :] if kind == "solution"]
    assert len(solutions) == 2 and all("assert " in text for text in solutions)
    assert [kind for kind, _ in found[: place[0]] if kind == "solution"] == []


def test_notebooks_link_to_colab_once_there_is_an_address(build, monkeypatch):
    script = SCRIPTS[0]
    before = build.cells(script)
    assert "colab" not in before[0][1]
    monkeypatch.setattr(build, "REPOSITORY", "somebody/minibeit")
    first, *others = build.cells(script)
    assert f"github/somebody/minibeit/blob/main/tutorials/{script.stem}.ipynb" in first[1]
    assert first[1].startswith(before[0][1]) and others == before[1:]


@each_script
def test_notebook_is_small_and_says_nothing_of_the_machine(script):
    text = script.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST
    book = json.loads(text)
    printed = "".join("".join(output.get("text", "")) for cell in book["cells"] for output in cell.get("outputs", []))
    assert re.findall(r"/(?:home|root|tmp|opt|usr|work|Users)/\S*", printed) == []


def test_cells_of_a_script(build, tmp_path):
    script = tmp_path / "09_x.py"
    text = "# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1  # one\n\n# a comment\n\n# %% [solution]\nassert x\n"
    script.write_text(text)
    found = build.cells(script)
    assert found[:2] == [("markdown", "# Title\n\nText."), ("code", "x = 1  # one\n\n# a comment")]
    assert found[2:] == [("solution", "assert x")]
    book = build.notebook(script)
    assert [cell["cell_type"] for cell in book["cells"]] == ["markdown", "code", "code"]
    assert [kind_of(cell) for cell in book["cells"]] == ["markdown", "code", "solution"]
    assert book["nbformat"] == 4
