"""Every tutorial runs from its first line to its last assertion, and its notebook is the one its script makes."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parent.parent
FOLDER = HOME / "tutorials"
SCRIPTS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
LARGEST = 600_000  # bytes of a notebook
SECONDS = 600


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_tutorials", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in book["cells"]]
    assert found == build.cells(script), f"python tutorials/build.py {script.name[:2]} brings it up to date"
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)


@each_script
def test_notebook_is_small_and_says_nothing_of_the_machine(script):
    text = script.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST
    book = json.loads(text)
    printed = "".join("".join(output.get("text", "")) for cell in book["cells"] for output in cell.get("outputs", []))
    assert re.findall(r"/(?:home|root|tmp|opt|usr|work|Users)/\S*", printed) == []


def test_cells_of_a_script(build, tmp_path):
    script = tmp_path / "09_x.py"
    script.write_text("# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1  # one\n\n# a comment\n")
    assert build.cells(script) == [("markdown", "# Title\n\nText."), ("code", "x = 1  # one\n\n# a comment")]
    book = build.notebook(script)
    assert [cell["cell_type"] for cell in book["cells"]] == ["markdown", "code"]
    assert book["nbformat"] == 4
