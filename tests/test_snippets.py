"""Code as it is written for transformers, the import changed: inference with BEiT, DiT and Data2Vec-Vision.

The snippets of transformers' own documentation are run by test_live_snippets.py.
"""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from cli_helpers import NAMES, save, save_pictures
from PIL import Image

import minibeit
from minibeit import BeitForImageClassification, BeitImageProcessor, BeitModel


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv("MINIBEIT_BACKEND", "numpy")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: str(save(folder / kind, kind)) for kind in ("classify", "segment", "mask", "bare")}


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    (path,) = save_pictures(tmp_path_factory.mktemp("images"), "a.png")
    return Image.open(path)


def test_dit_classifies_a_document(models, image):
    from minibeit import AutoImageProcessor, AutoModelForImageClassification

    processor = AutoImageProcessor.from_pretrained(models["classify"], use_fast=True)
    model = AutoModelForImageClassification.from_pretrained(models["classify"], device_map="auto", dtype="auto")
    inputs = processor(images=image.convert("RGB"), return_tensors="np").to(model.device)
    outputs = model(**inputs)
    predicted = outputs.logits.argmax(-1).item()
    assert model.config.id2label[predicted] in NAMES
    assert outputs["logits"].shape == (1, model.config.num_labels)


def test_old_names_of_the_processor(image):
    extractor = minibeit.AutoFeatureExtractor(size=16)
    assert extractor.reduce_labels is False and extractor(image, return_tensors="np").keys() == {"pixel_values"}
    extractor.reduce_labels = True
    assert extractor.do_reduce_labels is True
    assert BeitImageProcessor(reduce_labels=True).reduce_labels is True
    assert minibeit.BeitImageProcessorPil is minibeit.BeitImageProcessorFast is BeitImageProcessor


def test_names_of_data2vec(models):
    config = minibeit.Data2VecVisionConfig(hidden_size=12, num_attention_heads=2, num_hidden_layers=1)
    assert (config.model_type, config.hidden_size) == ("data2vec-vision", 12)
    assert minibeit.Data2VecVisionConfig.from_pretrained(models["bare"]).model_type == "beit"
    model = minibeit.Data2VecVisionModel(config).eval()
    assert isinstance(model, minibeit.Data2VecVisionPreTrainedModel) and model.config is config
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_model_without_its_pooling_layer(models):
    model = BeitModel.from_pretrained(models["bare"], add_pooling_layer=False)
    pixels = np.zeros((1, 3, 16, 16), np.float32)
    assert "pooler_output" not in model(pixels) and "pooler_output" in BeitModel.from_pretrained(models["bare"])(pixels)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert "pooler_output" not in copied(pixels) and copied.name_or_path == models["bare"]


@pytest.mark.parametrize("dtype", ["auto", "float32", np.float32, np.dtype("float32"), np.float64])
def test_dtypes_by_any_name(models, dtype):
    model = BeitForImageClassification.from_pretrained(models["classify"], dtype=dtype)
    assert model.dtype == ("float64" if dtype is np.float64 else "float32")
    assert model.to(dtype if dtype != "auto" else "float32") is model


def test_what_cannot_move_says_so(models):
    model = BeitForImageClassification.from_pretrained(models["classify"])
    with pytest.raises(ValueError, match=r"this model runs on the CPU, 'cuda:1' was asked for; load it with"):
        model.to(1)
    with pytest.raises(ValueError, match=r"dtype: float16 is for GPUs \(backend='cupy'\)"):
        BeitForImageClassification.from_pretrained(models["classify"], dtype=np.float16)
    with pytest.raises(AttributeError, match=r"no attribute 'state_dict'; model.arrays has the weights by name"):
        model.state_dict()
    with pytest.raises(AttributeError, match=r"no attribute 'parametres'$"):
        _ = model.parametres
    with pytest.raises(TypeError, match="attn_implementation"):
        BeitForImageClassification.from_pretrained(models["classify"], attn_implementation="flash_attention_2")


# Where PyTorch is -----------------------------------------------------------------------------------------------------


def test_tensors_in_tensors_out(models, image):
    torch = pytest.importorskip("torch")
    processor = minibeit.AutoImageProcessor.from_pretrained(models["classify"])
    model = minibeit.AutoModelForImageClassification.from_pretrained(
        models["classify"], dtype=torch.float32, device_map="auto", attn_implementation="sdpa"
    )
    inputs = processor(image, return_tensors="pt").to(model.device, torch.float32)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert isinstance(logits, torch.Tensor) and not logits.requires_grad
    predicted = logits.argmax(dim=-1).item()
    assert model.config.id2label[predicted] in NAMES
    assert torch.softmax(logits, dim=-1).topk(2).values.shape == (1, 2)
    arrays = model(inputs.pixel_values.numpy(), output_hidden_states=True)
    tensors = model(inputs.pixel_values, output_hidden_states=True)
    assert np.array_equal(arrays.logits, tensors.logits.numpy()) and isinstance(arrays.logits, np.ndarray)
    assert all(isinstance(state, torch.Tensor) for state in tensors.hidden_states)
    (loss, _) = model(inputs.pixel_values, labels=torch.tensor([1]), return_dict=False)
    assert isinstance(loss, torch.Tensor) and loss.shape == ()


def test_label_maps_of_tensors(models, image):
    torch = pytest.importorskip("torch")
    processor = minibeit.AutoImageProcessor.from_pretrained(models["segment"])
    model = minibeit.AutoModelForSemanticSegmentation.from_pretrained(models["segment"])
    outputs = model(**processor(images=image, return_tensors="pt"))
    sizes = torch.tensor([image.size[::-1]])
    (labels,) = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
    assert isinstance(labels, torch.Tensor) and labels.shape == (20, 24)
    upsampled = torch.nn.functional.interpolate(outputs.logits, size=(20, 24), mode="bilinear", align_corners=False)
    assert (upsampled.argmax(dim=1)[0] == labels).all()


def test_random_masks_of_tensors(models, image):
    torch = pytest.importorskip("torch")
    processor = minibeit.AutoImageProcessor.from_pretrained(models["mask"])
    model = minibeit.BeitForMaskedImageModeling.from_pretrained(models["mask"])
    patches = (model.config.image_size // model.config.patch_size) ** 2
    pixel_values = processor(images=image, return_tensors="pt").pixel_values
    mask = torch.randint(low=0, high=2, size=(1, patches)).bool()
    outputs = model(pixel_values, bool_masked_pos=mask)
    loss, logits = outputs.loss, outputs.logits
    assert loss is None and list(logits.shape) == [1, patches, model.config.vocab_size]
