"""The whole encoder beside loops, for every kind of position and pooling."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from conftest import distance, make, random_weights, tiny_config
from tolerances import NAIVE_MODEL

from minibeit import BeitBackbone, BeitModel
from minibeit.ops import numba_cpu
from minibeit.ops.reference import transformer

PIXELS = np.random.default_rng(3).standard_normal((2, 3, 12, 8))
VARIANTS = {
    "plain": {},
    "bias per block": {"use_relative_position_bias": True},
    "shared bias": {"use_shared_relative_position_bias": True},
    "both biases": {"use_relative_position_bias": True, "use_shared_relative_position_bias": True},
    "absolute positions": {"use_absolute_position_embeddings": True},
    "cls pooling": {"use_mean_pooling": False, "use_relative_position_bias": True},
    "no layer scale": {"layer_scale_init_value": 0.0},
    "one head": {"num_attention_heads": 1},
    "head size one": {"num_attention_heads": 12},
    "tanh gelu, other eps": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3},
    "no blocks": {"num_hidden_layers": 0},
    "patch pair": {"patch_size": (4, 2), "use_relative_position_bias": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_model_equals_loops(name):
    config = tiny_config(**VARIANTS[name])
    arrays = random_weights(config, "model")
    out = make(BeitModel, config)(PIXELS, output_hidden_states=True, output_attentions=True)
    states, maps = naive.encode(config, arrays, PIXELS)
    assert len(out.hidden_states) == config.num_hidden_layers + 1 == len(states)
    assert len(out.attentions) == config.num_hidden_layers
    last = naive.last_hidden_state(config, arrays, states[-1])
    pairs = [*zip(out.hidden_states, states), *zip(out.attentions, maps), (out.last_hidden_state, last)]
    pairs.append((out.pooler_output, naive.pooled(config, arrays, last)))
    for found, truth in pairs:
        assert distance(found, truth) <= NAIVE_MODEL


@pytest.mark.parametrize("size", [(16, 16), (4, 4), (8, 24)])
@pytest.mark.parametrize("positions", ["use_relative_position_bias", "use_absolute_position_embeddings"])
def test_other_resolutions_equal_loops(size, positions):
    config = tiny_config(**{positions: True})
    pixels = np.random.default_rng(4).standard_normal((1, 3, *size))
    truth = naive.encode(config, random_weights(config, "model"), pixels)[0][-1]
    assert distance(make(BeitModel, config)(pixels).last_hidden_state, truth) <= NAIVE_MODEL


def test_nothing_is_kept_unless_asked_for():
    out = make(BeitModel, tiny_config())(PIXELS)
    assert out.keys() == ["last_hidden_state", "pooler_output"]


def test_without_pooling_layer():
    config = tiny_config()
    out = BeitModel(config, add_pooling_layer=False, arrays=random_weights(config, "model"), dtype="float64")(PIXELS)
    assert out.keys() == ["last_hidden_state"]


def test_a_backbone_runs_only_the_blocks_it_needs():
    config = tiny_config(num_hidden_layers=3, out_indices=[1])
    arrays = random_weights(config, "backbone")
    before = BeitBackbone(config, arrays=arrays, dtype="float64")(PIXELS).feature_maps[0]
    for name in arrays:
        if name.startswith(("beit.encoder.1.", "beit.encoder.2.")):
            arrays[name] = np.full_like(arrays[name], np.nan)
    after = BeitBackbone(config, arrays=arrays, dtype="float64")(PIXELS).feature_maps[0]
    assert np.array_equal(before, after)
    states, _ = naive.encode(config, random_weights(config, "backbone"), PIXELS)
    assert distance(after, states[1][:, 1:].transpose(0, 2, 1).reshape(2, 12, 3, 2)) <= NAIVE_MODEL


def test_a_call_leaves_no_mark_on_the_next():
    model = make(BeitModel, tiny_config(use_relative_position_bias=True))
    one = model(PIXELS).last_hidden_state
    model(np.random.default_rng(9).standard_normal((1, 3, 16, 20)), output_attentions=True)
    assert np.array_equal(model(PIXELS).last_hidden_state, one)


@pytest.mark.skipif(not numba_cpu.COMPILED, reason="NumPy serves every op, and reads the index")
def test_the_fused_attention_makes_no_index(monkeypatch):
    """An (N, N) index that nobody reads would take 16 GB for an image of 4096x4096 pixels."""
    model = make(BeitModel, tiny_config(use_relative_position_bias=True), dtype="float32", backend="numba")
    pixels = PIXELS.astype(np.float32)
    before = model(pixels).last_hidden_state.copy()

    def refuse(grid):
        raise AssertionError("an index was made")

    monkeypatch.setattr(transformer, "relative_position_index", refuse)
    transformer.cached_index.cache_clear()
    assert np.array_equal(model(pixels).last_hidden_state, before)
    with pytest.raises(AssertionError, match="an index was made"):
        model(pixels, output_attentions=True)
