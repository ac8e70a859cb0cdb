"""Strangers' bytes in every kind of file, through every command and report: nothing a terminal, a browser or a
spreadsheet obeys comes out, and messages stay short."""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import ENVIRONMENT, SIZE, config, run, save, save_pictures
from conftest import random_weights
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import minibeit.errors
from minibeit import BeitForImageClassification, text
from minibeit.checkpoint.formats import read_tensors, write_safetensors
from minibeit.cli import COMMANDS
from minibeit.errors import CheckpointError, DeviceError, ImageError
from minibeit.tasks import task_class
from minibeit.verify.lockstep import Job
from minibeit.verify.trace_file import save_trace

# ANSI and its 8-bit form, a title, a bell, NUL, backspace, DEL, line ends, directions, and what cannot be seen.
EVIL = (
    "\x1b[2J\x1b]0;owned\x07\x9b31m\x90q\x9c\x00\b\x7f\r\n\x85\u2028\u202egnp.exe\u2066\u200b\ufeff\U000e0041"
    "<script>alert(1)</script><img src=x onerror=alert(1)>|`x`![](http://x/y)"
)
FORMULA = '=HYPERLINK("http://x","\x1b[31m")'
LONG = EVIL + "A" * 20_000
ON_DISK = "\x1b[31m\x9bq\u202egnp\n<script>.png"
LONGEST_LINE = text.LONGEST + 200


def assert_harmless(shown: str, longest: int | None = LONGEST_LINE) -> None:
    for line in shown.split("\n"):
        assert line.isprintable(), ascii(line[:300])
        assert longest is None or len(line) <= longest, (len(line), line[:200])


