"""One call from images to results: its formats, its batches, what it takes for one image, and what it refuses."""

from __future__ import annotations

import io
import pickle
import types

import numpy as np
import pytest
from cli_helpers import NAMES, SIZE, save, save_pictures
from PIL import Image

import minibeit
from minibeit import BeitForImageClassification, BeitForMaskedImageModeling, BeitImageProcessor, ImageError, pipeline
from minibeit.images.ahead import computed
from minibeit.pipelines import PIPELINES, scores_of

KINDS = {
    "image-classification": "classify",
    "image-segmentation": "segment",
    "image-feature-extraction": "bare",
    "fill-mask": "mask",
}


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv("MINIBEIT_BACKEND", "numpy")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {task: save(folder / kind, kind) for task, kind in KINDS.items()}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return save_pictures(tmp_path_factory.mktemp("images"), "a.png", "b.png", "c.png", "d.png", "e.png")


# Results --------------------------------------------------------------------------------------------------------------


def test_classification(models, paths):
    pipe = pipeline("image-classification", models["image-classification"])
    model = BeitForImageClassification.from_pretrained(models["image-classification"])
    logits = model(BeitImageProcessor(size=SIZE, resample=2)(paths[0]).pixel_values).logits[0].astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    result = pipe(paths[0], top_k=3)
    assert [set(one) for one in result] == [{"label", "score"}] * 3
    assert [one["label"] for one in result] == [NAMES[i] for i in np.argsort(-expected)[:3]]
    np.testing.assert_allclose([one["score"] for one in result], sorted(expected)[::-1][:3], rtol=1e-12)
    assert len(pipe(paths[0])) == len(NAMES) == len(pipe(paths[0], top_k=None))
    raw = {one["label"]: one["score"] for one in pipe(paths[0], function_to_apply="none")}
    np.testing.assert_allclose([raw[name] for name in NAMES], logits, rtol=0)


@pytest.mark.parametrize(
    "changes, function",
    [
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
        ({"problem_type": "regression"}, "none"),
        ({"id2label": {0: "age"}}, "sigmoid"),
    ],
)
def test_scores_follow_the_problem(tmp_path, paths, changes, function):
    folder = save(tmp_path, "classify", **changes)
    pipe = pipeline("image-classification", folder)
    logits = pipe.model(pipe.image_processor(paths[0]).pixel_values).logits[0]
    found = {one["label"]: one["score"] for one in pipe(paths[0])}
    expected = dict(zip(pipe.model.config.id2label.values(), scores_of(logits, function)))
    assert found == expected


def test_segmentation(models, paths):
    pipe = pipeline("image-segmentation", models["image-segmentation"])
    result = pipe(paths[0])
    outputs = pipe.model(**pipe.image_processor(paths[0]))
    (labels,) = pipe.image_processor.post_process_semantic_segmentation(outputs, target_sizes=[(20, 24)])
    assert [one["label"] for one in result] == [NAMES[i] for i in np.unique(labels)]
    for one, i in zip(result, np.unique(labels)):
        assert one["score"] is None and one["mask"].mode == "L" and one["mask"].size == (24, 20)
        np.testing.assert_array_equal(np.asarray(one["mask"]), (labels == i) * 255)
    assert [one["label"] for one in pipe(np.asarray(Image.open(paths[0])), subtask="semantic", threshold=0.2)] == [
        one["label"] for one in result
    ]
    with pytest.raises(ValueError, match=r"subtask: .* found 'panoptic'"):
        pipe(paths[0], subtask="panoptic")


def test_features(models, paths):
    pipe = pipeline("image-feature-extraction", models["image-feature-extraction"])
    output = pipe.model(**pipe.image_processor(paths[0]))
    assert pipe(paths[0]) == output.last_hidden_state.tolist()
    assert pipe(paths[0], pool=True) == output.pooler_output.tolist()
    array = pipe(paths, return_tensors=True)[2]
    assert array.shape == output.last_hidden_state.shape
    with pytest.warns(UserWarning, match="no settings of an image processor"):
        bare = pipeline("image-feature-extraction", minibeit.BeitModel(pipe.model.config, add_pooling_layer=False))
    with pytest.raises(ValueError, match="pool=True needs a BeitModel with a pooling layer"):
        bare(paths[0], pool=True)


