"""Pre-training: the two views of a crop, masks, visual tokens, initial weights, and the loop that learns from them."""

from __future__ import annotations

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image
from training_data import class_folders, picture, stopped_and_resumed

from minibeit import BeitConfig, BeitForMaskedImageModeling
from minibeit.train.examples import read_images
from minibeit.train.gradients import value_and_grad
from minibeit.train.loop import Trainer
from minibeit.train.metrics import perplexity
from minibeit.train.pretraining import MaskedModeling, initial_arrays, new_model, processor_for, two_views
from minibeit.train.recipes import IMAGENET, PRETRAINING, PRETRAINING_PRESETS, PretrainingRecipe

RNG = np.random.default_rng
CONFIG = BeitConfig(
    image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    vocab_size=8, use_mask_token=True, use_shared_relative_position_bias=True, layer_norm_eps=1e-6, drop_path_rate=0.1,
)  # fmt: skip
QUICK = PretrainingRecipe(epochs=2, batch_size=4, lr=5e-3, warmup=1, masked=0.4, color=0.2)


class Brightness:
    """A tokenizer with 8 visual tokens: the mean of a square of 2x2 pixels."""

    pooling = 2
    config = SimpleNamespace(vocab_size=8)
    arrays: ClassVar = {"nothing": np.zeros(1)}

    def preprocess(self, image, size):
        assert image.size == size[::-1]
        return np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255

    def encode(self, pixels):
        B, C, h, w = pixels.shape
        means = pixels.reshape(B, C, h // 2, 2, w // 2, 2).mean((1, 3, 5))
        return np.minimum((means * 8).astype(np.int64), 7)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("data"), 6)


def objective_of(data, recipe=QUICK, fraction=0.2):
    examples = read_images(data, fraction)
    return MaskedModeling(examples, processor_for(CONFIG, recipe), recipe, CONFIG, Brightness())


def trainer(data, folder, recipe=QUICK, **options):
    model = BeitForMaskedImageModeling(CONFIG, arrays=initial_arrays(CONFIG, 0), backend="numpy")
    folder.mkdir(exist_ok=True)
    return Trainer(model, objective_of(data, recipe), recipe, folder, **options)


# The samples ----------------------------------------------------------------------------------------------------------


