"""A user's script under mypy --strict and pyright's strict mode: calls have the types of their tasks' outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import minibeit

pytestmark = pytest.mark.slow
HOME = Path(minibeit.__file__).resolve().parents[1]
SCRIPT = """
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import minibeit
from minibeit import (
    AutoModelForImageClassification,
    BeitBackbone,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitImageProcessor,
    BeitModel,
)

if TYPE_CHECKING:
    from typing_extensions import reveal_type

folder = Path("digits")
processor = BeitImageProcessor.from_pretrained(folder)
inputs = processor(folder / "image.png", return_tensors="np")
model = BeitForImageClassification.from_pretrained(folder, dtype="float32").eval().to("cpu")
reveal_type(model)
reveal_type(model(**inputs))
reveal_type(AutoModelForImageClassification.from_pretrained(folder)(**inputs))
reveal_type(BeitModel.from_pretrained(folder)(inputs["pixel_values"]))
reveal_type(BeitForMaskedImageModeling.from_pretrained(folder)(**inputs))
reveal_type(BeitForSemanticSegmentation.from_pretrained(folder)(**inputs))
reveal_type(BeitBackbone.from_pretrained(folder)(**inputs))
label = model.config.id2label[int(model(**inputs).logits.argmax(-1)[0])]
print(label.upper())
for states in model(**inputs, output_hidden_states=True).hidden_states or ():
    print(states.shape)
classify = minibeit.pipeline("image-classification", model, top_k=3)
print(classify([folder / "image.png"], batch_size=2))
for batch in minibeit.read_ahead([folder / "image.png"], processor):
    print(batch.pixel_values.shape)
config = minibeit.BeitConfig(hidden_size=768, num_labels=3)
print(config.replace(image_size=384).image_shape, model.num_parameters())
"""
REVEALED = [
    "BeitForImageClassification",
    "ImageClassifierOutput",
    "ImageClassifierOutput",
    "BeitModelOutputWithPooling",
    "MaskedLMOutput",
    "SemanticSegmenterOutput",
    "BackboneOutput",
]


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return file


def check(types: list[str]) -> None:
    assert [one.rpartition(".")[2] for one in types] == REVEALED


def test_mypy(script):
    pytest.importorskip("mypy")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--cache-dir",
        script.parent / "cache",
        script,
    ]
    source = (HOME / "setup.cfg").exists()  # an installed package is found by itself, and not from its own folder
    done = subprocess.run(command, capture_output=True, text=True, cwd=HOME if source else script.parent)
    errors = [line for line in done.stdout.splitlines() if "error:" in line and line.startswith(str(script))]
    assert not errors, done.stdout
    check([line.split('"')[1] for line in done.stdout.splitlines() if "Revealed type" in line])


def test_pyright(script):
    if find_spec("pyright") is None:
        pytest.skip("pyright is not installed")
    settings = {"include": [str(script)], "extraPaths": [str(HOME)], "typeCheckingMode": "strict"}
    (script.parent / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", script.parent]
    done = subprocess.run(command, capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert not [one["message"] for one in found if one["severity"] == "error"]
    check([one["message"].rpartition(' is "')[2].rstrip('"') for one in found if one["message"].startswith("Type of")])
