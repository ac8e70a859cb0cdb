"""What people see of models and results: signatures, docstrings, short texts, and what Jupyter draws."""

from __future__ import annotations

import inspect
import io
import pickle
import pydoc

import numpy as np
import pytest
from cli_helpers import NAMES, SIZE, config, save, save_pictures
from PIL import Image

import minibeit
from minibeit import (
    BeitBackbone,
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitImageProcessor,
    BeitModel,
    outputs,
    pipeline,
)

TASKS = [BeitModel, BeitForMaskedImageModeling, BeitForImageClassification, BeitForSemanticSegmentation, BeitBackbone]
OUTPUTS = [value for value in vars(outputs).values() if inspect.isclass(value) and hasattr(value, "to_tuple")]
PIXELS = np.zeros((2, 3, SIZE, SIZE), np.float32)


def classifier(**changes):
    return BeitForImageClassification(config(use_relative_position_bias=True, **changes), backend="numpy")


def segmenter():
    return BeitForSemanticSegmentation(config(out_indices=[1, 2, 3, 4]), backend="numpy")


# help() ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_call_shows_the_parameters_of_its_task(task):
    shown = inspect.signature(task.__call__).parameters
    assert [*inspect.signature(task.forward).parameters, "num_threads", "interpolate_pos_encoding", "return_dict"] == [
        *shown
    ]
    assert "pixel_values" in pydoc.render_doc(task.__call__) and task.__call__.__doc__ == task.forward.__doc__
    assert not [p for p in shown.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def test_configs_and_processors_show_their_fields():
    shown = inspect.signature(BeitConfig).parameters
    assert shown["hidden_size"].default == 768 and "num_labels" in shown and "self" not in shown
    shown = inspect.signature(BeitImageProcessor).parameters
    assert shown["do_resize"].default is True and "extra" in shown
    assert list(inspect.signature(BeitImageProcessor()).parameters)[:3] == [
        "images",
        "segmentation_maps",
        "return_tensors",
    ]


@pytest.mark.parametrize("kind", OUTPUTS, ids=lambda kind: kind.__name__)
def test_outputs_are_documented_with_shapes(kind):
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")
    for field in getattr(kind, "__dataclass_fields__", {}):
        text = inspect.getsource(next(base for base in kind.__mro__ if field in vars(base).get("__annotations__", {})))
        line = text[text.index(f"    {field}: ") :].split("\n")[1]
        assert line.strip().startswith('"""') and ("(" in line), (kind, field)


# Short texts ----------------------------------------------------------------------------------------------------------


def test_outputs_and_inputs_in_a_line():
    assert repr(classifier()(PIXELS)) == "ImageClassifierOutput(logits=float32 (2, 4))"
    output = classifier()(PIXELS, labels=[0, 1], output_hidden_states=True)
    assert repr(output) == (
        f"ImageClassifierOutput(loss={float(output.loss):.6g}, logits=float32 (2, 4), "
        "hidden_states=5 x float32 (2, 17, 16))"
    )
    inputs = BeitImageProcessor(size=SIZE)(np.zeros((9, 9, 3), np.uint8))
    assert repr(inputs) == "BatchFeature(pixel_values=float32 (1, 3, 16, 16))"
    maps = outputs.BackboneOutput(feature_maps=(np.zeros((1, 2)), np.zeros((1, 3))))
    assert repr(maps) == "BackboneOutput(feature_maps=(float64 (1, 2), float64 (1, 3)))"


# Jupyter --------------------------------------------------------------------------------------------------------------


def test_a_table_of_classes():
    model = classifier(id2label={0: "<b>", 1: "bee", 2: "cat", 3: "dog", 4: "emu", 5: "fox"})
    output = model(np.random.default_rng(0).standard_normal((10, 3, SIZE, SIZE)))
    table = output._repr_html_()
    assert table.count("<tr>") == 1 + 8 * 5 and "and 2 more images" in table
    assert "<b>" not in table and "&lt;b&gt;" in table
    assert model.config.id2label[int(output.logits[0].argmax())].replace("<b>", "&lt;b&gt;") in table
    assert pickle.loads(pickle.dumps(output))._repr_html_() == table
    assert "LABEL_3" in outputs.ImageClassifierOutput(logits=np.arange(4.0)[None])._repr_html_()
    assert outputs.ImageClassifierOutput()._repr_html_() is None


def test_a_map_of_classes():
    output = segmenter()(np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE)))
    drawn = np.asarray(Image.open(io.BytesIO(output._repr_png_())))
    from minibeit.colours import class_colours

    labels, colours = output.logits[0].argmax(0), class_colours(len(NAMES))
    zoom = 448 // SIZE
    for row, column in ((0, 0), (7, 9), (15, 15)):
        pixel = drawn[row * zoom + 1, column * zoom + 1]
        assert tuple(pixel) == colours[labels[row, column]]
    assert drawn.shape[0] >= 448 and drawn.shape[1] > 448  # the legend stands beside it
    assert outputs.SemanticSegmenterOutput()._repr_png_() is None


def test_results_of_pipelines_are_lists_that_jupyter_shows(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIBEIT_BACKEND", "numpy")
    (path,) = save_pictures(tmp_path, "a.png", size=(20, 24))
    result = pipeline("image-classification", save(tmp_path / "c", "classify"))(path, top_k=2)
    assert isinstance(result, list) and result._repr_html_().count("<tr>") == 3
    assert result[0]["label"] in result._repr_html_()
    pipe = pipeline("image-segmentation", save(tmp_path / "s", "segment"))
    for image in (path, np.asarray(Image.open(path)), Image.open(path).convert("P")):
        result = pipe(image)
        drawn = Image.open(io.BytesIO(result._repr_png_()))
        assert isinstance(result, list) and drawn.width > 24 and drawn.height >= 20
    assert pickle.loads(pickle.dumps(result))._repr_png_() == result._repr_png_()


def test_names_of_a_call_are_those_of_its_model():
    assert minibeit.BeitModel(config(), backend="numpy")(PIXELS).names == dict(enumerate(NAMES))