def test_visual_tokens_of_hidden_patches(models, paths):
    pipe = pipeline("fill-mask", models["fill-mask"], top_k=2)
    mask = np.zeros((4, 4), bool)
    mask[1, 2] = mask[3, 0] = True
    result = pipe(paths[0], bool_masked_pos=mask)
    assert [(one[0]["row"], one[0]["column"]) for one in result] == [(1, 2), (3, 0)]
    model = BeitForMaskedImageModeling.from_pretrained(models["fill-mask"])
    pixels = pipe.image_processor(paths[0]).pixel_values
    logits = model(pixels, bool_masked_pos=mask.reshape(1, -1)).logits[0]
    for patch, place in zip(result, (6, 12)):
        assert [one["token"] for one in patch] == np.argsort(-logits[place])[:2].tolist()
        assert patch[0]["score"] == pytest.approx(scores_of(logits[place], "softmax").max())
    drawn = pipe(paths[:2], ratio=0.5, seed=3, batch_size=2)
    assert 0 < len(drawn[0]) == len(drawn[1]) <= 8
    assert pipe(paths[0], ratio=0.5, seed=3) == drawn[0]
    with pytest.raises(ValueError, match="a flag for each of"):
        pipe(paths[0], bool_masked_pos=[True])


# What goes in, what comes out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", PIPELINES)
def test_a_list_gives_a_list_and_a_generator_an_iterator(models, paths, task):
    pipe = pipeline(task, models[task])
    single = [pipe(path) for path in paths]
    for size in (1, 2, 8):
        found = pipe(list(paths), batch_size=size)
        assert isinstance(found, list) and len(found) == 5
        assert alike(found, single)
    lazy = pipe(path for path in paths)
    assert isinstance(lazy, types.GeneratorType)
    assert alike(list(lazy), single)
    assert pipe([]) == []


