"""What people do with the command line: pipes, full disks, closed folders, words in any case, a picture for a model."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import ENVIRONMENT, NAMES, run, save, save_pictures, start
from colour_tokenizer import colour_tokenizer
from PIL import Image

import minibeit
from minibeit import catalogue, files, hub
from minibeit.cli import COMMANDS, _parser
from minibeit.cli.inputs import check_outputs
from minibeit.cli.loading import shipped_checkpoint
from minibeit.cli.terminal import OutputError, UsageError

posix = pytest.mark.skipif(sys.platform == "win32", reason="pipes and limits of POSIX")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    colour_tokenizer().save_pretrained(folder / "tokenizer")
    made = {kind: save(folder / kind, kind) for kind in ("classify", "segment", "mask", "bare")}
    return {**made, "tokenizer": folder / "tokenizer"}


def shell(command: str, **options) -> subprocess.CompletedProcess:
    program = f"{shlex.quote(sys.executable)} -m minibeit"
    command = command.replace("minibeit ", program + " ")
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, **options)


# Help and version ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_examples_that_parse(capsys, command):
    examples = import_module(f"minibeit.cli.{command}").EXAMPLES
    assert examples in run(capsys, command, "--help")[1]
    lines = [line.partition("   ")[0] for line in examples.strip().replace("  minibeit", "minibeit").splitlines()]
    assert lines
    for line in lines:
        words = shlex.split(line.split(" | ")[-1].split(" > ")[0])
        assert words[:2] == ["minibeit", command]
        assert callable(_parser(command).parse_args(words[1:]).run)


def test_the_first_example_of_the_help_works_as_printed(capsys):
    line = next(line for line in run(capsys, "--help")[1].splitlines() if line.startswith("  minibeit "))
    code, out, _ = run(capsys, *shlex.split(line)[1:])
    assert code == 0 and out.count(".png") == 10


def test_version_says_what_a_report_needs_and_imports_nothing_for_the_short_one(capsys):
    code, out, err = run(capsys, "--version", "--verbose")
    assert code == 0 and not err and out.startswith(f"minibeit {minibeit.__version__} in ")
    for part in ("Python 3.", "CPU: ", "threads: ", "compiled kernels: ", f"numpy {np.__version__}", "environment: "):
        assert part in out
    script = (
        "import sys; from minibeit.cli import main; main(['--version']); "
        "sys.exit(' '.join(m for m in ('numpy', 'numba', 'llvmlite', 'torch', 'PIL', 'tqdm') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stderr.strip() == ""


def test_tokens_are_not_told(capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME_TOKEN", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert "secret" not in run(capsys, "--version", "--verbose")[1]


def test_a_misspelt_command_names_the_nearest(capsys):
    code, out, err = run(capsys, "clasify", "a.png")
    assert (code, out) == (2, "")
    assert err == "minibeit: error: there is no command 'clasify'; did you mean classify? minibeit --help lists all\n"
    assert run(capsys, "zzz")[2] == "minibeit: error: there is no command 'zzz'; minibeit --help lists all\n"


# Streams -------------------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("command", ["inspect {bare}", "inspect {bare} --json", "models", "classify --help", "--help"])
def test_a_reader_that_leaves_early_is_no_error(models, command):
    done = shell(f"(minibeit {command.format(**models)}; echo code $? >&2) | head -n 1")
    assert done.stdout.count("\n") == 1 and done.stderr.startswith("code ") and done.stderr.count("\n") == 1


def test_windows_calls_a_closed_pipe_an_invalid_argument(monkeypatch):
    assert not OutputError(OSError(errno.EINVAL, "Invalid argument")).gone or sys.platform == "win32"
    monkeypatch.setattr(sys, "platform", "win32")
    assert OutputError(OSError(errno.EINVAL, "Invalid argument")).gone
    assert not OutputError(OSError(errno.ENOSPC, "No space left on device")).gone


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("command", ["models", "--version", "classify {images} -q", "inspect {images}/.. --json"])
def test_an_output_that_is_full_is_one_sentence(command):
    done = shell(f"minibeit {command.format(images=shipped_checkpoint() / 'images')} > /dev/full")
    assert done.returncode == 1
    assert done.stderr == "minibeit: error: standard output: No space left on device\n"


@posix
def test_closed_streams_do_not_matter(models, tmp_path):
    (picture,) = save_pictures(tmp_path, "a.png")
    words = f"classify {picture} -m {models['classify']}"
    assert shell(f"minibeit {words} >&-").stderr == ""
    done = shell(f"minibeit classify {tmp_path}/gone.png {words[9:]} 2>&-")
    assert done.returncode == 1 and "a.png" in done.stdout and done.stderr == ""


@posix
@pytest.mark.parametrize("delay", [0.3, 0.5, 0.8, 1.5])
def test_ctrl_c_at_any_moment_is_one_line(models, tmp_path, delay):
    save_pictures(tmp_path, *(f"{i}.png" for i in range(20)))
    process = start("classify", *[tmp_path] * 400, "--model", models["classify"], "-q")
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    in_pythons_own_start = not err or ("minibeit: " not in err and "__main__.py" not in err)
    # Python itself takes the code of the signal, 130 in a shell, where the interrupt met text that is executed.
    assert in_pythons_own_start or process.returncode in (130, -signal.SIGINT)
    assert in_pythons_own_start or err == "minibeit: error: interrupted\n"


@posix
def test_a_swallowed_ctrl_c_comes_again(tmp_path):
    """An interrupt within the import system waits, one that a finaliser swallows is not lost."""
    program = """
