"""What `minibeit finetune` writes, loaded by transformers, live: the same classes and the same logits."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from cli_helpers import run, save
from PIL import Image
from training_data import class_folders

from minibeit import BeitForImageClassification, BeitImageProcessor

pytestmark = pytest.mark.live
transformers.logging.set_verbosity_error()


def test_transformers_loads_what_was_fine_tuned(capsys, tmp_path):
    data, model, output = class_folders(tmp_path / "d"), save(tmp_path / "m", "classify"), tmp_path / "o"
    code, _, err = run(capsys, "finetune", data, "-m", model, "-o", output, "--epochs", 2, "--batch-size", 4)
    assert code == 0, err
    file = data / "red" / "0.png"
    theirs = transformers.AutoModelForImageClassification.from_pretrained(output).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(output, use_fast=False)
    assert theirs.config.id2label == {0: "green", 1: "red"}
    pixels = processor(Image.open(file).convert("RGB"), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = theirs(pixels).logits.numpy()
    own = BeitImageProcessor.from_pretrained(output)(file).pixel_values
    found = BeitForImageClassification.from_pretrained(output, backend="numpy")(own).logits
    np.testing.assert_allclose(found, expected, atol=1e-5)
