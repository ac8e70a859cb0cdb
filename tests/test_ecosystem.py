"""Habits of code written for transformers: the calls that do nothing here, and those that say how it is done."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make, tiny_config

import minibeit
from minibeit import BeitForImageClassification, BeitImageProcessor
from minibeit.catalogue import weights_folder

CONFIG = tiny_config()
PIXELS = np.random.default_rng(0).standard_normal((1, 3, 12, 8))


def model():
    return make(BeitForImageClassification, CONFIG)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.eval(),
        lambda m: m.train(False),
        lambda m: m.requires_grad_(False),
        lambda m: m.cpu(),
        lambda m: m.to("cpu"),
        lambda m: m.to(device="cpu", dtype="float64", non_blocking=True),
        lambda m: m.to("torch.float64"),
    ],
)
def test_what_is_so_already_gives_the_model_itself(call):
    m = model()
    assert call(m) is m


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.train(), "minibeit.value_and_grad"),
        (lambda m: m.cuda(), "'cuda' was asked for; load it with from_pretrained.*backend='cupy'"),
        (lambda m: m.to("cuda:1"), "'cuda:1' was asked for"),
        (lambda m: m.half(), "this model is float64, 'float16' was asked for"),
        (lambda m: m.float(), "'float32' was asked for"),
    ],
)
def test_what_is_done_otherwise_says_how(call, message):
    with pytest.raises(ValueError, match=message):
        call(model())


def test_parameters_are_counted_by_a_method():
    assert model().num_parameters() == model().num_parameters(only_trainable=True) > 0


def test_outputs_as_a_tuple():
    out, tuple_ = model()(PIXELS), model()(PIXELS, return_dict=False)
    assert isinstance(tuple_, tuple)
    assert len(tuple_) == 1
    assert np.array_equal(tuple_[0], out.logits)
    assert model()(PIXELS, return_dict=True).keys() == out.keys()


def test_a_misspelt_keyword_of_a_call_names_the_nearest():
    with pytest.raises(TypeError, match=r"unknown keyword 'output_hiden_states' .did you mean output_hidden_states"):
        model()(PIXELS, output_hiden_states=True)


def test_auto_classes_read_the_shipped_checkpoint():
    folder = weights_folder() / "digits"
    processor = minibeit.AutoImageProcessor.from_pretrained(folder)
    m = minibeit.AutoModelForImageClassification.from_pretrained(folder, backend="numpy").eval().to("cpu")
    inputs = processor(folder / "images" / "digit_3_0045.png", return_tensors="np").to("cpu")
    logits = m(**inputs).logits
    assert minibeit.AutoConfig.from_pretrained(folder).id2label[int(logits.argmax(-1)[0])] == "3"
    assert minibeit.Data2VecVisionModel is minibeit.BeitModel


def test_tensors_of_pytorch_where_it_is():
    torch = pytest.importorskip("torch")
    batch = BeitImageProcessor()(np.zeros((20, 20, 3), np.uint8), return_tensors="pt")
    assert isinstance(batch.pixel_values, torch.Tensor)
    assert batch["pixel_values"].shape == (1, 3, 224, 224)