import signal, sys, time
from minibeit import __main__
__main__._raise_where_it_is_safe()
class Slow:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
try:
    del_me = Slow()
    del del_me
    time.sleep(5)
except KeyboardInterrupt:
    print("first")
try:
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        pass
    time.sleep(5)
except KeyboardInterrupt:
    print("again")
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout.split() == ["first", "again"] and done.stderr == "" and time.monotonic() - started < 5


# Inputs --------------------------------------------------------------------------------------------------------------


def test_a_picture_from_standard_input(models, tmp_path):
    (picture,) = save_pictures(tmp_path, "a.png")
    for command, wanted in (
        (f"classify - -m {models['classify']} --json", "classify"),
        (f"mask - -m {models['mask']} --json", "mask"),
        (f"tokenize - -t {models['tokenizer']} --size 16 --json", "tokenize"),
        (f"segment - -m {models['segment']} -o {tmp_path}/out --json", "segment"),
    ):
        done = shell(f"minibeit {command} < {picture}")
        assert done.returncode == 0 and done.stderr == "", done.stderr
        piped = json.loads(done.stdout)
        same = json.loads(shell(f"minibeit {command.replace(' - ', f' {picture} ')}").stdout)
        if wanted == "classify":
            assert piped[0]["file"] == "-" and piped[0]["predictions"] == same[0]["predictions"]
        elif wanted == "tokenize":
            assert piped[0]["file"] == "-" and piped[0]["tokens"] == same[0]["tokens"]
        elif wanted == "mask":
            assert piped["tokens"] == same["tokens"]
        else:
            assert piped[0]["classes"] == same[0]["classes"] and piped[0]["labels"].endswith("stdin_labels.png")
    done = shell(f"echo text | minibeit classify - -m {models['classify']}")
    assert (
        done.returncode == 1 and done.stderr.startswith("minibeit: standard input: ") and done.stderr.count("\n") == 1
    )
    assert "minibeit-stdin" not in done.stderr


def test_jsonl_is_the_array_line_by_line(capsys, models, tmp_path):
    save_pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "c.png").touch()
    words = ["classify", tmp_path, "-m", models["classify"], "-q"]
    code, lines, _ = run(capsys, *words, "--jsonl")
    assert code == 1 and [json.loads(line) for line in lines.splitlines()] == json.loads(
        run(capsys, *words, "--json")[1]
    )