def assert_harmless_run(result: tuple[int, str, str], longest: int | None = LONGEST_LINE) -> str:
    code, out, err = result
    assert code in (0, 1, 2), err
    assert_harmless(out, longest)
    assert_harmless(err)
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures with evil names, EXIF data and texts, whole and broken; a name that is no UTF-8."""
    folder = tmp_path_factory.mktemp("pictures")
    exif, info = Image.Exif(), PngInfo()
    exif[0x010E], exif[0x013B] = LONG.encode("utf-8", "replace").decode(), "\x1b[31m"
    info.add_itxt("Title", "\x1b[31m" + "A" * 999)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8))
    picture.save(folder / "plain.png", exif=exif, pnginfo=info)
    whole = (folder / "plain.png").read_bytes()
    if sys.platform == "win32":  # whose file systems take no such names
        return folder
    (folder / ON_DISK).write_bytes(whole)
    (folder / f"broken{ON_DISK}").write_bytes(whole[: len(whole) // 2])
    (folder / f"nothing{ON_DISK}").write_bytes(b"\x1b[31m")
    with open(os.fsencode(folder) + b"/\xff\xfe\x1b.png", "wb") as file:
        file.write(whole)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    labels = {0: LONG, 1: FORMULA, 2: EVIL, 3: "-1+1"}
    folder = tmp_path_factory.mktemp("models")
    return {kind: save(folder / kind, kind, id2label=labels) for kind in ("classify", "segment", "mask", "bare")}


def test_pictures_and_labels(capsys, checkpoints, place):
    for form in ([], ["--csv"], ["--json"], ["--jsonl"]):
        exact = form in (["--json"], ["--jsonl"], ["--csv"])
        out = assert_harmless_run(
            run(capsys, "classify", place, place / "gone\x1b[31m", "-m", checkpoints["classify"], *form),
            None if exact else LONGEST_LINE,
        )
        assert "alert" in out  # the labels are there
        if form == ["--json"]:
            labels = {p["label"] for row in json.loads(out) for p in row.get("predictions", [])}
            assert labels == {LONG, FORMULA, EVIL, "-1+1"}  # exactly what the checkpoint says
            assert str(place / "plain.png") in {row["file"] for row in json.loads(out)}
        if form == ["--jsonl"]:
            assert [json.loads(line)["file"] for line in out.splitlines()] == [
                r["file"]
                for r in json.loads(
                    run(capsys, "classify", place, place / "gone\x1b[31m", "-m", checkpoints["classify"], "--json")[1]
                )
            ]
        if form == ["--csv"]:
            cells = [cell for row in csv.reader(io.StringIO(out)) for cell in row]
            assert "'-1+1" in cells and not [cell for cell in cells if cell[:1] in "=@+\t" and cell]


def test_segment_mask_and_features(capsys, checkpoints, place, tmp_path):
    for form in ([], ["--json"]):
        shown = run(capsys, "segment", place, "-m", checkpoints["segment"], "-o", tmp_path / "o\x1b[31mut", *form)
        assert_harmless_run(shown, None if form else LONGEST_LINE)
        assert_harmless_run(run(capsys, "mask", place / "plain.png", "-m", checkpoints["mask"], *form), None)
    for file in sorted(place.iterdir()):
        words = ["-m", checkpoints["mask"], "-o", tmp_path / "m\x1b[31m.png"]
        assert_harmless_run(run(capsys, "mask", file, *words))
    output = tmp_path / "f\x1b[31m.npz"
    assert_harmless_run(run(capsys, "features", place, "-m", checkpoints["bare"], "-o", output))
    assert_harmless_run(run(capsys, "features", place, "-m", checkpoints["bare"], "-o", output, "--layer", "99"))
    assert_harmless_run(run(capsys, "features", place, "-m", checkpoints["bare"], "-o", tmp_path / "no\x1b" / "f.npz"))


def evil_checkpoints(folder: Path) -> list[Path]:
    """Files of every format with evil names of tensors, settings and metadata, of which nothing fits."""
    x = np.zeros((2, 2), np.float32)
    made = [folder / "evil.safetensors", folder / "prepared.safetensors", folder / "evil.npz", folder / "evil.pth"]
    tensors = {EVIL.replace("\udc00", ""): x, LONG: x, "\x1b[31m": x, **{f"{i}\x9b{'n' * 400}": x for i in range(50)}}
    write_safetensors(made[0], tensors, {"format": LONG, EVIL: EVIL})
    write_safetensors(made[1], tensors, {"format": "minibeit-prepared", "layout": LONG, "config": LONG})
    np.savez(made[2], **{"\x1b[31m\u202e" + "n" * 300: x})
    made[3].write_bytes(pickle.dumps({EVIL: 1, "state_dict": {LONG: EVIL, EVIL: [LONG]}}, 2))
    for name, settings in (
        ("labels", {"model_type": LONG, "hidden_act": EVIL}),
        ("architecture", {"architectures": [LONG], EVIL: LONG}),
        ("numbers", {"hidden_size": LONG, "image_size": [EVIL]}),
        ("nan", {"drop_path_rate": 0.5, "extra": float("nan")}),
    ):
        model = save(folder / f"{name}\x1b[31m", "classify")
        values = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**values, **settings}))
        (model / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": LONG, EVIL: EVIL}))
        made.append(model)
    model = save(folder / "stray", "classify")
    theirs = {name: np.array(array) for name, array in read_tensors(model).items()}
    del theirs["classifier.bias"]
    write_safetensors(model / "model.safetensors", {**theirs, **tensors})
    return [*made, model]


@pytest.mark.slow
def test_checkpoints(capsys, place, tmp_path):
    good = save(tmp_path / "good", "classify")
    for i, path in enumerate(evil_checkpoints(tmp_path)):
        assert_harmless_run(run(capsys, "inspect", path))
        shown = run(capsys, "inspect", path, "--json")
        assert_harmless_run(shown, None)
        if shown[1]:
            json.loads(shown[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert_harmless_run(run(capsys, "convert", path, tmp_path / f"to{i}"))
        assert_harmless_run(run(capsys, "classify", place / "plain.png", "-m", path))
        assert_harmless_run(run(capsys, "classify", place / "plain.png", "-m", path, "--debug"), None)
        assert_harmless_run(run(capsys, "features", place / "plain.png", "-m", path, "-o", tmp_path / "f.npz"))
        assert_harmless_run(run(capsys, "verify", "-m", path, "--list-names"))
        assert_harmless_run(run(capsys, "verify", "--weights", good, path))


def trace(folder: Path, names: dict[str, np.ndarray], **metadata: str) -> Path:
    """A good trace with more in it."""
    c, task = config(), "image_classification"
    pixels = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE), dtype=np.float32)
    arrays = random_weights(c, task, 0, "float32")
    job = Job(c, task, arrays, {"pixel_values": pixels})
    BeitForImageClassification(c, arrays=arrays).save_pretrained(folder)
    file = folder / "trace.safetensors"
    model = task_class(task)(c, arrays=arrays, backend="numpy")
    save_trace(file, job, lambda sink: model(**job.inputs, trace=sink), "made by nobody")
    tensors = {name: np.array(array) for name, array in read_tensors(file).items()} | names
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        known = opened.metadata()
    write_safetensors(file, tensors, {**known, **metadata})
    return file


def test_reports_of_a_hostile_trace(capsys, tmp_path):
    x = np.zeros((2, 2), np.float32)
    file = trace(tmp_path, {EVIL: x, LONG: x, "<script>alert(2)</script>|x": x}, made_by=EVIL, origins=LONG)
    reports = [tmp_path / f"report{suffix}" for suffix in (".html", ".md", ".json")]
    words = [word for path in reports for word in ("--report", path)]
    shown = run(capsys, "verify", "-m", tmp_path, "--against", file, *words)
    assert shown[0] == 0 and "alert(2)" in assert_harmless_run(shown, None)  # arrays beside the model are no fault
    page, paper, data = (path.read_text(encoding="utf-8") for path in reports)
    for content in (page, paper, data):
        assert_harmless(content, None)
        assert "alert(2)" in content
    for content in (page, paper):
        assert not re.search(r"<(img src=x|script>alert)", content)
    assert page.count("<script>") == 1  # our own
    assert "![](" not in paper and "|x" not in paper.replace("\\|", "")
    assert {EVIL, LONG} <= {row["name"] for row in json.loads(data)["rows"]}
    for metadata in ({"task": LONG}, {"config": LONG}, {"config": "[" * 100_000}, {"format": EVIL}):
        file = trace(tmp_path, {}, **metadata)
        assert_harmless_run(run(capsys, "verify", "-m", tmp_path, "--against", file))


@pytest.mark.parametrize("command", COMMANDS)
def test_words_of_the_command_line(capsys, command, tmp_path):
    """Words may come from a shell's glob or xargs."""
    for words in ([EVIL.replace("\x00", "")], ["--nope\x1b[31m"], ["x", "y", "z", f"-m{LONG}".replace("\x00", "")]):
        if command in ("warmup", "bench"):
            words = [f"--x{word}" for word in words]
        assert_harmless_run(run(capsys, command, *words), None)
    assert_harmless_run(run(capsys, "\x1b[31m"), None)


