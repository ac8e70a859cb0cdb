"""`minibeit verify`: exit codes, what it prints and writes, and its HTML report in a browser."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from cli_helpers import save_pictures
from verify_plant import after, job, model_of

from minibeit import BeitImageProcessor, Trace
from minibeit.checkpoint.save import save_checkpoint
from minibeit.cli import verify as command
from minibeit.cli.terminal import UsageError
from minibeit.task_table import CLASSES
from minibeit.verify.lockstep import check, model_source
from minibeit.verify.report_html import html
from minibeit.verify.trace_file import TraceFile

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def run(*words) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args([str(word) for word in words])
    return command.run(args)


@pytest.fixture
def model(tmp_path):
    """A folder with a tiny classifier."""
    made = job("image_classification")
    config = made.config.replace(architectures=["BeitForImageClassification"])
    save_checkpoint(tmp_path / "model", config, made.task, made.arrays)
    return tmp_path / "model"


def test_the_shipped_model_is_within_budget(capsys):
    assert run("--backend", "numpy", "--random-seed", 1) == 0
    out = capsys.readouterr().out
    assert re.search(r"^encoder\.0\.norm1 .* ok$", out, re.M)
    assert out.splitlines()[-1].startswith("OK: ")
    assert "as far from the truth as NumPy float32" in out


def test_every_task_and_its_options(tmp_path, capsys):
    for task in CLASSES:
        made = job(task)
        config = made.config.replace(architectures=[CLASSES[task]])
        save_checkpoint(tmp_path / task, config, task, made.arrays)
        assert run("--model", tmp_path / task, "--backend", "numpy", "-q") == 0, task
    assert run("--model", tmp_path / "model", "--dtype", "float64", "--size", "16x20", "-q", "--backend", "numpy") == 0


def test_only_and_lists(model, capsys):
    assert run("--model", model, "--only", "encoder.1.*", "--only", "logits", "--backend", "numpy") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("encoder.1.", "logits")) for line in lines[1:-1])
    assert run("--model", model, "--only", "nothing.*", "-q", "--backend", "numpy") == 2
    assert "nothing was compared" in capsys.readouterr().out
    assert run("--model", model, "--list-names") == 0
    assert re.search(r"encoder\.\*\.attention\.query +\(1, 3, 7, 4\)", capsys.readouterr().out)


def test_a_trace_from_elsewhere(model, tmp_path, capsys):
    trace = tmp_path / "t.safetensors"
    assert run("--model", model, "--save-trace", trace, "--backend", "numpy", "--random-seed", 3) == 0
    assert run("--model", model, "--against", trace, "-q") == 0
    with pytest.raises(ValueError, match="another image"):
        run("--model", model, "--against", trace, "--random-seed", 4)
    with pytest.raises(ValueError, match="another resolution"):
        run("--model", model, "--against", trace, "--size", "16x8")
    arrays = {name: np.array(array) for name, array in TraceFile(trace).items()}
    arrays["encoder.1.norm2"] += np.float32(0.1)
    from minibeit.checkpoint.formats import write_safetensors

    inputs = {f"input.{name}": array for name, array in TraceFile(trace).inputs.items()}
    write_safetensors(trace, {**arrays, **inputs}, TraceFile(trace).metadata)
    capsys.readouterr()
    assert run("--model", model, "--against", trace, "-q") == 1
    assert "encoder.1.norm2 (layer_norm)" in capsys.readouterr().out


def test_a_trace_of_another_task_or_with_strange_inputs(model, tmp_path):
    from minibeit.checkpoint.formats import write_safetensors

    other = job("masked_image_modeling")
    save_checkpoint(
        tmp_path / "mim", other.config.replace(architectures=[CLASSES[other.task]]), other.task, other.arrays
    )
    trace = tmp_path / "t.safetensors"
    assert run("--model", tmp_path / "mim", "--save-trace", trace, "--backend", "numpy") == 0
    assert run("--model", tmp_path / "mim", "--against", trace, "-q") == 0
    with pytest.raises(ValueError, match=r"takes pixel_values, the trace has input\.pixel_values, input\.bool_masked"):
        run("--model", model, "--against", trace)
    with pytest.raises(ValueError, match="another model: its task is masked_image_modeling"):
        run("--model", model, "--against", trace, "--random-seed", 0)
    write_safetensors(trace, {"input.pixel_values": np.zeros((3, 12, 8), np.float32)}, {"format": "minibeit-trace"})
    with pytest.raises(ValueError, match="pixel_values: expected shape"):
        run("--model", model, "--against", trace)


def test_a_mask_that_a_trace_lacks_is_said_and_not_replaced(tmp_path, capsys):
    from minibeit.checkpoint.formats import write_safetensors
    from minibeit.tasks import task_class

    made = job("masked_image_modeling")
    config = made.config.replace(architectures=[CLASSES[made.task]])
    save_checkpoint(tmp_path / "mim", config, made.task, made.arrays)
    pixels, picture = made.inputs["pixel_values"][:1], save_pictures(tmp_path, "a.png")[0]
    BeitImageProcessor(size={"height": 12, "width": 8}).save_pretrained(tmp_path / "mim")
    seen = BeitImageProcessor.from_pretrained(tmp_path / "mim")(str(picture)).pixel_values
    for inputs, words in (({"input.pixel_values": pixels}, ()), ({}, ("--image", picture))):
        trace = Trace()
        model = task_class(made.task)(config, arrays=made.arrays, backend="numpy")
        model(pixels if inputs else seen, trace=trace)  # no patch is masked
        write_safetensors(tmp_path / "t.safetensors", {**trace, **inputs}, {"format": "minibeit-trace"})
        assert run("--model", tmp_path / "mim", "--against", tmp_path / "t.safetensors", "-q", *words) == 0
        assert "no input.bool_masked_pos, so it was compared with a run in which no patch is masked" in (
            capsys.readouterr().out
        )


def test_what_could_not_be_compared_has_an_exit_code_of_its_own(model, tmp_path, capsys):
    from minibeit.checkpoint.formats import write_safetensors
    from minibeit.cli import main

    trace = tmp_path / "t.safetensors"
    assert run("--model", model, "--save-trace", trace, "--backend", "numpy") == 0
    words = ["verify", "--model", str(model), "-q", "--against"]
    assert main([*words, str(trace)]) == 0
    assert main([*words, str(trace), "--random-seed", "4"]) == 2  # another input than the trace's
    assert main([*words, str(tmp_path / "nowhere")]) == 2
    write_safetensors(trace, {"logits": np.zeros((2, 3), np.float32)}, {"format": "minibeit-trace"})
    assert main([*words, str(trace)]) == 2  # no input
    assert main([*words, str(trace), "--random-seed", "0"]) == 1  # logits of another shape
    assert main(["verify", "--only", "nothing.*", "-q", "--backend", "numpy"]) == 2
    assert capsys.readouterr().err.count("Traceback") == 0


def test_a_negative_seed_is_refused_before_any_work(capsys):
    with pytest.raises(SystemExit):
        run("--random-seed", -1)
    assert "expected an integer of at least 0, found '-1'" in capsys.readouterr().err


def test_reports_are_written(model, tmp_path, capsys):
    paths = [tmp_path / f"r.{ending}" for ending in ("html", "json", "md")]
    assert run("--model", model, "--backend", "numpy", "-q", *(w for p in paths for w in ("--report", p))) == 0
    values = json.loads(paths[1].read_text())
    assert values["ok"] is True
    assert values["rows"][0]["name"] == "embeddings.patches"
    assert sum(values["rows"][0]["own"]["ulps"]) == values["rows"][0]["own"]["size"]
    assert "| logits |" in paths[2].read_text()
    assert "<svg" in paths[0].read_text()


def test_golden_weights_and_bisect(model, tmp_path, capsys):
    assert run("--model", model, "--export-golden", tmp_path / "pack") == 0
    assert run("--model", model, "--against", tmp_path / "pack" / "float64.safetensors", "-q") == 0
    assert run("--weights", model, model) == 0
    assert "equal, bit for bit" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no fast op"):
        run("--model", model, "--bisect", "--backend", "numpy")


def test_wrong_calls(model, tmp_path):
    with pytest.raises(UsageError, match="--yardstick is for a trace"):
        run("--model", model, "--yardstick", "torch")
    with pytest.raises(UsageError, match=r"\.html, \.json, \.md"):
        run("--model", model, "--report", tmp_path / "r.pdf")
    with pytest.raises(UsageError, match="folder does not exist"):
        run("--model", model, "--report", tmp_path / "no" / "r.html")
    with pytest.raises(UsageError, match="--task"):
        run("--model", model, "--task", "poetry")
    with pytest.raises(SystemExit):
        run("--size", "12")
    with pytest.raises(FileNotFoundError):
        run("--model", model, "--against", tmp_path / "nothing.safetensors")


@pytest.mark.live
def test_pytorch_as_yardstick_and_as_trace(model, tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    square = tmp_path / "square"  # transformers reads the bias table of other grids its own way
    made = job("image_classification", image_size=12)
    save_checkpoint(square, made.config.replace(architectures=[CLASSES[made.task]]), made.task, made.arrays)
    for backend in ("numpy", "numba"):
        assert run("--model", square, "--backend", backend, "--against", "torch", "-q") == 0
        assert "as far from the truth as PyTorch" in capsys.readouterr().out
    trace = tmp_path / "torch.safetensors"
    assert run("--model", square, "--against", "torch", "--save-trace", trace) == 0
    assert TraceFile(trace).made_by.startswith("PyTorch")
    assert run("--model", square, "--against", trace, "-q") == 0
    capsys.readouterr()
    foreign = tmp_path / "foreign.safetensors"
    assert run("--model", square, "--backend", "numpy", "--save-trace", foreign) == 0
    assert run("--model", square, "--against", foreign, "--yardstick", "torch", "-q") == 0
    assert "as far from the truth as PyTorch" in capsys.readouterr().out
    assert run("--model", model, "--backend", "numpy", "--against", "torch", "-q") == 1
    assert "itself departs from the float64 reference" in capsys.readouterr().out


# The HTML report ----------------------------------------------------------------------------------------------------


def failing_report():
    made = job("semantic_segmentation")
    model = model_of(made)
    after("layer_norm", lambda y: y * np.float32(1.01), 2)(model)
    return check(made, model_source(made, model, "a <planted> fault"), heat=True)


class Outline(HTMLParser):
    """Addresses, and how often each element is opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.addresses += [value for name, value in attrs if name in ("src", "href")]


