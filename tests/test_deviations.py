"""The known differences between minibeit and the reference implementations, one test each.

1. transformers reads the position bias table of a non-square config with height and width swapped.
2. transformers feeds the segmentation head with hidden_states[i - 1], the published model was trained on [i + 1].
3. transformers interpolates the class numbers of label maps as if they were grey values.
4. transformers' eager attention computes its softmax in float32, also in a float64 model.
5. Blocks that no output needs are not run.
6. transformers 5 exchanges the two last norms when it loads a masked-modelling checkpoint without mean pooling.
"""

from __future__ import annotations

import naive
import numpy as np
import pytest
from conftest import distance, make, random_weights, tiny_config
from golden import load
from tolerances import EPS32, GOLDEN64, NAIVE_MODEL

from minibeit import BeitForSemanticSegmentation, BeitImageProcessor, BeitModel
from minibeit.model.position_bias import resize_table
from minibeit.model.segmentation import feature_states
from minibeit.ops import get_ops
from minibeit.params import table_rows

RNG = np.random.default_rng(0)
PIXELS = RNG.standard_normal((1, 3, 12, 8))
SEGMENT = dict(num_hidden_layers=4, out_indices=[0, 1, 2, 3])


def test_position_bias_of_non_square_configs():
    golden = load("non_square")  # made by transformers
    ours, compat = golden.run("float64"), golden.run("float64", compat="transformers")
    name = "encoder.0.attention.probs"
    assert distance(compat[name], golden.truth[name]) <= GOLDEN64
    assert distance(ours[name], golden.truth[name]) > 1e-3
    weights = {key: array.astype(np.float64) for key, array in golden.weights.items()}
    right = naive.encode(golden.config, weights, golden.inputs["pixel_values"])[1][0]
    assert distance(ours[name], right) <= NAIVE_MODEL  # the lookup as it is defined


def test_position_bias_of_square_configs_needs_no_compat():
    config = tiny_config(image_size=12, use_relative_position_bias=True)
    pixels = RNG.standard_normal((1, 3, 16, 8))
    plain, compat = (make(BeitModel, config.replace(compat=c))(pixels) for c in (None, "transformers"))
    assert np.array_equal(plain.last_hidden_state, compat.last_hidden_state)


def test_compat_resizes_even_at_the_native_size():
    table = RNG.standard_normal((table_rows((3, 2)), 2))
    assert resize_table(get_ops("numpy"), table, (3, 2), (3, 2)) is table
    swapped = resize_table(get_ops("numpy"), table, (3, 2), (3, 2), "transformers")
    rows = naive.resize_table(table, (2, 3), (3, 2))
    assert distance(swapped, rows) <= NAIVE_MODEL
    assert distance(swapped, table) > 0.1


@pytest.mark.parametrize(("convention", "states"), [("transformers", [-1, 0, 1, 2]), ("unilm", [1, 2, 3, 4])])
def test_which_hidden_states_feed_the_segmentation_head(convention, states):
    config = tiny_config(**SEGMENT, feature_convention=convention)
    arrays = random_weights(config, "semantic_segmentation")
    model = make(BeitForSemanticSegmentation, config)
    assert feature_states(model.config) == tuple(i % 5 for i in states)

    class Chosen:  # the loops take states[i - 1] for every i
        def __getattr__(self, name):
            return tuple(i + 1 for i in states) if name == "out_indices" else getattr(config, name)

    assert distance(model(PIXELS).logits, naive.segment(Chosen(), arrays, PIXELS)[0]) <= NAIVE_MODEL


def test_unilm_features_must_exist():
    with pytest.raises(ValueError, match=r"feature_convention 'unilm' takes the outputs of blocks .* are 0 to 3"):
        make(
            BeitForSemanticSegmentation,
            tiny_config(num_hidden_layers=4, out_indices=[0, 1, 2, 4]).replace(feature_convention="unilm"),
        )


def test_label_maps_are_not_interpolated_unless_asked():
    labels = np.zeros((8, 8), np.uint8)
    labels[:, 4:] = 10
    image = np.zeros((8, 8, 3), np.uint8)
    processor = BeitImageProcessor(size=12)
    nearest = processor(image, segmentation_maps=labels)["labels"][0]
    assert set(np.unique(nearest)) == {0, 10}
    original = BeitImageProcessor(size=12, compat="transformers")(image, segmentation_maps=labels)["labels"][0]
    assert set(np.unique(original)) > {0, 10}  # classes that nobody drew


def test_softmax_of_a_float64_model_is_float64():
    """transformers' is float32: 4e-9 off here; see test_live_parity for both at once."""
    golden = load("block_bias")
    probs = golden.run("float64")["encoder.0.attention.probs"]
    assert not np.array_equal(probs, probs.astype(np.float32).astype(np.float64))
    assert distance(probs, golden.truth["encoder.0.attention.probs"]) <= GOLDEN64
    assert golden.float32_rms["encoder.0.attention.probs"] > 1e-3 * EPS32


def test_blocks_that_no_output_needs_are_not_run():
    config = tiny_config(**{**SEGMENT, "out_indices": [1, 2, 3, 4]})
    arrays = random_weights(config, "semantic_segmentation")
    before = BeitForSemanticSegmentation(config, arrays=arrays, dtype="float64", backend="numpy")(PIXELS).logits
    broken = {n: np.full_like(a, np.nan) if n.startswith("beit.encoder.3.") else a for n, a in arrays.items()}
    model = BeitForSemanticSegmentation(config, arrays=broken, dtype="float64", backend="numpy")
    assert np.array_equal(model(PIXELS).logits, before)  # the last block's output feeds nothing
    full = model(PIXELS, output_hidden_states=True)
    assert np.isnan(full.hidden_states[4]).all()  # run when its state is asked for
    assert np.array_equal(full.logits, before)


@pytest.mark.live
def test_transformers_exchanges_two_norms_on_loading(tmp_path):
    """Its files are right and so is what is read here; its renaming of `layernorm` hits both names."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from minibeit.checkpoint.load import load_checkpoint
    from minibeit.checkpoint.save import save_checkpoint

    config = tiny_config(use_mask_token=True, use_mean_pooling=False, image_size=12)
    arrays = random_weights(config, "masked_image_modeling", 0, "float32")
    named = config.replace(architectures=["BeitForMaskedImageModeling"])
    save_checkpoint(tmp_path, named, "masked_image_modeling", arrays)
    ours = load_checkpoint(tmp_path, "masked_image_modeling")[1]
    theirs = {
        n: w.numpy() for n, w in transformers.BeitForMaskedImageModeling.from_pretrained(tmp_path).state_dict().items()
    }
    for leaf in ("weight", "bias"):
        inner, outer = arrays[f"beit.norm.{leaf}"], arrays[f"norm.{leaf}"]
        assert np.array_equal(ours[f"beit.norm.{leaf}"], inner)
        assert np.array_equal(ours[f"norm.{leaf}"], outer)
        if transformers.__version__.startswith("5.24."):  # another version may have mended it
            assert np.array_equal(theirs[f"beit.layernorm.{leaf}"], outer)
            assert np.array_equal(theirs[f"layernorm.{leaf}"], inner)
