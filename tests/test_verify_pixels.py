"""Pixels are judged before the model, with a tolerance and mistakes of their own."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
from PIL import Image
from verify_plant import job, model_of

from minibeit import BeitImageProcessor, Trace
from minibeit.checkpoint.formats import write_safetensors
from minibeit.checkpoint.save import save_checkpoint
from minibeit.cli import verify as command
from minibeit.task_table import CLASSES
from minibeit.verify.pixels import judge
from minibeit.verify.trace_file import FORMAT

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SETTINGS = dict(size={"height": 12, "width": 8}, do_center_crop=False, resample=2, image_mean=MEAN, image_std=STD)
MEAN_, STD_ = np.reshape(MEAN, (3, 1, 1)), np.reshape(STD, (3, 1, 1))


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8)


def whole(picture) -> np.ndarray:
    """Grey levels 0 to 255 after resizing."""
    return BeitImageProcessor(**{**SETTINGS, "do_normalize": False, "do_rescale": False})(picture)["pixel_values"]


def test_other_orders_of_rounding_are_no_fault(picture):
    processor, x = BeitImageProcessor(**SETTINGS), whole(picture).astype(np.float32)
    mean, std = MEAN_.astype(np.float32), STD_.astype(np.float32)
    for pixels in (
        (x / np.float32(255) - mean) / std,
        (x - mean * np.float32(255)) / (std * np.float32(255)),
        x * (np.float32(1 / 255) / std) - mean / std,
        ((x.astype(np.float64) / 255 - MEAN_) / STD_).astype(np.float32),
    ):
        row = judge(pixels, processor, picture)
        assert row.ok, row.note
        assert row.own.max_abs < 2e-6


MISTAKES = {
    "BGR for RGB": lambda x: ((x / 255)[:, ::-1] - MEAN_) / STD_,
    "not normalised: they lie between 0 and 1": lambda x: x / 255,
    "between 0 and 255": lambda x: x,
    "divided by 256 instead of 255": lambda x: (x / 256 - MEAN_) / STD_,
    "without being divided by 255": lambda x: (x - MEAN_) / STD_,
    "are 0.5 (the Inception convention)": lambda x: (x / 255 - 0.5) / 0.5,
    "and standard deviation are in the order BGR": lambda x: (x / 255 - MEAN_[::-1]) / STD_[::-1],
    "mirrored": lambda x: ((x / 255)[..., ::-1] - MEAN_) / STD_,
    "mean is not subtracted": lambda x: x / 255 / STD_,
}


@pytest.mark.parametrize("says", MISTAKES)
def test_known_mistakes_are_named(says, picture):
    row = judge(MISTAKES[says](whole(picture)).astype(np.float32), BeitImageProcessor(**SETTINGS), picture)
    assert row.status == "own"
    assert says in row.note


def test_another_filter_and_an_unknown_fault(picture):
    processor = BeitImageProcessor(**SETTINGS)
    row = judge(processor(picture, resample=3)["pixel_values"], processor, picture)
    assert row.note == "resized with another filter: bicubic instead of bilinear"
    pixels = processor(picture)["pixel_values"].copy()
    pixels[0, 1, 2, 3] += np.float32(1 / 255 / STD[1])
    row = judge(pixels, processor, picture)
    assert row.status == "own"
    assert row.note.startswith("up to 1 grey levels of 255 off")
    row = judge(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), processor, picture)
    assert row.status == "shape"
    assert "channels last" in row.note


def run(*words) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_the_command_judges_pixels_first(tmp_path, picture, capsys):
    made = job("image_classification")
    save_checkpoint(tmp_path / "m", made.config.replace(architectures=[CLASSES[made.task]]), made.task, made.arrays)
    processor = BeitImageProcessor(**SETTINGS)
    processor.save_pretrained(tmp_path / "m")
    Image.fromarray(picture).save(tmp_path / "p.png")

    def verdict_on(pixels, with_input=True, *more) -> tuple[int, str]:
        trace = Trace()
        model_of(made)(pixels, trace=trace)
        arrays = dict(trace) | ({"input.pixel_values": pixels} if with_input else {})
        write_safetensors(tmp_path / "t.safetensors", arrays, {"format": FORMAT})
        code = run("--model", tmp_path / "m", "--against", tmp_path / "t.safetensors", "-q", *more)
        return code, capsys.readouterr().out

    image = "--image", tmp_path / "p.png"
    pixels = processor(picture)["pixel_values"]
    code, said = verdict_on(pixels * np.float32(1 + 2e-7), True, *image)
    assert (code, said.startswith("OK")) == (0, True)
    assert "preprocessing" not in said
    code, said = verdict_on(np.ascontiguousarray(pixels[:, ::-1]), True, *image)
    assert code == 1
    assert "input.pixel_values (image processor)" in said
    assert "embeddings" not in said  # the model did right with what it got
    code, said = verdict_on(pixels)
    assert code == 0
    assert "preprocessing was not looked at" in said
    assert "preprocessing was not looked at" in verdict_on(pixels, False, *image)[1]
    with pytest.raises(ValueError, match=r"has no array input\.pixel_values"):
        verdict_on(pixels, False)