def test_errors_are_harmless_however_they_are_made():
    kinds = [
        kind
        for kind in vars(minibeit.errors).values()
        if isinstance(kind, type) and kind.__module__ == "minibeit.errors"
    ]
    assert {CheckpointError, ImageError, DeviceError} <= set(kinds)
    for kind in kinds:
        error = kind(f"/folder/file: {LONG} say what to do")
        assert_harmless(str(error), text.LONGEST)
        assert str(error).startswith("/folder/file: ") and str(error).endswith("say what to do")
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_nothing_prints_past_the_terminal_module():
    folder = Path(minibeit.cli.__file__).parent
    wrong = [
        f"{path.name}:{node.lineno}"
        for path in sorted(folder.glob("*.py"))
        if path.name != "terminal.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Name) and node.id == "print")
        or (isinstance(node, ast.Attribute) and node.attr in ("write", "print_exc") and "std" in ast.unparse(node))
    ]
    assert not wrong


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp932", "utf-8"])
def test_json_is_valid_in_every_encoding(tmp_path, encoding):
    model = save(tmp_path / "model", "classify", id2label={0: "Kätzchen 子猫 🐈", 1: EVIL, 2: "c", 3: "d"})
    (picture,) = save_pictures(tmp_path, "bild ü.png")
    for words in (["classify", picture, "-m", model, "--json"], ["inspect", model, "--json"]):
        environment = {**ENVIRONMENT, "PYTHONIOENCODING": encoding}
        done = subprocess.run(
            [sys.executable, "-m", "minibeit", *map(str, words)], capture_output=True, env=environment, check=True
        )
        found = json.dumps(json.loads(done.stdout.decode(encoding)), ensure_ascii=False)
        assert "Kätzchen 子猫 🐈" in found and json.dumps(EVIL, ensure_ascii=False)[1:-1] in found


def test_the_ways_to_show_text():
    assert text.one_line("a\n b\x1b[31m \udcff é") == "a b\\x1b[31m \\udcff é"
    assert text.shortened("abc" * 100, 50).count("[...]") == 1 and len(text.shortened("abc" * 100, 50)) == 50
    assert text.html('<a href="x">\x1b') == "&lt;a href=&quot;x&quot;&gt;\\x1b"
    assert text.markdown("a|b <i> `c` ![d](e)") == r"a\|b &lt;i&gt; \`c\` \!\[d\](e)"
    assert text.csv_line(["=1+1", "a,b", -1.5, 'q"', "＝1", "a\nb"]) == '\'=1+1,"a,b",-1.5,"q""",\'＝1,a\\nb'
    assert text.json_text({"a": [float("nan"), 1.5, True, None]}) == '{"a": [null, 1.5, true, null]}'
    for value in (EVIL, "é\U000e0041", "\ud800"):
        assert json.loads(text.json_text(value)) == value and text.json_text(value).isprintable()
    assert text.json_text("é", encoding="ascii") == '"\\u00e9"' and text.json_text("é", encoding="utf-8") == '"é"'
