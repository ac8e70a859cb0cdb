"""Training a tokenizer: its loss and gradients, its schedules, and that it learns to draw images from tokens."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from training_data import class_folders, stopped_and_resumed

from minibeit.noise import Noise
from minibeit.ops import reference
from minibeit.params import flatten
from minibeit.tokenizer.config import DalleTokenizerConfig
from minibeit.tokenizer.tokenizer import DalleTokenizer
from minibeit.train.discrete_vae import DiscreteVae, ImageReconstruction, gumbel_noise
from minibeit.train.examples import read_images
from minibeit.train.gradients import value_and_grad
from minibeit.train.loop import Trainer
from minibeit.train.recipes import TOKENIZERS, TokenizerRecipe

CONFIG = DalleTokenizerConfig(
    num_groups=2, num_blocks_per_group=1, hidden_size=16, vocab_size=12, n_init=8, image_size=16
)
QUICK = TokenizerRecipe(epochs=2, batch_size=4, lr=3e-3, warmup=0.5, average=0.5, clip=1.0)


def vae(dtype="float64", seed=1, backend="numpy", config=CONFIG):
    return DiscreteVae(DalleTokenizer(config, seed=seed, dtype=dtype, backend=backend))


def pixels(count=2):
    return np.random.default_rng(0).uniform(0.1, 0.9, (count, 3, 8, 8))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("data"), 6)


def trainer(data, folder, recipe=QUICK, **options):
    folder.mkdir(exist_ok=True)
    objective = ImageReconstruction(read_images(data, 0.2), recipe, CONFIG, (16, 16))
    return Trainer(vae("float32"), objective, recipe, folder, **options)


def test_the_loss_is_that_of_its_parts():
    model, x = vae(), pixels()
    out = model(x, temperature=0.5, divergence_weight=0.3, rng=Noise(3))
    expected = reference.logit_laplace_loss(out.statistics, x) + 0.3 * reference.divergence_from_uniform(out.logits)
    assert float(out.loss) == pytest.approx(float(expected), rel=1e-12)
    assert out.logits.shape == (2, 12, 4, 4) and out.statistics.shape == (2, 6, 8, 8)


def test_without_noise_it_draws_what_the_tokenizer_draws():
    tokenizer = DalleTokenizer(CONFIG, seed=1, dtype="float64", backend="numpy")
    x = pixels()
    drawn = tokenizer.decode(tokenizer.encode(x))
    means = DiscreteVae(tokenizer)(x).statistics[:, :3]
    np.testing.assert_allclose(np.clip((1 / (1 + np.exp(-means)) - 0.1) / 0.8, 0, 1), drawn, rtol=1e-12)


def test_gumbel_noise_has_the_mean_and_spread_of_its_distribution():
    drawn = gumbel_noise(Noise(0), (50, 2000))
    assert np.isfinite(drawn).all()
    assert drawn.mean() == pytest.approx(0.5772, abs=0.01) and drawn.std() == pytest.approx(np.pi / 6**0.5, abs=0.01)


def test_gradients_are_differences_of_the_loss():
    model, x = vae(), pixels(1)
    options = dict(temperature=0.8, divergence_weight=0.2)
    found = value_and_grad(model, x, loss=lambda ops, output: output.loss, rng=Noise(3), **options)
    rng = np.random.default_rng(0)
    for name, gradient in flatten(found.grads).items():
        array = flatten(model.params)[name]
        direction = rng.standard_normal(array.shape)
        before, losses = array.copy(), []
        for step in (-1e-6, 1e-6):
            array[...] = before + step * direction
            losses.append(float(model(x, rng=Noise(3), **options).loss))
        array[...] = before
        slope = (losses[1] - losses[0]) / 2e-6
        assert (gradient * direction).sum() == pytest.approx(slope, rel=2e-5, abs=1e-8), name


def test_numba_gives_the_gradients_of_numpy():
    found = [
        value_and_grad(
            vae("float32", backend=backend), pixels(), loss=lambda ops, output: output.loss, rng=Noise(3),
            divergence_weight=0.1,
        )
        for backend in ("numpy", "numba")
    ]  # fmt: skip
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-5)
    for a, b in zip(flatten(found[0].grads).values(), flatten(found[1].grads).values()):
        assert np.abs(a - b).max() <= 2e-4 * np.abs(a).max()


def test_schedules():
    recipe = TokenizerRecipe(divergence=2.0, divergence_rise=0.2, coldest=0.25, cooling=0.5)
    assert [recipe.temperature_at(done) for done in (0, 0.25, 0.5, 1)] == [1, 0.625, 0.25, 0.25]
    assert [recipe.divergence_at(done) for done in (0, 0.1, 0.2, 1)] == pytest.approx([0, 1, 2, 2])
    original = TOKENIZERS["dall-e"]
    assert (original.batch_size, original.lr, original.divergence, original.average) == (512, 1e-4, 6.6, 0.999)


def test_it_learns_to_draw_and_its_tokenizer_loads(data, tmp_path):
    history = trainer(data, tmp_path, dataclasses.replace(QUICK, epochs=20)).run()
    assert history[-1]["held_out_loss"] < history[0]["held_out_loss"] - 0.3
    assert history[-1]["held_out_pixel_error"] < 0.7 * history[0]["held_out_pixel_error"]
    assert 0 < history[-1]["held_out_tokens_used"] <= 1 <= history[-1]["held_out_token_perplexity"] <= 12
    tokenizer = DalleTokenizer.from_pretrained(tmp_path, backend="numpy")
    assert tokenizer.has_decoder and tokenizer.config == CONFIG


def test_resumed_equals_undisturbed_bit_for_bit(data, tmp_path):
    whole = trainer(data, tmp_path / "a")
    whole.run()
    again = stopped_and_resumed(functools.partial(trainer, data, tmp_path / "b"), 3)
    assert np.array_equal(again.optimizer.weights, whole.optimizer.weights)


def test_what_cannot_be_trained_is_refused(data):
    with pytest.raises(ValueError, match="expected one with a decoder"):
        DiscreteVae(DalleTokenizer(CONFIG.replace(n_init=None), backend="numpy"))
    with pytest.raises(ValueError, match=r"expected multiples of 2.*found 15x16"):
        ImageReconstruction(read_images(data), QUICK, CONFIG, (15, 16))
    for field, value in (("divergence", -1.0), ("coldest", 0.0)):
        with pytest.raises(ValueError, match=f"^{field}: expected"):
            TokenizerRecipe(**{field: value})