@pytest.mark.parametrize("form", ["lines", "list", "mapping"])
def test_labels_from_a_file(capsys, models, tmp_path, form):
    (picture,) = save_pictures(tmp_path, "a.png")
    mine = ["Ameise", "Biene", "Katze, klein", "Hund"]
    content = {"lines": "\n".join(mine) + "\n", "list": json.dumps(mine)}.get(form)
    file = tmp_path / "names"
    file.write_text(
        content or json.dumps({str(i): name for i, name in reversed(list(enumerate(mine)))}), encoding="utf-8"
    )
    words = ["classify", picture, "-m", models["classify"], "--json"]
    theirs = json.loads(run(capsys, *words)[1])[0]["predictions"]
    ours = json.loads(run(capsys, *words, "--labels", file)[1])[0]["predictions"]
    assert [p["label"] for p in ours] == [mine[NAMES.index(p["label"])] for p in theirs]
    for wrong in (
        "a\nb\n",
        '["a"',
        '{"0": "a", "2": "b"}',
        "[1, 2, 3, 4]",
        '{"x": "a"}',
        "[" * 99_999,
        b"\xff\xfe\x00",
    ):
        file.write_bytes(wrong if isinstance(wrong, bytes) else wrong.encode())
        code, out, err = run(capsys, *words, "--labels", file)
        assert code == 2 and not out and err.startswith("minibeit: error: --labels ") and err.count("\n") == 1
    code, _, err = run(capsys, *words, "--labels", tmp_path / "gone")
    assert code == 1 and "gone" in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["features", "mask", "segment"])
def test_a_model_must_be_named_where_the_shipped_one_makes_no_sense(capsys, tmp_path, command):
    (picture,) = save_pictures(tmp_path, "a.png")
    words = {"features": ["-o", tmp_path / "f.npz"], "segment": ["-o", tmp_path / "out"]}.get(command, [])
    code, out, err = run(capsys, command, picture, *words)
    assert code == 2 and not out and "--model" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "suffix, kind", [("PNG", "PNG"), ("JPEG", "JPEG"), ("GIF", "GIF"), ("WEBP", "WebP"), ("TIFF", "TIFF")]
)
def test_a_picture_given_as_a_checkpoint_is_called_one(capsys, tmp_path, suffix, kind):
    file = tmp_path / "model.safetensors"
    Image.new("RGB", (64, 64)).save(file, suffix)
    code, _, err = run(capsys, "inspect", file)
    assert code == 1 and f"is a {kind} image" in err and err.count("\n") == 1


# Outputs -------------------------------------------------------------------------------------------------------------


def outputs_of(command: str, models: dict, folder: Path, picture: Path) -> list:
    return {
        "features": ["features", picture, "-m", models["bare"], "-o", folder / "f.npz"],
        "features safetensors": ["features", picture, "-m", models["bare"], "-o", folder / "f.safetensors"],
        "mask": ["mask", picture, "-m", models["mask"], "-o", folder / "m.png"],
        "tokenize": ["tokenize", picture, "-t", models["tokenizer"], "--size", "16", "-o", folder / "t.png"],
        "segment": ["segment", picture, "-m", models["segment"], "-o", folder],
        "convert": ["convert", models["bare"], folder / "new"],
        "report": ["verify", "-m", models["bare"], "--report", folder / "r.html"],
        "trace": ["verify", "-m", models["bare"], "--save-trace", folder / "t.safetensors"],
        "bench": ["bench", "--size", "digits", "--json", folder / "b.json"],
    }[command]


UNUSABLE = {"report": 2, "trace": 2}  # of verify, where 1 means that something is out of budget
WRITING = ["features", "features safetensors", "mask", "tokenize", "segment", "convert", "report", "trace", "bench"]