def test_both_views_are_one_crop():
    image = Image.fromarray(RNG(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    recipe = PretrainingRecipe(color=0.0, crop=(0.3, 0.4))
    for seed in range(5):
        large, small = two_views(image, (64, 64), (32, 32), recipe, RNG(seed))
        assert (large.size, small.size) == ((64, 64), (32, 32))
        a = np.asarray(large.resize((8, 8), Image.Resampling.BOX), float)
        b = np.asarray(small.resize((8, 8), Image.Resampling.BOX), float)
        assert np.abs(a - b).mean() < 6 < np.abs(a - b[::-1, ::-1]).mean()


def test_views_of_one_generator_are_the_same(tmp_path):
    image = Image.open(picture(tmp_path / "a.png", "red", 0))
    first, again, other = (two_views(image, (16, 16), (8, 8), PretrainingRecipe(), RNG(seed)) for seed in (1, 1, 2))
    assert [np.asarray(view).tobytes() for view in first] == [np.asarray(view).tobytes() for view in again]
    assert np.asarray(first[0]).tobytes() != np.asarray(other[0]).tobytes()


def test_a_batch_has_a_token_for_every_patch(data):
    made = objective_of(data)
    batch = made.batch([made.read(example, (0, i)) for i, example in enumerate(made.train[:3])])
    assert batch.pixels.shape == (3, 3, 16, 16) and batch.pixels.dtype == np.float32
    assert batch.targets.shape == batch.mask.shape == (3, 16) and batch.mask.dtype == bool
    assert made.terms(batch) == batch.mask.sum() <= 3 * made.count == 3 * 6


def test_held_out_images_are_masked_alike_each_time(data):
    made = objective_of(data)
    for example in made.held_out:
        first, again = made.read_judged(example), made.read_judged(example)
        assert all(np.array_equal(a, b) for a, b in zip(first, again))
    masks = [made.read_judged(example)[2] for example in made.held_out]
    assert len(masks) > 1 and any(np.any(mask != masks[0]) for mask in masks)


def test_another_number_of_tokens_is_refused(data):
    tokenizer = Brightness()
    tokenizer.config = SimpleNamespace(vocab_size=9)
    with pytest.raises(ValueError, match=r"expected 8 visual tokens.*found 9; set vocab_size"):
        MaskedModeling(read_images(data), processor_for(CONFIG, QUICK), QUICK, CONFIG, tokenizer)


def test_perplexity_counts_tokens_that_are_equally_frequent():
    assert perplexity(np.array([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert perplexity(np.array([7, 0])) == pytest.approx(1)


# The model ------------------------------------------------------------------------------------------------------------


def test_masked_tokens_alone_are_those_of_all():
    model = BeitForMaskedImageModeling(CONFIG, backend="numpy", dtype="float64", seed=1)
    pixels, mask = RNG(0).standard_normal((3, 3, 16, 16)), RNG(1).random((3, 16)) < 0.4
    labels = RNG(2).integers(0, 8, int(mask.sum()))
    all_tokens = model(pixels, bool_masked_pos=mask, labels=labels)
    masked = model(pixels, bool_masked_pos=mask, labels=labels, return_all_tokens=False)
    np.testing.assert_allclose(masked.logits, all_tokens.logits[mask], rtol=1e-12, atol=1e-14)
    assert masked.loss == pytest.approx(float(all_tokens.loss), rel=1e-12)
    whole, part = (
        value_and_grad(model, pixels, bool_masked_pos=mask, labels=labels, return_all_tokens=every)
        for every in (True, False)
    )
    for a, b in zip(pretraining_leaves(whole.grads), pretraining_leaves(part.grads)):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13)


def pretraining_leaves(grads):
    from minibeit.params import flatten

    return [leaf for leaf in flatten(grads).values() if leaf is not None]


def test_initial_weights_are_those_of_the_original():
    arrays = initial_arrays(CONFIG.replace(hidden_size=64, intermediate_size=128), seed=3)
    bound = CONFIG.initializer_range
    matrix = arrays["beit.encoder.1.fc1.weight"] / bound
    assert np.abs(matrix).max() <= 1 and matrix.std() == pytest.approx(0.5396, abs=0.01)  # a normal cut off at 1
    for block in (0, 1):
        for name in ("attention.output.weight", "fc2.weight"):
            scaled = arrays[f"beit.encoder.{block}.{name}"] / bound * math.sqrt(2 * (block + 1))
            assert 0.98 < np.abs(scaled).max() <= 1.0001
    assert np.abs(arrays["beit.embeddings.cls_token"]).max() > 0 < np.abs(arrays["beit.embeddings.mask_token"]).max()
    assert not arrays["beit.shared_bias_table"].any() and not arrays["beit.encoder.0.fc1.bias"].any()
    assert (arrays["beit.encoder.0.lambda_1"] == np.float32(0.1)).all()
    assert (arrays["beit.encoder.0.norm1.weight"] == 1).all()


@pytest.mark.parametrize("preset", PRETRAINING_PRESETS)
def test_presets_make_configs_that_predict_the_tokens(preset):
    config = BeitConfig(**PRETRAINING_PRESETS[preset])
    assert config.use_mask_token and config.use_shared_relative_position_bias and config.layer_norm_eps == 1e-6
    if preset == "tiny":
        assert new_model(preset, Brightness(), backend="numpy").config.vocab_size == 8


def test_a_config_without_a_mask_token_is_refused(tmp_path):
    CONFIG.replace(use_mask_token=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a mask token"):
        new_model(str(tmp_path), Brightness())
    with pytest.raises(FileNotFoundError, match=r"expected a config\.json or one of tiny, base, large"):
        new_model("huge", Brightness())


def test_published_recipes_are_those_of_the_original():
    for name, epochs, warmup, steps, clip in (
        ("base-22k", 150, 2, 10000, 3.0),
        ("base-1k", 800, 10, 0, 3.0),
        ("large-22k", 150, 2, 10000, 1.0),
        ("large-1k", 800, 10, 0, 1.0),
    ):
        r = PRETRAINING[name]
        assert (r.epochs, r.warmup, r.warmup_steps, r.clip) == (epochs, warmup, steps, clip)
        assert (r.batch_size, r.lr, r.floor, r.weight_decay, r.drop_path) == (2048, 1.5e-3, 1e-5, 0.05, 0.1)
        assert (r.crop, r.flip, r.color, r.layer_decay, r.decay_tables) == ((0.08, 1.0), 0.5, 0.4, 1.0, True)
        assert round(r.masked * 196) == 75 and (r.normalisation == IMAGENET) == name.endswith("1k")


def test_a_warmup_in_steps_gives_way_to_one_in_epochs():
    recipe = PRETRAINING["base-22k"]
    assert recipe.schedule(40000, 100)(9999) == pytest.approx(1.5e-3)
    assert recipe.changed(warmup=1.0).schedule(40000, 100)(99) == pytest.approx(1.5e-3)


# The loop -------------------------------------------------------------------------------------------------------------


def test_it_learns_the_tokens_of_masked_patches(data, tmp_path):
    history = trainer(data, tmp_path, dataclasses.replace(QUICK, epochs=25)).run()
    assert history[-1]["held_out_loss"] < 0.75 * history[0]["held_out_loss"]
    assert history[-1]["held_out_accuracy"] > 0.5 and 1 < history[-1]["held_out_token_perplexity"] <= 8
    model = BeitForMaskedImageModeling.from_pretrained(tmp_path, backend="numpy")
    assert model.config.use_shared_relative_position_bias and model.config.vocab_size == 8


def test_resumed_equals_undisturbed_bit_for_bit(data, tmp_path):
    whole = trainer(data, tmp_path / "a")
    whole.run()
    again = stopped_and_resumed(functools.partial(trainer, data, tmp_path / "b"), 3)
    assert np.array_equal(again.optimizer.weights, whole.optimizer.weights)
    assert again.state.history == whole.state.history


def test_pieces_count_masked_patches_alike(data, tmp_path):
    whole, pieces = (trainer(data, tmp_path, accumulate=n) for n in (1, 3))
    batch = next(whole._batches())
    mask = batch.mask.copy()
    mask[0] = False
    mask[0, 0] = True  # an image with a single masked patch
    batch = dataclasses.replace(batch, mask=mask)
    a, b = whole._learned(batch), pieces._learned(batch)
    assert a.loss == pytest.approx(b.loss, rel=1e-6)
    for x, y in zip(pretraining_leaves(a.grads), pretraining_leaves(b.grads)):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_another_tokenizer_is_not_gone_on_with(data, tmp_path):
    trainer(data, tmp_path).run()
    other = trainer(data, tmp_path)
    other.objective.tokenizer.arrays["nothing"] = np.ones(1)
    try:
        with pytest.raises(ValueError, match="saved with other weights of --tokenizer"):
            trainer(data, tmp_path).resume()
    finally:
        other.objective.tokenizer.arrays["nothing"] = np.zeros(1)


def test_every_image_has_a_masked_patch(data):
    made = objective_of(data, dataclasses.replace(QUICK, masked=0.01))
    batch = made.batch([made.read(example, (0, i)) for i, example in enumerate(made.train)])
    assert made.count == 1 and (batch.mask.sum(1) == 1).all()


def test_judging_takes_pieces_as_training_does(data, tmp_path, monkeypatch):
    made, sizes = trainer(data, tmp_path, accumulate=2), []
    forward = type(made.model).forward
    monkeypatch.setattr(
        type(made.model), "forward", lambda self, x, *args, **kw: sizes.append(len(x)) or forward(self, x, *args, **kw)
    )
    made.evaluate(made.objective.train)
    assert max(sizes) == 2


# Images without labels ------------------------------------------------------------------------------------------------


def test_images_of_any_depth_and_of_lists(tmp_path):
    for i, path in enumerate(("a.png", "b/c.png", "b/d/e.png")):
        picture(tmp_path / "data" / path, "red", i)
    (tmp_path / "data" / "broken.png").write_bytes(b"not an image")
    found = read_images(tmp_path / "data")
    assert len(found.train) == 3 and not found.held_out and len(found.unreadable) == 1
    listed = tmp_path / "list.csv"
    listed.write_text("path,label,split\ndata/a.png,1,train\ndata/b/c.png,,val\n")
    found = read_images(listed)
    assert (len(found.train), len(found.held_out)) == (1, 1)
    assert read_images(tmp_path / "data", 0.4).fingerprint != read_images(tmp_path / "data").fingerprint


def test_a_folder_s_own_split_is_kept(tmp_path):
    for i, path in enumerate(("Train/a.png", "train2/b.png", "Val/c/d.png")):
        picture(tmp_path / path, "red", i)
    assert not read_images(tmp_path, 0.0).train[0].held_out
    found = read_images(tmp_path, 0.5)
    assert [len(found.train), len(found.held_out)] == [2, 1] and "Val" in found.held_out[0].path


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("path\n", "found no line"),
        ("file\na.png\n", "expected the path of an image"),
        ("path\nmissing.png\n", "none of which can be read"),
    ],
)
def test_lists_without_images_are_refused(tmp_path, lines, message):
    (tmp_path / "list.csv").write_text(lines)
    with pytest.raises(ValueError, match=message):
        read_images(tmp_path / "list.csv")
