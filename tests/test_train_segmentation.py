"""Training of segmentation: what is read, the loss, the scores, stops and pieces, and the models it starts from."""

from __future__ import annotations

import dataclasses
import json
import signal

import numpy as np
import pytest
from PIL import Image
from segmentation_data import MODEL, NAMES, QUICK, ade_folder, pair_folder, save_pair, trainer

from minibeit import BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling, BeitForSemanticSegmentation
from minibeit.ops import get_ops
from minibeit.outputs import SemanticSegmenterOutput
from minibeit.params import flatten
from minibeit.train import segmentation
from minibeit.train.label_maps import MapReader, read_pairs
from minibeit.train.objective import Batch
from minibeit.train.state import Stopped

RNG = np.random.default_rng
OPS = get_ops("numpy")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pair_folder(tmp_path_factory.mktemp("data"), 10)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """(trainer, folder) of a training that nobody has disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    made = trainer(data, folder, dataclasses.replace(QUICK, average=0.5))
    made.run()
    return made, folder


def objective(data, tmp_path, **changes):
    return trainer(data, tmp_path, dataclasses.replace(QUICK, **changes)).objective


# Samples --------------------------------------------------------------------------------------------------------------


def test_samples_have_the_size_of_the_crop_and_padding_is_ignored(tmp_path):
    for i in range(3):
        save_pair(tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png", i)
    made = objective(tmp_path, tmp_path / "o", scale=(24, 16), ratio=(1, 1))  # 48 x 36 becomes 21 x 16
    pixels, labels = made.read(made.train[0], (0, 0, 0))
    assert pixels.shape == (3, 32, 32) and labels.shape == (32, 32) and pixels.dtype == np.float32
    assert (labels[16:] == 255).all() and (pixels[:, 16:] == 0).all() and labels[:16, :21].max() < 3
    assert np.abs(pixels[:, :16, :21]).min() > 0
    again, other = (made.read(made.train[0], key)[0] for key in ((0, 0, 0), (0, 0, 1)))
    assert np.array_equal(again, pixels) and np.any(other != pixels)


def test_held_out_images_are_read_as_segment_reads_them(data, tmp_path):
    made = objective(data, tmp_path)
    pixels, labels = made.read_judged(made.held_out[0])
    np.testing.assert_array_equal(pixels, made.processor(made.held_out[0].path).pixel_values[0])
    assert labels.shape == (32, 32) and set(np.unique(labels)) <= {0, 1, 2}


def test_numbers_are_reduced_once(tmp_path):
    ade_folder(tmp_path / "d")
    pairs = read_pairs(tmp_path / "d", names=NAMES[:3], read_map=MapReader(reduce=True))
    config = BeitConfig(**MODEL, id2label=dict(enumerate(pairs.names)))
    made = segmentation.Segmentation(pairs, segmentation.processor_for(config, None, QUICK, True), QUICK, config)
    assert made.processor.do_reduce_labels
    for labels in (made.read_judged(made.held_out[0])[1], made.read(made.train[0], (0,))[1]):
        assert set(np.unique(labels)) - {255} == {0, 1, 2}


def test_a_size_that_changes_with_the_orientation_is_said(data, tmp_path):
    """Read upright the two agree; a processor that leaves images as they are sees another size."""
    for i in range(2):
        save_pair(tmp_path / f"d/images/{i}.png", tmp_path / f"d/masks/{i}.png", i)
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(tmp_path / f"d/images/{i}.png").transpose(Image.Transpose.ROTATE_90).save(
            tmp_path / f"d/images/{i}.png", exif=exif
        )
    made = objective(tmp_path / "d", tmp_path / "o")
    assert made.read(made.train[0], (0,))[0].shape == (3, 32, 32)
    made.processor.apply_exif_orientation = False
    with pytest.raises(ValueError, match="expected the size of its image, 36 x 48"):
        made.read(made.train[0], (0,))


# Loss and scores ------------------------------------------------------------------------------------------------------


def outputs(B=2, K=3, aux=True):
    rng = RNG(0)
    return SemanticSegmenterOutput(
        logits=rng.standard_normal((B, K, 8, 8)),
        auxiliary_logits=rng.standard_normal((B, K, 4, 4)) if aux else None,
    )


def mean_cross_entropy(logits, labels):
    """By loops over pixels, of logits that were resized before."""
    total, count = 0.0, 0
    for b, y, x in np.ndindex(*labels.shape):
        if labels[b, y, x] != 255:
            row = logits[b, :, y, x]
            total += np.log(np.exp(row).sum()) - row[labels[b, y, x]]
            count += 1
    return total / count


def test_the_loss_is_that_of_both_heads(data, tmp_path):
    made, output = objective(data, tmp_path), outputs()
    labels = RNG(1).integers(0, 3, (2, 16, 16)).astype(np.uint8)
    labels[:, :3] = 255
    batch = Batch(np.zeros((2, 3, 16, 16)), labels)
    main, auxiliary = (
        mean_cross_entropy(OPS.resize_bilinear(x, (16, 16)), labels) for x in (output.logits, output.auxiliary_logits)
    )
    np.testing.assert_allclose(made.loss(batch)(OPS, output), main + 0.4 * auxiliary, rtol=1e-12)
    np.testing.assert_allclose(made.loss(batch)(OPS, outputs(aux=False)), main, rtol=1e-12)
    assert made.terms(batch) == 2 * 13 * 16
    made.recipe = dataclasses.replace(made.recipe, mean_of_all=True)
    np.testing.assert_allclose(made.loss(batch)(OPS, output), 13 / 16 * (main + 0.4 * auxiliary), rtol=1e-12)
    assert made.terms(batch) == 2 * 16 * 16


def test_a_batch_of_ignored_pixels_teaches_nothing(data, tmp_path):
    made = trainer(data, tmp_path)
    batch = next(made._batches())
    batch.targets[...] = 255
    found = made._learned(made.objective.for_step(batch, 0.0, (0,)))
    assert found.loss == 0 and all(not g.any() for g in flatten(found.grads).values()) and found.answers == 0


def test_scores_of_accumulated_confusion(data, tmp_path):
    made = objective(data, tmp_path)
    score, rng = made.score(), RNG(2)
    truths, said, losses = [], [], []
    for shape in ((16, 16), (24, 20)):
        logits, labels = rng.standard_normal((2, 3, 8, 8)), rng.integers(0, 2, (2, *shape))
        labels[0, 0] = 255
        score.add(SemanticSegmenterOutput(logits=logits), Batch(np.zeros((2, 3, 1, 1)), labels))
        resized = OPS.resize_bilinear(logits, shape)
        truths.append(labels.ravel())
        said.append(resized.argmax(1).ravel())
        losses.append(mean_cross_entropy(resized, labels) * (labels != 255).sum())
    truth, predicted = np.concatenate(truths), np.concatenate(said)
    predicted, truth = predicted[truth != 255], truth[truth != 255]
    found = score.metrics()
    ious = [((truth == k) & (predicted == k)).sum() / ((truth == k) | (predicted == k)).sum() for k in range(3)]
    np.testing.assert_allclose(found["mean_iou"], np.mean(ious), rtol=1e-12)
    np.testing.assert_allclose(found["pixel_accuracy"], (truth == predicted).mean(), rtol=1e-12)
    recalls = [(predicted[truth == k] == k).mean() for k in range(2)]  # class 2 is nowhere true
    np.testing.assert_allclose(found["mean_accuracy"], np.mean(recalls), rtol=1e-12)
    np.testing.assert_allclose(found["loss"], sum(losses) / len(truth), rtol=1e-6)


def test_right_answers_are_counted_where_the_logits_stand(data, tmp_path):
    labels = np.kron(RNG(0).integers(0, 3, (1, 8, 8)), np.ones((1, 4, 4), int)).astype(np.uint8)
    logits = np.eye(3)[labels[:, 2::4, 2::4]].transpose(0, 3, 1, 2)
    labels[0, :4] = 255
    made = objective(data, tmp_path)
    found = made.right(made.said(SemanticSegmenterOutput(logits=logits)), Batch(labels, labels))
    assert found == (56.0, 56)


# The loop -------------------------------------------------------------------------------------------------------------


def test_it_learns_and_writes_a_folder_that_segments(data, tmp_path):
    history = trainer(data, tmp_path, dataclasses.replace(QUICK, epochs=12)).run()
    assert history[-1]["train_loss"] < 0.6 * history[0]["train_loss"]
    assert history[-1]["held_out_mean_iou"] > 0.35 > history[0]["held_out_mean_iou"]
    model = BeitForSemanticSegmentation.from_pretrained(tmp_path, backend="numpy")
    assert model.config.num_labels == 3 and model.config.semantic_loss_ignore_index == 255
    assert "mean_iou" in (tmp_path / "log.jsonl").read_text() and (tmp_path / "curves.png").stat().st_size > 500


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_running_statistics_are_learned_and_survive_a_stop(finished, data, tmp_path, backend):
    whole = finished[0]
    if backend == "numba":
        whole = trainer(data, tmp_path / "whole", dataclasses.replace(QUICK, average=0.5), backend)
        whole.run()

    def tell(progress):
        if progress.step == 3:
            signal.raise_signal(signal.SIGTERM)

    stopped = trainer(data, tmp_path / "o", dataclasses.replace(QUICK, average=0.5), backend, tell=tell)
    before = {name: array.copy() for name, array in stopped._vectors().items() if ".running_" in name}
    assert len(before) == 2 * 12  # of each batch norm of the two heads
    with pytest.raises(Stopped):
        stopped.run()
    again = trainer(data, tmp_path / "o", dataclasses.replace(QUICK, average=0.5), backend)
    again.resume()
    again.run()
    assert again.state.history == whole.state.history
    for name, vector in whole._vectors().items():
        np.testing.assert_array_equal(again._vectors()[name], vector, err_msg=name)
        assert name not in before or np.any(vector != before[name])


def test_the_model_of_an_epoch_has_its_statistics(finished):
    """The saved model is the judged one: weights averaged, running statistics those of the moment."""
    made, folder = finished
    best = next(row for row in reversed(made.state.history) if row["best"])
    model = BeitForSemanticSegmentation.from_pretrained(folder, backend="numpy")
    score = made.objective.score()
    for pair in made.objective.held_out:
        batch = made.objective.batch([made.objective.read_judged(pair)])
        score.add(model(batch.pixels), batch)
    np.testing.assert_allclose(score.metrics()["mean_iou"], best["held_out_mean_iou"], atol=1e-6)


def test_pieces_add_up_by_the_pixels_that_count(data, tmp_path):
    """With batch statistics pieces differ from the whole, so the check is of a loss that has none."""
    whole, pieces = (trainer(data, tmp_path, accumulate=n) for n in (1, 2))
    for each in (whole, pieces):
        each.objective.batch_statistics = False
    batch = whole.objective.for_step(next(whole._batches()), 0.0, (0,))
    batch.targets[0, :20] = 255
    a, b = whole._learned(batch), pieces._learned(batch)
    assert abs(a.loss - b.loss) < 1e-5 * a.loss and (a.right, a.answers) == (b.right, b.answers)
    for name, x in flatten(a.grads).items():
        y = flatten(b.grads)[name]
        assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(x) + 1e-6, name


def test_a_single_image_has_no_statistics(data, tmp_path):
    with pytest.raises(ValueError, match="batch norm: expected more than one value per channel"):
        trainer(data, tmp_path, accumulate=4).run()


# The start ------------------------------------------------------------------------------------------------------------


def small(**changes):
    settings = {k: v for k, v in MODEL.items() if k != "out_indices"}
    return BeitConfig(**{**settings, "num_hidden_layers": 12, **changes})


@pytest.mark.parametrize(
    ("L", "convention", "indices"),
    [
        (12, "unilm", (3, 5, 7, 11)),
        (24, "unilm", (7, 11, 15, 23)),
        (12, "transformers", (5, 7, 9, 12)),
        (24, "transformers", (9, 13, 17, 24)),
        (5, "transformers", (2, 3, 4, 5)),
        (4, "unilm", (0, 1, 2, 3)),
        (4, "transformers", (1, 2, 3, 4)),
    ],
)
def test_features_are_those_of_the_published_models(L, convention, indices):
    from minibeit.model.segmentation import feature_states

    found = segmentation.feature_indices(L, convention)
    assert found == indices
    states = feature_states(small(num_hidden_layers=L, out_indices=found, feature_convention=convention))
    if L % 6 == 0:
        assert states == (L // 3, L // 2, 2 * L // 3, L if convention == "unilm" else L - 1)


def test_four_states_need_four_blocks():
    with pytest.raises(ValueError, match="UPerNet reads four hidden states, which 3 blocks do not have"):
        segmentation.feature_indices(3, "unilm")


@pytest.mark.parametrize("convention", [None, "unilm"])
def test_a_pretrained_encoder_is_kept_and_its_table_copied(tmp_path, convention):
    changes = dict(use_mask_token=True, use_shared_relative_position_bias=True, use_relative_position_bias=False)
    before = BeitForMaskedImageModeling(small(vocab_size=20, **changes), backend="numpy")
    before.arrays["beit.shared_bias_table"][...] = RNG(0).standard_normal((52, 2))
    before.save_pretrained(tmp_path)
    with pytest.warns(UserWarning):
        model = segmentation.from_checkpoint(tmp_path, NAMES, backend="numpy", convention=convention)
    for block in model.params.beit.encoder:
        np.testing.assert_array_equal(block.bias_table, before.arrays["beit.shared_bias_table"])
    np.testing.assert_array_equal(model.arrays["beit.encoder.3.fc1.weight"], before.arrays["beit.encoder.3.fc1.weight"])
    assert "beit.embeddings.mask_token" not in model.arrays and model.config.id2label == dict(enumerate(NAMES))
    assert model.config.out_indices == ((5, 7, 9, 12) if convention is None else (3, 5, 7, 11))
    assert model.config.feature_convention == convention or convention is None


def test_a_classifier_gives_its_encoder_at_another_size(tmp_path):
    before = BeitForImageClassification(small(id2label={0: "a", 1: "b"}, problem_type="regression"), backend="numpy")
    before.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="position tensors were resized to 48x48"):
        model = segmentation.from_checkpoint(tmp_path, NAMES[:3], backend="numpy", image_size=48, drop_path=0.3)
    assert model.config.image_shape == (48, 48) and model.config.drop_path_rate == 0.3
    assert model.config.problem_type is None
    assert model(np.zeros((1, 3, 48, 48), np.float32)).logits.shape == (1, 3, 24, 24)


@pytest.mark.parametrize("keep", [False, True])
def test_a_segmenter_keeps_its_head_and_with_its_classes_all_of_it(tmp_path, keep):
    config = small(out_indices=(3, 5, 7, 11), id2label=dict(enumerate(NAMES)), feature_convention="unilm")
    before = BeitForSemanticSegmentation(config, backend="numpy")
    before.save_pretrained(tmp_path)
    names = NAMES if keep else ("sky", "sea")
    model = segmentation.from_checkpoint(tmp_path, names, backend="numpy", keep_classes=keep)
    assert model.config.id2label == dict(enumerate(names)) and model.config.feature_convention == "unilm"
    assert model.config.out_indices == (3, 5, 7, 11)
    changed = {name for name, a in model.arrays.items() if not np.array_equal(a, before.arrays[name])}
    last = {f"{head}.classifier.{part}" for head in ("decode_head", "auxiliary_head") for part in ("weight", "bias")}
    assert changed == (set() if keep else last)


def test_from_a_config_of_ones_own(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small(use_mask_token=True).to_dict()))
    model = segmentation.from_scratch(str(tmp_path / "config.json"), NAMES, backend="numpy")
    assert model.config.out_indices == (5, 7, 9, 12) and not model.config.use_mask_token
    with pytest.raises(FileNotFoundError, match=r"expected a config\.json or one of tiny, base"):
        segmentation.from_scratch("huge", NAMES)


def test_the_processor_has_the_recipes_normalisation(data):
    from minibeit.train.segmentation_recipes import SEGMENTATION_RECIPES

    made = segmentation.processor_for(small(), None, SEGMENTATION_RECIPES["ade-base-512"], True)
    assert made.image_mean == [0.485, 0.456, 0.406] and made.do_reduce_labels and made.size["height"] == 32
    assert segmentation.processor_for(small(), None, QUICK, False).image_mean == [0.5] * 3
