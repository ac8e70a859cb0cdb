"""What README, the guides and the examples tell a reader to type works as it is pasted."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

import pytest

from minibeit import cli

ROOT = Path(__file__).resolve().parent.parent
PAPERS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "tutorials" / "README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(value) -> str:
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else str(value)[:60]


def fences(paper: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return FENCE.findall(paper.read_text(encoding="utf-8"))


def commands(paper: Path) -> list[str]:
    """Every line that calls minibeit, of shell blocks and of indented ones, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", paper.read_text(encoding="utf-8"))
    blocks = [body for language, body in FENCE.findall(text) if language in ("bash", "sh")]
    blocks += re.findall(r"^    (?=minibeit ).*$", FENCE.sub("", text), re.MULTILINE)
    lines = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]
    return [line for line in lines if re.match(r"(\w+=\S+ )*(\.venv/bin/)?minibeit ", line)]


LINES = [(paper, line) for paper in PAPERS for line in commands(paper)]
PROGRAMS = [
    (paper, body)
    for paper in PAPERS
    for language, body in fences(paper)
    if language == "python" and '"weights/digits"' in body
]


def parses(line: str) -> bool:
    """Whether the command line is one that minibeit takes; what it says is not run."""
    words = shlex.split(line, comments=True)
    words = words[next(i for i, word in enumerate(words) if word.endswith("minibeit")) + 1 :]
    if ">" in words:
        words = words[: words.index(">")]
    words = [word for word in words if word != "..."]
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            cli._parser(words[0]).parse_args(words)
    except SystemExit as error:
        return error.code == 0
    return True


def test_there_is_something_to_check():
    assert len(LINES) > 25 and len(PROGRAMS) > 2
    assert {"classify", "segment", "finetune", "verify"} <= {word for _, line in LINES for word in line.split()}
    assert set(cli.COMMANDS) & {"classify"}
    assert not parses("minibeit classify --modle x photo.jpg")


@pytest.mark.parametrize(("paper", "line"), LINES, ids=name_of)
def test_a_command_is_one_that_exists(paper, line):
    assert parses(line), f"{name_of(paper)}: {line}"


@pytest.mark.parametrize(("paper", "program"), PROGRAMS, ids=name_of)
def test_a_program_runs_as_pasted(paper, program, monkeypatch):
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, name_of(paper), "exec"), {"__name__": "pasted"})
    assert printed.getvalue().strip()


def test_readme_starts_with_the_two_commands_that_ci_runs():
    first, second = [body for language, body in fences(ROOT / "README.md") if language == "bash"]
    assert "pip install ." in first and "minibeit classify weights/digits/images" in first
    assert "pip install" in second and second.strip().endswith("pytest -n 2 --dist loadfile")
    assert os.access(ROOT / "weights" / "digits" / "images", os.R_OK)