@pytest.mark.parametrize("command", WRITING)
def test_outputs_are_checked_before_models_load(capsys, models, tmp_path, monkeypatch, command):
    (picture,) = save_pictures(tmp_path, "a.png")
    folder = tmp_path / "closed"
    folder.mkdir()
    opened = os.open

    def refuse(path, *more, **options):
        if files.MARK in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *more, **options)

    def loaded(*_, **__):
        pytest.fail("work was done before the output was checked")

    import minibeit.bench.measure
    import minibeit.checkpoint.convert  # has taken the name, so that what replaces it stays in this test
    import minibeit.checkpoint.load
    import minibeit.tokenizer.tokenizer

    monkeypatch.setattr(os, "open", refuse)
    for module in (minibeit.checkpoint.load, minibeit.checkpoint.convert):
        monkeypatch.setattr(module, "read_arrays", loaded)
    monkeypatch.setattr(minibeit.tokenizer.tokenizer, "read_tokenizer", loaded)
    monkeypatch.setattr(minibeit.bench.measure, "measure", loaded)
    code, out, err = run(capsys, *outputs_of(command, models, folder, picture))
    assert code == UNUSABLE.get(command, 1) and not out and err.count("\n") == 1
    assert "closed" in err and "Permission denied" in err and files.MARK not in err
    assert list(folder.iterdir()) == []


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))
from minibeit.cli import main
sys.exit(main(sys.argv[1:]))
"""


@posix
@pytest.mark.parametrize("command", [name for name in WRITING if name != "bench"])
def test_a_disk_that_fills_is_one_sentence_and_leaves_what_was_there(models, tmp_path, command):
    (picture,) = save_pictures(tmp_path, "a.png", size=(90, 90))
    folder = tmp_path / "out"
    folder.mkdir()
    words = list(map(str, outputs_of(command, models, folder, picture)))
    target = folder / {"segment": "a_labels.png", "convert": "new"}.get(command, Path(words[-1]).name)
    if command != "convert":
        target.write_bytes(b"precious")
    done = subprocess.run(
        [sys.executable, "-B", "-c", LIMITED, *words], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == UNUSABLE.get(command, 1), done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("minibeit: error: ") and last.endswith(": File too large") and files.MARK not in last
    assert str(target) in last
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    if command != "convert":
        assert target.read_bytes() == b"precious"
        assert [path.name for path in folder.iterdir()] == [target.name]
    else:
        assert list(folder.iterdir()) == []


def test_what_is_read_is_not_overwritten_by_any_of_its_names(capsys, models, tmp_path):
    (picture,) = save_pictures(tmp_path, "a.png")
    model = save(tmp_path / "model", "mask")
    before = {path: path.read_bytes() for path in (picture, *model.iterdir())}
    other = tmp_path / "b.png"
    os.link(picture, other)  # as on a file system that ignores case, one file has two names
    for words in (
        ["mask", picture, "-m", model, "-o", other],
        ["features", picture, "-m", model, "-o", model / "model.safetensors"],
        ["verify", "-m", model, "--save-trace", model / "model.safetensors"],
        ["verify", "-m", model, "--report", model / "config.json"],
        ["convert", model, model, "--force", "--dtype", "float16"],
        ["convert", model / "model.safetensors", model, "--force"],
    ):
        code, out, err = run(capsys, *words)
        assert code == 2 and not out and err.count("\n") == 1, (words, err)
    assert before == {path: path.read_bytes() for path in before}
    with pytest.raises(UsageError, match="is an input"):
        check_outputs([tmp_path / "." / "a.png"], [str(picture)])


def test_inputs_are_not_looked_at_where_no_file_is_written(monkeypatch):
    looked_at = []
    monkeypatch.setattr(minibeit.cli.inputs, "identity", lambda path: looked_at.append(path) or path)
    check_outputs([], ["a.png", "b.png"])
    assert not looked_at
    check_outputs([Path("c.png")], ["a.png"])
    assert looked_at == ["a.png", Path("c.png")]


def test_a_folder_never_holds_the_results_of_two_models(capsys, models, tmp_path):
    one, two = models["segment"], save(tmp_path / "other", "segment", initializer_range=0.2)
    save_pictures(tmp_path / "photos", "a.png", "b.png")
    (late,) = save_pictures(tmp_path, "c.png")
    out = tmp_path / "out"
    assert run(capsys, "segment", tmp_path / "photos", "-m", one, "-o", out, "--overlay", "--scores")[0] == 0
    assert run(capsys, "segment", late, "-m", one, "-o", out)[0] == 0  # the same model goes on
    (out / "mine_labels.png").write_bytes((tmp_path / "c.png").read_bytes())  # of no model
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, said, err = run(capsys, "segment", late, "-m", two, "-o", out)
    assert code == 2 and not said and err.count("\n") == 1
    assert "another model, segment;" in err and "--overwrite removes its 3 results" in err
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert run(capsys, "segment", late, "-m", two, "-o", out, "--overwrite")[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["c_labels.png", "c_legend.png", "mine_labels.png"]


# Published checkpoints -----------------------------------------------------------------------------------------------


def test_models_are_found_in_any_case_and_the_nearest_are_named(capsys):
    assert run(capsys, "models", "LARGE", "ImageNet-1K")[:2] == run(capsys, "models", "large", "imagenet-1k")[:2]
    code, out, err = run(capsys, "models", "microsoft/beit-base-patch16-225")
    assert code == 1 and not out and "microsoft/beit-base-patch16-224" in err and err.count("\n") == 1
    code, out, err = run(capsys, "models", "zebra", "--json")
    assert code == 1 and json.loads(out) == {} and "no published checkpoint matches zebra" in err
    code, out, _ = run(capsys, "models", "microsoft/beit-base-patch16-224-pt22k-ft22k")
    assert code == 0 and out.splitlines()[0].split()[5] == "MB" and " 410 " in out  # 102,557,713 times 4 bytes


def test_models_and_download_agree(capsys):
    for id, entry in catalogue.manifest().items():
        assert hub.is_hub_id(id) != ("file" in entry)
        if "file" in entry:
            code, out, err = run(capsys, "download", id)
            assert code == 1 and not out and entry["file"] in err and err.count("\n") == 1
    code, _, err = run(capsys, "download", "beit_base_patch16_224_pt22")
    assert code == 1 and "beit_base_patch16_224_pt22k" in err


@pytest.fixture
def hole(monkeypatch):
    """A server that takes connections and never answers; its address."""
    pytest.importorskip("huggingface_hub")
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{server.getsockname()[1]}"  # bound, but not listening: refused


def test_a_hub_that_is_not_there_is_said_at_once(capsys, hole, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", hole)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    started = time.monotonic()
    code, out, err = run(capsys, "download", "microsoft/beit-base-patch16-224")
    assert code == 1 and not out and time.monotonic() - started < 5
    first, last = err.splitlines()
    assert first == f"minibeit: looking for microsoft/beit-base-patch16-224 at {hole}"
    assert "could not be reached (127.0.0.1: Connection refused)" in last and "put config.json" in last


def test_silence_has_an_end(monkeypatch):
    def slow(*_):  # as a look-up of a name may be
        time.sleep(2)
        raise OSError("too late")

    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    monkeypatch.setattr(socket, "create_connection", slow)
    started = time.monotonic()
    assert hub._silence("https://example.org") == "no answer from example.org within 0 s"
    assert time.monotonic() - started < 1.5
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    assert hub._silence("https://example.org") is None  # the proxy knows


# The process ---------------------------------------------------------------------------------------------------------


def test_main_leaves_the_process_as_it_was(capsys, monkeypatch):
    import logging
    import warnings

    monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
    state = lambda: (  # noqa: E731
        dict(os.environ), os.getcwd(), sys.stdout.errors, warnings.filters[:], warnings.showwarning, sys.unraisablehook,
        signal.getsignal(signal.SIGINT), logging.getLogger("minibeit").handlers[:], Image.MAX_IMAGE_PIXELS,
    )  # fmt: skip
    environment = dict(os.environ)
    run(capsys, "classify", shipped_checkpoint() / "images", "-q")  # what is set when something is first imported
    before = state()
    assert before[0] == environment
    assert run(capsys, "classify", shipped_checkpoint() / "images")[0] == 0
    assert run(capsys, "models")[0] == 0
    assert state() == before
