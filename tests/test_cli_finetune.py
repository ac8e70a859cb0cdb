"""`minibeit finetune`: from pictures to a folder that classifies, and a sentence for everything that cannot be."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import ENVIRONMENT, HOME, run, save, start
from training_data import class_folders, picture

from minibeit import BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling, BeitImageProcessor
from minibeit.checkpoint.load import load_checkpoint
from minibeit.cli import _parser
from minibeit.cli.terminal import StatusLine
from minibeit.train import start as training_start
from minibeit.train.examples import read_examples
from minibeit.train.state import STATE_NAME

QUICK = ("--epochs", 1, "--batch-size", 4, "--backend", "numpy", "--threads", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), "classify")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("data"), 4)


def rows_of(folder, *rows, name="list.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# What works -----------------------------------------------------------------------------------------------------------


def test_the_result_classifies(capsys, data, model, tmp_path):
    output = tmp_path / "out"
    words = ("finetune", data, "--model", model, "--output", output, *QUICK, "--epochs", 8, "--lr", 0.02)
    code, out, err = run(capsys, *words, "--recipe", "tiny")
    assert code == 0 and "best epoch" in out and "held_out_top1" in out, err
    assert "6 pictures to learn from, 2 held out, 2 classes: green, red" in err and "GB of memory" in err
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "log.jsonl", "curves.png"} <= names
    config = json.loads((output / "config.json").read_text())
    assert config["id2label"] == {"0": "green", "1": "red"} and config["label2id"] == {"green": 0, "red": 1}
    assert config["problem_type"] == "single_label_classification"
    code, out, _ = run(capsys, "classify", data / "red" / "0.png", "--model", output, "--json", "--backend", "numpy")
    assert code == 0 and json.loads(out)[0]["predictions"][0]["label"] in ("red", "green")


def test_from_scratch_and_a_given_split(capsys, tmp_path):
    class_folders(tmp_path / "d" / "train", 4), class_folders(tmp_path / "d" / "val", 2)
    words = ("finetune", tmp_path / "d", "--from-scratch", "tiny", "--recipe", "tiny", "--output", tmp_path / "o")
    code, _, err = run(capsys, *words, *QUICK)
    assert code == 0 and "8 pictures to learn from, 4 held out" in err
    assert BeitConfig.from_pretrained(tmp_path / "o").hidden_size == 64


def test_several_labels_from_csv(capsys, model, tmp_path):
    lines = ["path,labels,split"]
    for i in range(8):
        file = picture(tmp_path / f"{i}.png", ("red", "green")[i % 2], i)
        lines.append(f"{file.name},{('warm;dark', 'dark')[i % 2]},{('train', 'val')[i > 5]}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    code, out, err = run(capsys, "finetune", tmp_path / "list.csv", "-m", model, "-o", tmp_path / "o", *QUICK)
    assert code == 0 and "held_out_f1" in out, err
    assert json.loads((tmp_path / "o/config.json").read_text())["problem_type"] == "multi_label_classification"


def test_numbers_from_json_lines(capsys, model, tmp_path):
    for i in range(8):
        picture(tmp_path / f"{i}.png", "red", i)
    data = rows_of(tmp_path, *({"path": f"{i}.png", "values": [i / 8, 1.0]} for i in range(8)))
    code, out, err = run(capsys, "finetune", data, "-m", model, "-o", tmp_path / "o", *QUICK)
    assert code == 0 and "held_out_rmse" in out, err
    model = BeitForImageClassification.from_pretrained(tmp_path / "o", backend="numpy")
    assert model.config.problem_type == "regression" and model.config.num_labels == 2


def test_a_pretrained_table_is_copied_to_the_blocks(data, tmp_path):
    config = BeitConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=4,
        vocab_size=30, use_mask_token=True, use_shared_relative_position_bias=True,
    )  # fmt: skip
    pretrained = BeitForMaskedImageModeling(config, backend="numpy")
    pretrained.arrays["beit.shared_bias_table"][...] = np.random.default_rng(0).standard_normal((52, 2))
    pretrained.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="copied to each of the 2 blocks"):
        model = training_start.from_checkpoint(tmp_path, read_examples(data))
    for block in model.params.beit.encoder:
        np.testing.assert_array_equal(block.bias_table, pretrained.arrays["beit.shared_bias_table"])
    assert "beit.embeddings.mask_token" not in model.arrays  # which is what is saved
    assert model.params.beit.embeddings.mask_token is None and model.config.use_relative_position_bias
    assert 0 < np.abs(model.arrays["classifier.weight"]).max() < 1e-3


def test_kept_classes_keep_the_head(capsys, model, tmp_path):
    for name in ("ant", "bee"):
        for i in range(3):
            picture(tmp_path / "d" / name / f"{i}.png", "red", i + len(name))
    words = ("-m", model, "-o", tmp_path / "o", "--keep-classes", "--freeze", "encoder", "--lr", 1e-12)
    code, _, err = run(capsys, "finetune", tmp_path / "d", *words, *QUICK)
    assert code == 0, err
    before, after = (load_checkpoint(folder, "image_classification") for folder in (model, tmp_path / "o"))
    assert after[0].id2label == before[0].id2label
    np.testing.assert_allclose(after[1]["classifier.weight"], before[1]["classifier.weight"], atol=1e-9)
    picture(tmp_path / "d" / "wasp" / "0.png", "red", 99)
    code, _, err = run(capsys, "finetune", tmp_path / "d", *words[:2], "-o", tmp_path / "p", "--keep-classes", *QUICK)
    assert code == 1 and "expected the classes of the model's config" in err and "wasp" in err


def test_a_linear_probe_reports_every_block(capsys, data, model, tmp_path):
    words = ("finetune", data, "-m", model, "-o", tmp_path / "o", "--linear-probe", "--epochs", 20, "--lr", 0.05)
    code, out, err = run(capsys, *words, "--backend", "numpy")
    assert code == 0, err
    assert out.splitlines()[0].split() == ["block", "loss", "top1", "top5"] and len(out.splitlines()) == 6
    scores = json.loads((tmp_path / "o/linear_probe.json").read_text())
    assert len(scores["blocks"]) == 4 and scores["blocks"][scores["best_block"]]["top1"] == 1.0


def test_unreadable_pictures_are_named_and_left_out(capsys, model, tmp_path):
    class_folders(tmp_path / "d", 3)
    (tmp_path / "d" / "red" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    code, _, err = run(capsys, "finetune", tmp_path / "d", "-m", model, "-o", tmp_path / "o", *QUICK)
    assert code == 0 and "left out: " in err and "torn.png" in err


def test_pictures_in_both_parts_are_warned_of(capsys, model, tmp_path):
    class_folders(tmp_path / "d" / "train", 3), class_folders(tmp_path / "d" / "val", 1)
    code, _, err = run(capsys, "finetune", tmp_path / "d", "-m", model, "-o", tmp_path / "o", *QUICK)
    assert code == 0 and "warning: 2 held-out images are also in the training part" in err


# Long work ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_says_how_to_go_on(data, model, tmp_path, which):
    words = ("finetune", data, "-m", model, "-o", tmp_path / "o", *QUICK, "--epochs", 100000)
    process = start(*words)
    deadline = time.monotonic() + 60
    while not (tmp_path / "o" / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(which)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command with --resume goes on" in err, err
    assert (tmp_path / "o" / STATE_NAME).is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_full_disk_is_a_sentence_and_keeps_what_was_there(data, model, tmp_path):
    output = tmp_path / "o"
    words = ["finetune", data, "-m", model, "-o", output, *QUICK]
    import resource

    limit = 30_000  # bytes of a file: less than the model
    command = [sys.executable, "-m", "minibeit", *map(str, words)]

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, preexec_fn=limited, cwd=HOME)
    assert done.returncode == 1 and "error: " in done.stderr and "File too large" in done.stderr
    assert "Traceback" not in done.stderr and "tmp" not in done.stderr.split("error: ")[1].split("/o/")[-1]
    assert not [name for name in os.listdir(output) if name.startswith((".minibeit", "model.safetensors"))]


def test_too_little_memory_is_said_with_what_fits(capsys, data, model, tmp_path, monkeypatch):
    need = training_start.memory_needed(
        load_checkpoint(model, "image_classification")[0], False, False, "image_classification"
    )
    monkeypatch.setattr(training_start, "available_memory", lambda: need.total(2))
    code, _, err = run(capsys, "finetune", data, "-m", model, "-o", tmp_path / "o", *QUICK)
    assert code == 1 and "pieces of 4 pictures will take" in err and "--accumulate 2 fits" in err
    assert not (tmp_path / "o").exists()
    assert run(capsys, "finetune", data, "-m", model, "-o", tmp_path / "o", *QUICK, "--accumulate", 2)[0] == 0
    monkeypatch.setattr(training_start, "available_memory", lambda: need.fixed)
    assert "try --recompute" in run(capsys, "finetune", data, "-m", model, "-o", tmp_path / "p", *QUICK)[2]


# What cannot be -------------------------------------------------------------------------------------------------------


def empty_class(folder):
    class_folders(folder)
    (folder / "blue").mkdir()


def one_class(folder):
    class_folders(folder, colors=("red",))


def unreadable_class(folder):
    class_folders(folder)
    (folder / "blue").mkdir()
    (folder / "blue" / "0.png").write_text("no picture")


def unknown_class_held_out(folder):
    class_folders(folder / "train")
    class_folders(folder / "val", colors=("red", "blue"))


def segmentation(folder):
    for name in ("images", "annotations"):
        picture(folder / name / "0.png", "red", 0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (empty_class, "blue: this class is empty"),
        (one_class, "expected at least two classes, found only ['red']"),
        (unreadable_class, "no image of the class 'blue' to learn from can be read"),
        (unknown_class_held_out, "found also ['blue']"),
        (segmentation, "one folder per class"),
        (lambda folder: folder.mkdir(), "expected a folder for each class"),
        (lambda folder: None, "there is no such folder or list"),
    ],
)
def test_folders_that_teach_nothing(capsys, model, tmp_path, make, sentence):
    make(tmp_path / "d")
    code, out, err = run(capsys, "finetune", tmp_path / "d", "-m", model, "-o", tmp_path / "o", *QUICK)
    assert code == 1 and sentence in err and err.count("error:") == 1 and not out
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"path": "0.png", "label": "0.png"}, "label maps are for --task segmentation"),
        ({"path": "0.png", "label": [[0, 1], [1, 0]]}, "label maps are for --task segmentation"),
        ({"path": "0.png", "label": ""}, "expected the name of a class, found nothing"),
        ({"path": "0.png"}, "expected path and one of label, labels, value, values"),
        ({"path": "0.png", "value": "high"}, "expected value to be a number, found 'high'"),
        ({"path": "", "label": "a"}, "expected the path of an image"),
        ({"path": "0.png", "label": "a", "split": "dev"}, "expected split train or val, found 'dev'"),
        ({"path": "none.png", "label": "a"}, "none of the 1 images can be read"),
    ],
)
def test_lines_that_teach_nothing(capsys, model, tmp_path, row, sentence):
    picture(tmp_path / "0.png", "red", 0)
    data = rows_of(tmp_path, row)
    code, _, err = run(capsys, "finetune", data, "-m", model, "-o", tmp_path / "o", *QUICK)
    assert code == 1 and sentence in err


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", b"path,label\n\xff\xfe,a\n", "expected UTF-8 text in lines"),
        ("a.csv", b"path,label\n", "found no line"),
        ("a.csv", b"path,label\n0.png\n", "line 2: expected the name of a class, found nothing"),
        ("a.jsonl", b'{"path": "0.png", "label": "a"}\n{"path": ', "line 2: expected a JSON object"),
        ("a.jsonl", b'[["0.png", "a"]]', "line 1: expected a JSON object"),
        ("a.jsonl", b"[" * 100000, "line 1: expected"),
        ("a.txt", b"0.png a", "expected a folder, a .csv or a .jsonl file, found .txt"),
    ],
)
def test_lists_that_are_none(capsys, model, tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    code, _, err = run(capsys, "finetune", tmp_path / name, "-m", model, "-o", tmp_path / "o", *QUICK)
    assert code == 1 and sentence in err and f"{name}" in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--lr", "0"), "--lr: expected a learning rate above 0, found 0.0"),
        (("--lr", "nan"), "--lr: expected a learning rate above 0, found nan"),
        (("--layer-decay", "2"), "--layer-decay: expected a number above 0"),
        (("--freeze", "*"), "--freeze: nothing is left to be learned"),
        (("--linear-probe", "--freeze", "1"), "--linear-probe: expected --model"),
    ],
)
def test_words_that_make_no_training(capsys, data, model, tmp_path, words, sentence):
    code, _, err = run(capsys, "finetune", data, "-m", model, "-o", tmp_path / "o", *QUICK, *words)
    assert code == 2 and sentence in err and not (tmp_path / "o").exists()


def test_what_is_there_is_not_overwritten(capsys, data, model, tmp_path):
    output = tmp_path / "o"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    words = ("finetune", data, "-m", model, "-o", output, *QUICK)
    code, _, err = run(capsys, *words)
    assert code == 2 and "this folder exists; choose another --output" in err
    assert run(capsys, *words, "--overwrite")[0] == 0 and (output / "mine.txt").read_text() == "mine"
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    code, _, err = run(capsys, *words, "--resume", "--epochs", 3)
    assert code == 1 and "was saved with other settings" in err
    code, _, err = run(capsys, *words, "--resume", "--image-size", 24)
    assert code == 1 and "was saved with other config" in err
    assert before == {path.name: path.read_bytes() for path in output.iterdir()}
    code, _, err = run(capsys, *words[:4], "-o", tmp_path / "none", "--resume", *QUICK)
    assert code == 1 and "no stopped training here" in err and not (tmp_path / "none").exists()
    code, _, err = run(capsys, "finetune", data, "-m", model, "-o", model, *QUICK, "--overwrite")
    assert code == 2 and "holds what --model names, which is not overwritten" in err


def test_split_is_by_class_and_seed(data):
    first, same, other = (read_examples(data, 0.25, seed) for seed in (0, 0, 1))
    assert first == same and first != other
    assert sorted(e.label for e in first.held_out) == ["green", "red"]


def test_the_processor_has_the_size_of_the_model(model):
    config = BeitConfig.from_pretrained(model, image_size=24)
    assert training_start.processor_for(config, model).size == {"height": 24, "width": 24}
    assert isinstance(training_start.processor_for(config, None), BeitImageProcessor)


def test_the_status_line_is_overwritten_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with StatusLine(quiet=False) as line:
        line.show("step 1 of 10\x1b[2J")
        line.last = 0.0
        line.show("step 2")
    assert sys.stderr.getvalue() == "\rstep 1 of 10\\x1b[2J\rstep 2" + " " * 13 + "\r" + " " * 6 + "\r"
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with StatusLine(quiet=False) as line:
        line.show("step 1"), line.show("step 2")
    assert sys.stderr.getvalue().count("step 1") == 1 and "step 2" not in sys.stderr.getvalue()


def test_the_example_of_the_guide_runs(capsys, model, tmp_path, monkeypatch):
    text = (Path(__file__).resolve().parents[1] / "docs" / "finetune.md").read_text(encoding="utf-8")
    program = text.partition("```python\n")[2].partition("```")[0]
    class_folders(tmp_path / "flowers", 4)
    (tmp_path / "checkpoint").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    exec(program.replace("epochs=10", "epochs=1").replace("batch_size=32", "batch_size=4"), {})
    assert 0 <= float(capsys.readouterr().out) <= 1 and (tmp_path / "flowers-beit" / "model.safetensors").is_file()


def test_the_options_that_the_guide_names_exist():
    text = (Path(__file__).resolve().parents[1] / "docs" / "finetune.md").read_text(encoding="utf-8")
    known = {
        option
        for command in ("finetune", "bench")
        for action in _parser(command)._subparsers._group_actions[0].choices[command]._actions
        for option in action.option_strings
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known
