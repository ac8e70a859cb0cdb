"""The snippets in transformers' own documentation of BEiT and Data2Vec-Vision, run with the import changed.

They are taken from the docstrings of the installed transformers.  Checkpoints and images that they fetch are replaced
by small ones of this machine; outputs that do not depend on the weights must be those that the docstrings show.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import sys
import types

import numpy as np
import pytest
from PIL import Image

from minibeit import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitImageProcessor,
    BeitModel,
)

pytestmark = pytest.mark.live

CHECKPOINTS = {
    "ImageClassification": (BeitForImageClassification, {"use_relative_position_bias": True}),
    "MaskedImageModeling": (BeitForMaskedImageModeling, {"use_mask_token": True}),
    "SemanticSegmentation": (BeitForSemanticSegmentation, {"out_indices": [1, 2, 3, 4], "auxiliary_channels": 8}),
    "Model": (BeitModel, {}),
    "Backbone": (BeitModel, {}),
    "Config": (BeitModel, {}),
}
CLASSES = [
    *("BeitConfig", "BeitForMaskedImageModeling", "BeitForImageClassification", "BeitForSemanticSegmentation"),
    *("BeitBackbone", "Data2VecVisionConfig", "Data2VecVisionForImageClassification"),
    "Data2VecVisionForSemanticSegmentation",
]


def snippets(name):
    """The examples in the docstrings of a class and its forward."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    texts = [kind.__doc__ or "", getattr(getattr(kind, "forward", None), "__doc__", "") or ""]
    return [example for text in texts for example in doctest.DocTestParser().get_examples(text.replace("```", ""))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for ending, (kind, settings) in CHECKPOINTS.items():
        config = BeitConfig(num_hidden_layers=4, intermediate_size=64, pool_scales=[1, 2], num_labels=5, **settings)
        kind(config, backend="numpy").save_pretrained(folder / ending)
        BeitImageProcessor(size=224).save_pretrained(folder / ending)
        made[ending] = str(folder / ending)
    return made


@pytest.fixture
def offline(monkeypatch):
    """What the snippets fetch images with, giving one of this machine."""
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(data, "PNG")
    response = types.SimpleNamespace(raw=io.BytesIO(data.getvalue()), read=data.getvalue, content=data.getvalue())
    image = Image.open(io.BytesIO(data.getvalue()))

    @contextlib.contextmanager
    def stream(*_):
        yield response

    def start():  # after transformers has imported the real ones
        modules = {name: types.ModuleType(name) for name in ("requests", "datasets")}
        modules["requests"].get = lambda *_, **__: response
        modules["datasets"].load_dataset = lambda *_, **__: {"test": {"image": [image]}}
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr("huggingface_hub.utils.httpx", types.SimpleNamespace(stream=stream), raising=False)

    monkeypatch.setenv("MINIBEIT_BACKEND", "numpy")
    return start


@pytest.mark.parametrize("name", CLASSES)
def test_snippets_of_docstrings(name, folders, offline):
    examples, names, checked = snippets(name), {}, 0
    assert examples, name
    offline()
    ending = next(ending for ending in CHECKPOINTS if name.endswith(ending))
    for example in examples:
        source = example.source.replace("from transformers import", "from minibeit import")
        source = re.sub(r'"(microsoft|facebook)/[\w.-]+"', repr(folders[ending]), source)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(source, name, "single"), names)
        if "shape" in source and example.want:
            assert out.getvalue() == example.want
            checked += 1
    assert "transformers" not in {getattr(value, "__module__", "").partition(".")[0] for value in names.values()}
    assert checked or not any("shape" in example.source and example.want for example in examples)
