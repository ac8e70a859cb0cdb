"""Dropout, attention dropout and stochastic depth: off by default, seeded, with the right statistics."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import distance, make, tiny_config
from tolerances import NAIVE_MODEL

from minibeit import BeitBackbone, BeitForMaskedImageModeling, BeitForSemanticSegmentation, BeitModel, Trace
from minibeit.model import attention as attention_module
from minibeit.model import block as block_module
from minibeit.model.dropout import branch_factors, channel_dropout, dropout, dropout_factors
from minibeit.noise import Noise
from minibeit.ops import get_ops

OPS = get_ops("numpy")
NOISY = dict(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3, drop_path_rate=0.4)
PIXELS = np.random.default_rng(0).standard_normal((4, 3, 12, 8))


def seeded(seed=0):
    return np.random.default_rng(seed)


def model(**changes):
    return make(BeitModel, tiny_config(use_relative_position_bias=True, **{**NOISY, **changes}))


def test_off_by_default():
    quiet = model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, drop_path_rate=0.0)
    assert np.array_equal(model()(PIXELS).last_hidden_state, quiet(PIXELS).last_hidden_state)


def test_a_generator_with_all_rates_zero_changes_nothing():
    quiet = model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, drop_path_rate=0.0)
    noisy = quiet(PIXELS, rng=seeded()).last_hidden_state
    assert distance(noisy, quiet(PIXELS).last_hidden_state) <= NAIVE_MODEL


def test_same_seed_same_result():
    m = model()
    one, same, other = (m(PIXELS, rng=seeded(s)).last_hidden_state for s in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, m(PIXELS).last_hidden_state)


@pytest.mark.parametrize("rate", sorted(NOISY))
def test_each_rate_alone_acts(rate):
    rates = {**dict.fromkeys(NOISY, 0.0), rate: 0.5}
    m = model(**rates)
    assert not np.array_equal(m(PIXELS, rng=seeded()).last_hidden_state, m(PIXELS).last_hidden_state)


@pytest.mark.parametrize(
    ("model_class", "changes"),
    [
        (BeitForMaskedImageModeling, {}),
        (BeitForSemanticSegmentation, {"num_hidden_layers": 3, "out_indices": [0, 1, 2, 3]}),
        (BeitBackbone, {}),
    ],
)
def test_every_task_takes_a_generator(model_class, changes):
    m = make(model_class, tiny_config(**NOISY, **changes))
    first = [m(PIXELS, rng=seeded()).to_tuple()[0] for _ in range(2)]
    still = m(PIXELS).to_tuple()[0]
    first, again, still = (x[0] if isinstance(x, tuple) else x for x in (*first, still))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, still)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_factors_keep_the_mean(rate):
    n = 200_000
    factors = dropout_factors(OPS, seeded(), (n,), rate, "float64")
    assert set(np.unique(factors)) == {0, 1 / (1 - rate)}
    spread = np.sqrt(rate / (1 - rate) / n)  # standard deviation of the mean
    assert abs(factors.mean() - 1) < 5 * spread


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_stays(dtype):
    x = np.ones((2, 3, 4), dtype)
    assert dropout(OPS, seeded(), x, 0.5).dtype == dtype
    assert branch_factors(OPS, Noise(0), x, 0.5, 0.5, (1, 2)).dtype == dtype


def test_dropout_drops_single_numbers_and_drop_path_whole_samples():
    x = np.ones((500, 4, 3))
    dropped = dropout(OPS, seeded(), x, 0.5)
    assert 0.45 < (dropped == 0).mean() < 0.55
    assert len({row.tobytes() for row in dropped}) > 100
    paths = branch_factors(OPS, Noise(0), x, 0.0, 0.5, (1, 2))
    assert paths.shape == (500, 1, 1)
    assert 0.4 < (paths == 0).mean() < 0.6
    both = branch_factors(OPS, Noise(0), x, 0.5, 0.5, (1, 2))
    assert both.shape == x.shape
    assert 0.7 < (both == 0).mean() < 0.8
    assert branch_factors(OPS, Noise(0), x, 0.0, 0.0, (1, 2)) is None
    assert branch_factors(OPS, None, x, 0.5, 0.5, (1, 2)) is None


def test_rate_one_drops_everything():
    x = np.ones((3, 2, 4))
    assert (dropout(OPS, seeded(), x, 1.0) == 0).all()
    assert (branch_factors(OPS, Noise(0), x, 0.0, 1.0, (1, 2)) == 0).all()
    rates = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, drop_path_rate=1.0)
    trace = Trace("encoder.*.output")
    model(**rates)(PIXELS, rng=seeded(), trace=trace)
    assert np.array_equal(trace["encoder.0.output"], trace["encoder.1.output"])  # the last block is always skipped
    out = model(**{**rates, "drop_path_rate": 0.0, "attention_probs_dropout_prob": 1.0})(PIXELS, rng=seeded())
    assert np.isfinite(out.last_hidden_state).all()


def test_rates_of_stochastic_depth_rise_linearly(monkeypatch):
    seen = []

    def spy(ops, noise, x, dropout_rate, drop_path_rate, places):
        seen.append(drop_path_rate)

    monkeypatch.setattr(attention_module, "branch_factors", spy)
    monkeypatch.setattr(block_module, "branch_factors", spy)
    model(num_hidden_layers=5, drop_path_rate=0.4)(PIXELS, rng=seeded())
    assert np.allclose(seen, np.repeat([0.0, 0.1, 0.2, 0.3, 0.4], 2))
    seen.clear()
    model(num_hidden_layers=1, drop_path_rate=0.4)(PIXELS, rng=seeded())
    assert seen == [0.0, 0.0]


def test_noise_keeps_the_mean_of_attention():
    """With values only from attention dropout, the mean over many draws comes back to the quiet pass."""
    rates = dict(hidden_dropout_prob=0.0, drop_path_rate=0.0, attention_probs_dropout_prob=0.3)
    m = model(**rates)
    rng, name, draws = seeded(), "encoder.0.attention.context", 400

    def context(**options):
        trace = Trace(name)
        m(PIXELS[:1], trace=trace, **options)
        return trace[name]

    samples = np.stack([context(rng=rng) for _ in range(draws)])
    error = (samples.mean(0) - context()) / (samples.std(0) / np.sqrt(draws))
    assert np.abs(error).max() < 5  # standard deviations, 84 numbers


def test_attention_maps_show_what_was_dropped():
    trace = Trace("encoder.0.attention.probs")
    model()(PIXELS, rng=seeded(), trace=trace)
    zeros = (trace["encoder.0.attention.probs"] == 0).mean()
    assert 0.2 < zeros < 0.4


def test_the_generator_is_the_callers():
    """The global generator of NumPy is neither used nor changed."""
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    model()(PIXELS, rng=seeded())
    assert np.array_equal(np.random.get_state()[1], before)


def test_heads_drop_whole_channels():
    ones, noise = np.ones((3, 40, 2, 5)), Noise(1)
    dropped = channel_dropout(OPS, noise, ones, 0.25)
    assert set(np.unique(dropped)) == {0, 1 / 0.75} and (dropped == dropped[..., :1, :1]).all()
    assert 0.1 < (dropped == 0).mean() < 0.45 and np.any(dropped[0] != dropped[1])
    assert channel_dropout(OPS, None, ones, 0.25) is ones and channel_dropout(OPS, noise, ones, 0.0) is ones


def test_head_dropout_acts_in_training_on_both_heads():
    config = tiny_config(out_indices=[0, 1, 2, 3], num_hidden_layers=4, drop_path_rate=0.0)
    model = make(BeitForSemanticSegmentation, config)
    x = np.random.default_rng(0).standard_normal((2, 3, *config.image_shape))

    def outputs(**options):
        found = model(x, output_auxiliary_logits=True, **options)
        return found.logits, found.auxiliary_logits

    plain = outputs()
    for same in (outputs(head_dropout=0.5), outputs(rng=Noise(0))):
        assert all(np.array_equal(a, b) for a, b in zip(plain, same))
    first, again, other = (outputs(rng=Noise(0, step), head_dropout=0.5) for step in (0, 0, 1))
    for a, b, c, d in zip(plain, first, again, other):
        assert np.any(a != b) and np.array_equal(b, c) and np.any(b != d)