def test_html_needs_nothing_else_and_escapes_names():
    report = failing_report()
    page = html(report)
    outline = Outline(page)
    assert all(address.startswith("data:image/png;base64,") for address in outline.addresses)
    assert "http" not in page.replace("http-equiv", "")
    assert "@import" not in page
    assert "<planted>" not in page
    assert page.count("data-name=") == len(report.rows)
    assert outline.tags["svg"] == 2 + sum(row.own is not None for row in report.rows)
    assert outline.tags["img"] > 50
    assert "encoder.1.norm1" in page
    assert 'class="verdict bad"' in page


@pytest.mark.live
@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
def test_html_in_a_browser(tmp_path):
    page, picture = tmp_path / "r.html", tmp_path / "r.png"
    # Every script error, and the state after the script, end up in the title for --dump-dom to show.
    page.write_text(
        html(failing_report()).replace("<script>", "<script>window.onerror=m=>{document.title='ERROR '+m};", 1),
        encoding="utf-8",
    )
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
    options = [BROWSER, *quiet, "--disable-sync", "--window-size=1200,1600", f"--user-data-dir={tmp_path / 'profile'}"]
    dom = subprocess.run(
        [*options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "ERROR" not in re.search(r"<title>(.*?)</title>", dom.stdout).group(1)
    opened = re.findall(r'<tr class="more">', dom.stdout)  # the script opens the details of the first guilty row
    assert len(opened) == 1
    subprocess.run([*options, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=120, check=True)
    from PIL import Image

    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape[:2] == (1600, 1200)
    red = (np.abs(pixels.astype(int) - (209, 36, 47)).sum(-1) < 30).sum()
    assert red > 60  # the mark of the guilty op and the frame of the verdict