def alike(one, other):
    """Whether two results differ by no more than the order of a batch's sums can change."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, Image.Image):
        return one.tobytes() == other.tobytes()
    return abs(one - other) < 1e-5 if isinstance(one, float) else one == other


def test_every_form_of_an_image(models, paths):
    pipe = pipeline("image-classification", models["image-classification"])
    path = paths[0]
    expected, pixels = pipe(path), np.asarray(Image.open(path))
    forms = [str(path), path.as_uri(), path.read_bytes(), io.BytesIO(path.read_bytes()), Image.open(path), pixels,
             pixels.transpose(2, 0, 1)]  # fmt: skip
    assert [pipe(form) for form in forms] == [expected] * len(forms)
    assert alike(pipe(forms, batch_size=3), [expected] * len(forms))
    assert pipe(np.stack([pixels, pixels])) == [expected, expected]
    with open(path, "rb") as file:
        assert pipe(file) == expected


def test_images_of_different_shapes_do_not_share_a_batch(models, tmp_path):
    paths = save_pictures(tmp_path, "a.png", "b.png") + save_pictures(tmp_path / "wide", "c.png", size=(20, 40))
    processor = BeitImageProcessor(size={"max_height": 12, "max_width": 24}, resample=2)
    pipe = pipeline("image-feature-extraction", models["image-feature-extraction"], image_processor=processor)
    shapes = []
    pipe.model = lambda pixels: shapes.append(pixels.shape) or minibeit.BeitModelOutputWithPooling(pixels)
    pipe([*paths, paths[0]], batch_size=8)
    assert [shape[0] for shape in shapes] == [2, 1, 1]


def test_a_generator_is_asked_as_it_goes(models, paths):
    taken = []
    pipe = pipeline("image-classification", models["image-classification"], num_workers=1)
    results = pipe(taken.append(path) or path for path in list(paths) * 20)
    next(results)
    assert len(taken) <= 4


def test_a_broken_image_is_named_in_its_place(models, paths, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    pipe = pipeline("image-classification", models["image-classification"])
    results = pipe(iter([paths[0], tmp_path / "broken.jpg", paths[1]]))
    next(results)
    with pytest.raises(ImageError, match=r"broken.jpg: expected an image in a format"):
        next(results)
    with pytest.raises(ImageError, match=r"images\[1\]: expected an image in a format"):
        pipe([paths[0], b"no image"])


def test_values_and_errors_keep_the_order():
    def read(item):
        if item % 3 == 0:
            raise ValueError(f"no {item}")
        return np.full(2, item)

    sizes = []
    found = list(computed(range(8), read, lambda x: sizes.append(len(x)) or x.sum(1), batch_size=2))
    assert [item for item, _ in found] == list(range(8))
    assert [str(v) for _, v in found] == ["no 0", "2", "4", "no 3", "8", "10", "no 6", "14"]
    assert sizes == [2, 2, 1]


def test_a_batch_that_the_model_refuses_is_refused_for_each_of_its_images():
    def compute(x):
        if 3 in x:
            raise ValueError("no threes")
        return x

    found = [str(value) for _, value in computed(range(6), lambda i: np.array(i), compute, batch_size=2)]
    assert found == ["0", "1", "no threes", "no threes", "4", "5"]


# Making one -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", PIPELINES)
def test_the_task_is_that_of_the_checkpoint(models, task):
    assert pipeline(model=models[task]).task == task


def test_a_model_that_is_loaded_knows_where_its_processor_is(models, paths):
    folder = models["image-classification"]
    model = BeitForImageClassification.from_pretrained(folder)
    expected = pipeline("image-classification", folder)(paths[0])
    assert pipeline("image-classification", model)(paths[0]) == expected
    assert pipeline(model=pickle.loads(pickle.dumps(model)))(paths[0]) == expected
    processor = BeitImageProcessor.from_pretrained(folder)
    assert pipeline(model=model, image_processor=processor)(paths[0]) == expected
    assert pipeline(model=model, image_processor=str(folder))(paths[0]) == expected


def test_options_become_defaults_and_words_reach_from_pretrained(models, paths):
    pipe = pipeline("image-classification", models["image-classification"], top_k=1, dtype="float64", backend="numpy")
    assert pipe.model.dtype == "float64" and len(pipe(paths[0])) == 1 and len(pipe(paths[0], top_k=2)) == 2
    assert repr(pipe).startswith("ImageClassificationPipeline(BeitForImageClassification(4 blocks")


@pytest.mark.parametrize(
    "words, error, message",
    [
        ({"task": "image-classification"}, ValueError, "give model="),
        ({"task": "image-clasification", "model": "x"}, ValueError, "did you mean 'image-classification'"),
        ({"model": "classify", "topk": 3}, TypeError, "from_pretrained: unknown keyword 'topk'"),
        ({"model": "classify", "device": "tpu"}, ValueError, "device: expected 'cpu', 'cuda'"),
        ({"model": "loaded", "dtype": "float64"}, TypeError, "unknown keyword 'dtype'"),
        ({"model": "loaded", "device": 0}, TypeError, "'device'"),
        ({"model": "loaded", "task": "fill-mask"}, ValueError, "fill-mask needs a BeitForMaskedImageModeling"),
        ({"model": "classify", "task": "fill-mask"}, ValueError, "needs a checkpoint of masked image modeling"),
        ({"model": "classify", "batch_size": 0}, ValueError, "batch_size: expected a positive whole number, found 0"),
        ({"model": "classify", "image_processor": "nowhere"}, FileNotFoundError, "nowhere"),
    ],
)
def test_what_cannot_be_is_said(models, words, error, message):
    folder = models["image-classification"]
    made = {"classify": folder, "loaded": BeitForImageClassification.from_pretrained(folder)}
    with pytest.raises(error, match=message):
        pipeline(**{**words, "model": made.get(words.get("model"), words.get("model"))})


@pytest.mark.parametrize("images", [None, 3, {"image": "a.png"}])
def test_what_is_no_image_is_said_at_once(models, images):
    pipe = pipeline(model=models["image-classification"])
    with pytest.raises(TypeError, match="image-classification: expected an image or several, found"):
        pipe(images)


def test_images_by_name(models, paths):
    pipe = pipeline(model=models["image-classification"])
    assert pipe(images=paths[0]) == pipe(inputs=paths[0]) == pipe(paths[0])


def test_features_need_no_head_and_do_not_miss_one(models, paths, recwarn):
    assert np.shape(pipeline("image-feature-extraction", models["image-classification"])(paths[0])) == (1, 17, 16)
    assert not recwarn.list


def test_an_unknown_option_names_the_nearest(models, paths):
    pipe = pipeline(model=models["image-classification"])
    with pytest.raises(TypeError, match=r"image-classification: unknown keyword 'topk' .did you mean top_k"):
        pipe(paths[0], topk=3)
    with pytest.raises(ValueError, match="function_to_apply: expected one of 'softmax', 'sigmoid', 'none'"):
        pipe(paths[0], function_to_apply="relu")
