"""The command line as a whole: help, exit codes, errors in one line, interruptions, what is imported."""

from __future__ import annotations

import pkgutil
import signal
import subprocess
import sys
import warnings
from importlib import import_module

import pytest
from cli_helpers import ENVIRONMENT, run, save, save_pictures, start

import minibeit.cli
from minibeit.cli import COMMANDS, main
from minibeit.cli.terminal import one_line, table
from minibeit.runs.found import find_images


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("classify"), "classify")


def test_every_command_module_is_in_the_table_and_complete():
    modules = {
        module.name: import_module(f"minibeit.cli.{module.name}")
        for module in pkgutil.iter_modules(minibeit.cli.__path__)
    }
    assert {name for name, module in modules.items() if hasattr(module, "run")} == set(COMMANDS)
    for name in COMMANDS:
        help = modules[name].HELP
        assert help and "\n" not in help and callable(modules[name].add_arguments)


def test_help_lists_every_command_and_each_explains_itself(capsys):
    code, out, err = run(capsys, "--help")
    assert code == 0 and not err
    for name in COMMANDS:
        assert f"\n    {name} " in out
        code, text, _ = run(capsys, name, "--help")
        assert code == 0 and text.startswith(f"usage: minibeit {name}") and "--debug" in text


def test_help_imports_nothing_heavy():
    script = (
        "import sys; from minibeit.cli import main; main(['--help']); "
        "sys.exit(' '.join(m for m in ('numpy', 'numba', 'torch', 'PIL', 'tqdm') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stderr.strip() == ""  # sys.exit prints what it is given


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"minibeit {minibeit.__version__}\n")


@pytest.mark.parametrize(
    "words",
    [[], ["classify"], ["classify", "x.png", "--top-k", "0"], ["classify", "x", "--nope"]],
)
def test_wrong_usage_is_exit_code_2(capsys, words):
    code, out, err = run(capsys, *words)
    assert code == 2 and not out and err.startswith("usage: minibeit")


def test_an_error_is_one_line_and_debug_shows_its_traceback(capsys, tmp_path):
    (picture,) = save_pictures(tmp_path, "a.png")
    code, out, err = run(capsys, "classify", picture, "--model", tmp_path / "nowhere")
    assert code == 1 and not out
    assert err.startswith("minibeit: error: ") and "nowhere" in err and err.count("\n") == 1
    code, _, err = run(capsys, "classify", picture, "--model", tmp_path / "nowhere", "--debug")
    assert code == 1 and "Traceback (most recent call last)" in err
    assert "Traceback" in run(capsys, "--debug", "classify", picture, "--model", tmp_path / "nowhere")[2]


def test_an_unexpected_error_is_one_line_too(capsys, monkeypatch):
    import minibeit.hub

    def broken(*_):
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(minibeit.hub, "resolve", broken)
    code, _, err = run(capsys, "inspect", "x")
    assert code == 1 and err.count("\n") == 1 and "ZeroDivisionError: a b" in err and "--debug" in err


def test_warnings_are_one_line(capsys, monkeypatch):
    import minibeit.cli.warmup

    def run_with_warning(args):
        warnings.warn("first\nsecond", stacklevel=2)
        return 0

    monkeypatch.setattr(minibeit.cli.warmup, "run", run_with_warning)
    assert run(capsys, "warmup") == (0, "", "minibeit: warning: first second\n")


def test_ctrl_c_is_one_line_and_code_130(capsys, monkeypatch):
    import minibeit.cli.warmup

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(minibeit.cli.warmup, "run", interrupted)
    assert run(capsys, "warmup") == (130, "", "minibeit: error: interrupted\n")

    def replaced(args):  # as Python does with what is raised while a class is made
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("Error calling __set_name__") from error

    monkeypatch.setattr(minibeit.cli.warmup, "run", replaced)
    assert run(capsys, "warmup") == (130, "", "minibeit: error: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_process_that_is_interrupted_says_so(checkpoint, tmp_path):
    folder = tmp_path / "many"
    save_pictures(folder, *(f"{i}.png" for i in range(40)))
    process = start("classify", *[folder] * 200, "--model", checkpoint, "-q")
    process.stdout.readline()  # it is at work
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "minibeit: error: interrupted\n"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_broken_pipe_is_silent(checkpoint, tmp_path):
    save_pictures(tmp_path, *(f"{i}.png" for i in range(20)))
    process = start("classify", *[tmp_path] * 50, "--model", checkpoint, "-q")
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert err == ""


def test_many_files_have_a_progress_bar_on_stderr_unless_quiet(capsys, checkpoint, tmp_path):
    save_pictures(tmp_path, *(f"{i}.png" for i in range(15)))
    (tmp_path / "9a.png").touch()
    code, out, err = run(capsys, "classify", tmp_path, "--model", checkpoint, "-k", 1)
    lines = err.splitlines()  # in a log each state of the bar is a line of its own
    assert code == 1 and "0/16" in lines[0] and any("16/16" in line for line in lines) and out.count("\n") == 16
    assert [line for line in lines if "9a.png" in line] == [line for line in lines if line.startswith("minibeit: ")]
    (tmp_path / "9a.png").unlink()
    assert run(capsys, "classify", tmp_path, "--model", checkpoint, "-k", 1, "-q") == (0, out, "")


def test_words_become_files_in_order_folders_naturally_sorted(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    save_pictures(a, "p10.png", "p2.png", "p1.JPG")
    (a / "notes.txt").write_text("no picture")
    (a / ".hidden.png").write_text("no picture")
    save_pictures(a / "deep", "q.png")
    b.mkdir()
    words = [
        str(a / "notes.txt"),
        str(a),
        str(tmp_path / "a" / "*2.png"),
        str(b),
        str(tmp_path / "no*.gif"),
        "gone.png",
        "",
    ]
    found = find_images(words)
    names = [entry.file.removeprefix(str(tmp_path) + "/") for entry in found]
    assert names == ["a/notes.txt", "a/p1.JPG", "a/p2.png", "a/p10.png", "a/p2.png", "b", "no*.gif", "gone.png", ""]
    assert [i for i, entry in enumerate(found) if entry.error] == [5, 6, 8]
    assert "--recursive" in found[5].error and "no file matches" in found[6].error
    deep = [entry.file.removeprefix(str(a) + "/") for entry in find_images([str(a)], recursive=True)]
    assert deep == ["deep/q.png", "p1.JPG", "p2.png", "p10.png"]


def test_a_file_with_glob_characters_in_its_name_is_itself(tmp_path):
    (path,) = save_pictures(tmp_path, "photo [1].png")
    assert [entry.file for entry in find_images([str(path)])] == [str(path)]


def test_strange_characters_are_shown_escaped():
    assert one_line("a\n b\x1b[31m \udcff é") == "a b\\x1b[31m \\udcff é"


def test_table_aligns():
    assert table([("a", "1"), ("bbb", "22")], right=(1,)) == ["a     1", "bbb  22"]


def test_main_without_arguments_reads_sys_argv(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["minibeit", "--version"])
    assert main() == 0
    assert "minibeit" in capsys.readouterr().out
