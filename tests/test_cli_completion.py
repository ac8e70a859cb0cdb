"""The completion script: a shell that has read it completes commands, options and choices."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from cli_helpers import run

from minibeit.cli import COMMANDS
from minibeit.cli.completion import SHELLS

shtab = pytest.importorskip("shtab")


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_a_script_that_knows_every_command(capsys, shell):
    code, out, err = run(capsys, "completion", shell)
    assert code == 0 and not err
    assert all(command in out for command in COMMANDS) and "--top-k" in out


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    "words, expected",
    [
        (["minibeit", "cla"], "classify"),
        (["minibeit", "classify", "--top"], "--top-k"),
        (["minibeit", "segment", "--palette", "ade"], "ade20k"),
        (["minibeit", "classify", "--model", "pho"], "photos"),
    ],
)
def test_bash_completes(capsys, tmp_path, words, expected):
    (tmp_path / "script").write_text(run(capsys, "completion", "bash")[1])
    (tmp_path / "photos").mkdir()
    given = " ".join(f"'{word}'" for word in words)
    program = f"""
source ./script
COMP_WORDS=({given}); COMP_CWORD={len(words) - 1}
_shtab_minibeit
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert expected in done.stdout.split(), done.stderr


def test_without_shtab_it_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    code, out, err = run(capsys, "completion", "bash")
    assert (code, out) == (1, "") and 'pip install "minibeit[completion]"' in err
