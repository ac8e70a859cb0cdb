"""`value_and_grad` and the tape: what is recorded, what comes back, noise, recomputation, workers, errors."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import distance, make, tiny_config
from tolerances import NAIVE_MODEL

import minibeit
from minibeit import (
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitModel,
    Trace,
)
from minibeit.noise import Noise, as_noise
from minibeit.ops import get_ops
from minibeit.params import flatten
from minibeit.tape import Node, Tape
from minibeit.trace import Scope
from minibeit.train.gradients import value_and_grad

RATES = dict(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3, drop_path_rate=0.4)
BIASED = dict(use_relative_position_bias=True, use_shared_relative_position_bias=True)
PIXELS = np.random.default_rng(0).standard_normal((4, 3, 12, 8))
LABELS = np.array([0, 2, 1, 1])


def classifier(**changes):
    return make(BeitForImageClassification, tiny_config(**{**BIASED, **changes}), dtype="float64")


def equal(a, b):
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and len(a) > 0 and all(np.array_equal(a[name], b[name]) for name in a)


# What comes back ------------------------------------------------------------------------------------------------------


def test_a_tuple_of_loss_and_gradients_in_the_structure_of_the_parameters():
    model = classifier()
    before = {name: array.copy() for name, array in flatten(model.params).items()}
    loss, grads = value_and_grad(model, PIXELS, labels=LABELS)
    assert type(grads) is type(model.params)
    assert abs(loss - float(model(PIXELS, labels=LABELS).loss)) < 1e-14
    named = flatten(grads)
    assert named.keys() == before.keys()
    for name, array in flatten(model.params).items():
        assert np.array_equal(array, before[name]), f"{name} was changed"
        assert named[name].shape == array.shape
        assert named[name].dtype == array.dtype
        assert not np.shares_memory(named[name], array)
        assert named[name].any(), name


def test_a_step_down_the_gradient_lowers_the_loss():
    model = classifier()
    loss, grads = value_and_grad(model, PIXELS, labels=LABELS)
    for name, gradient in flatten(grads).items():
        flatten(model.params)[name][...] -= 1e-3 * gradient
    assert value_and_grad(model, PIXELS, labels=LABELS).loss < loss


def test_the_output_holds_plain_arrays():
    result = value_and_grad(classifier(), PIXELS, labels=LABELS, output_hidden_states=True, output_attentions=True)
    still = classifier()(PIXELS, labels=LABELS, output_hidden_states=True, output_attentions=True)
    for made, expected in zip(result.output.to_tuple(), still.to_tuple(), strict=True):
        for a, b in zip(made, expected, strict=True) if isinstance(made, tuple) else [(made, expected)]:
            assert isinstance(a, (np.ndarray, np.generic))
            assert distance(np.asarray(a), np.asarray(b)) <= NAIVE_MODEL


def test_tables_get_their_gradient_at_every_step():
    model = classifier()
    model(PIXELS)  # makes biases of the grid that a careless model would keep
    for _ in range(2):
        _, grads = value_and_grad(model, PIXELS, labels=LABELS)
        assert grads.beit.shared_bias_table.any()
        assert all(block.bias_table.any() for block in grads.beit.encoder)
    model.params.beit.shared_bias_table[...] += 1
    model.params.beit.encoder[0].bias_table[0] += 5
    assert not np.array_equal(model(PIXELS).logits, value_and_grad(classifier(), PIXELS, labels=LABELS).output.logits)


def test_what_has_no_part_gets_no_gradient():
    model = make(BeitForMaskedImageModeling, tiny_config(use_mask_token=True), dtype="float64")
    _, grads = value_and_grad(model, PIXELS, loss=lambda ops, out: ops.mse_loss(out.logits, np.zeros(out.logits.shape)))
    assert grads.beit.embeddings.mask_token is None
    assert grads.lm_head.weight.any()


def test_float32_stays():
    model = make(BeitForImageClassification, tiny_config(**BIASED, **RATES), dtype="float32")
    result = value_and_grad(model, PIXELS, labels=LABELS, rng=Noise(0))
    assert {array.dtype for array in flatten(result.grads).values()} == {np.dtype("float32")}


# Losses ---------------------------------------------------------------------------------------------------------------


def test_a_loss_of_ones_own():
    model = classifier()
    plain = value_and_grad(model, PIXELS, labels=LABELS)
    same = value_and_grad(model, PIXELS, loss=lambda ops, out: ops.cross_entropy(out.logits, LABELS, -100))
    assert plain.loss == same.loss
    assert equal(plain.grads, same.grads)
    smooth = value_and_grad(
        model, PIXELS, loss=lambda ops, out: ops.cross_entropy(out.logits, LABELS, -100, smoothing=0.1)
    )
    K = model.config.num_labels
    soft = np.eye(K)[LABELS] * 0.9 + 0.1 / K
    mixed = value_and_grad(model, PIXELS, loss=lambda ops, out: ops.soft_cross_entropy(out.logits, soft))
    assert abs(smooth.loss - mixed.loss) < 1e-14
    for name, array in flatten(smooth.grads).items():
        assert distance(array, flatten(mixed.grads)[name]) < 1e-13, name


@pytest.mark.parametrize("recompute", [False, True])
def test_a_trace_gets_plain_arrays_once(recompute):
    seen = []

    class Counting(Trace):
        def record(self, name, array):
            seen.append(name)
            return super().record(name, array)

    found, still = Counting("encoder.*"), Trace("encoder.*")
    value_and_grad(classifier(), PIXELS, labels=LABELS, trace=found, recompute=recompute)
    classifier()(PIXELS, trace=still)
    assert list(found) == list(still) == seen
    for name, array in found.items():
        assert isinstance(array, np.ndarray)
        assert np.array_equal(array, still[name]), name


# Frozen parameters and what is recorded -------------------------------------------------------------------------------


def test_frozen_parameters():
    model = classifier()
    everything = flatten(value_and_grad(model, PIXELS, labels=LABELS).grads)
    named = flatten(value_and_grad(model, PIXELS, labels=LABELS, frozen=["beit.encoder.0.*", "*.bias"]).grads)
    left_out = [name for name in everything if name.startswith("beit.encoder.0.") or name.endswith(".bias")]
    assert left_out
    assert named.keys() == everything.keys() - set(left_out)
    assert all(np.array_equal(array, everything[name]) for name, array in named.items())


def test_nothing_is_recorded_before_the_first_trained_parameter():
    model = classifier()
    tape = Tape(model.ops)
    x = np.ones((2, 3))
    assert isinstance(tape.ops.add(x, x), np.ndarray)
    assert not tape.calls
    assert isinstance(tape.ops.add(x, Node(tape, x)), Node)
    assert len(tape.calls) == 1
    named = flatten(value_and_grad(model, PIXELS, labels=LABELS, frozen="beit.*").grads)
    assert sorted(named) == ["classifier.bias", "classifier.weight"]


def test_all_frozen_gives_the_loss_alone():
    result = value_and_grad(classifier(), PIXELS, labels=LABELS, frozen="*")
    assert not flatten(result.grads)
    assert result.loss > 0


def test_a_tape_frees_what_it_has_played():
    tape = Tape(get_ops("numpy"))
    x = Node(tape, np.ones(3))
    y = tape.ops.add(x, x)
    tape.backward(y, np.array([1.0, 2.0, 3.0]))
    assert x.gradient.tolist() == [2, 4, 6]  # both uses add up
    assert not tape.calls
    assert y.gradient is None


# Noise ----------------------------------------------------------------------------------------------------------------


def test_noise_is_the_same_for_the_same_seed_and_step():
    model = classifier(**RATES)
    one, same = (value_and_grad(model, PIXELS, labels=LABELS, rng=Noise(3, 5)) for _ in range(2))
    assert one.loss == same.loss
    assert equal(one.grads, same.grads)
    others = [Noise(3, 6), Noise(4, 5), Noise(3, 5, samples=(4, 5, 6, 7)), None]
    assert len({one.loss} | {value_and_grad(model, PIXELS, labels=LABELS, rng=rng).loss for rng in others}) == 5


def test_streams_are_different_at_every_place():
    noise = Noise(1, 2)
    drawn = [noise.at(block=b, place=p).random((2, 4)) for b in range(3) for p in range(3)]
    rows = {row.tobytes() for array in drawn for row in array}
    assert len(rows) == 18
    assert np.array_equal(noise.random((2, 4)), noise.random((2, 4)))
    assert as_noise(noise) is noise
    assert (
        as_noise(np.random.default_rng(0)) == as_noise(np.random.default_rng(0)) != as_noise(np.random.default_rng(1))
    )
    mean = noise.random((10, 10_000)).mean()
    assert abs(mean - 0.5) < 5 / np.sqrt(12 * 100_000)


def test_every_draw_of_a_pass_has_its_own_stream(monkeypatch):
    drawn, random = [], Noise.random

    def spy(self, shape):
        drawn.append((self.block, self.place))
        return random(self, shape)

    monkeypatch.setattr(Noise, "random", spy)
    value_and_grad(classifier(**RATES), PIXELS, labels=LABELS, rng=Noise(1))
    assert len(drawn) == len(set(drawn)) == 1 + 3 + 5  # the embeddings; block 0, whose paths are never dropped; block 1


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_see_the_noise_of_one(workers):
    """The mean of the gradients of parts of a batch is that of the batch, noise included."""
    model = classifier(**RATES)
    whole = value_and_grad(model, PIXELS, labels=LABELS, rng=Noise(1, 2))
    b = len(PIXELS) // workers
    shares = [list(range(i, i + b)) for i in range(0, len(PIXELS), b)]
    parts = [
        value_and_grad(model, PIXELS[share], labels=LABELS[share], rng=Noise(1, 2, tuple(share))) for share in shares
    ]
    assert abs(np.mean([part.loss for part in parts]) - whole.loss) < 1e-14
    for name, array in flatten(whole.grads).items():
        mean = np.mean([flatten(part.grads)[name] for part in parts], axis=0)
        assert distance(mean, array) < 1e-12, name


# Recomputation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("frozen", [(), ("beit.encoder.0.*", "beit.embeddings.*"), ("*.attention.*",)])
def test_recomputation_gives_the_same_bits(dtype, frozen):
    model = make(BeitForImageClassification, tiny_config(**BIASED, **RATES), dtype=dtype)
    options = dict(labels=LABELS, rng=Noise(1, 2), frozen=frozen)
    plain = value_and_grad(model, PIXELS, **options)
    again = value_and_grad(model, PIXELS, recompute=True, **options)
    assert plain.loss == again.loss
    assert equal(plain.grads, again.grads)


def test_recomputation_keeps_the_inputs_of_blocks_alone():
    model = classifier()
    counts = []
    for recompute in (False, True):
        tape = Tape(model.ops, recomputing=recompute)
        from minibeit.train.gradients import recorded

        recorded(model, tape, tape.watch(model.params)).forward(PIXELS, labels=LABELS)
        counts.append(len(tape.calls))
    assert counts[0] - counts[1] == 2 * 7 - 2  # two blocks of 7 calls each become one call each


def test_what_is_run_again_is_not_traced_again():
    seen = []

    class Counting(Trace):
        def record(self, name, array):
            seen.append(name)
            return array

    def doubled(ops, x, scope):
        return scope.record("twice", ops.add(x, x))

    tape = Tape(get_ops("numpy"), recomputing=True)
    x = Node(tape, np.ones(3))
    y = tape.ops.recompute(doubled, tape.ops, (x, Scope((Counting(),))))
    tape.backward(y, np.ones(3))
    assert x.gradient.tolist() == [2, 2, 2]
    assert seen == ["twice"]


def test_recomputation_with_hidden_states():
    options = dict(labels=LABELS, output_hidden_states=True, output_attentions=True)
    plain, again = (value_and_grad(classifier(), PIXELS, recompute=r, **options).output for r in (False, True))
    assert len(again.attentions) == len(plain.attentions) == 2
    for a, b in zip(plain.hidden_states + plain.attentions, again.hidden_states + again.attentions, strict=True):
        assert isinstance(b, np.ndarray)
        assert np.array_equal(a, b)


# Batch norm -----------------------------------------------------------------------------------------------------------


def segmenter(**changes):
    settings = dict(num_hidden_layers=4, out_indices=[0, 1, 2, 3], **BIASED)
    return make(BeitForSemanticSegmentation, tiny_config(**{**settings, **changes}), dtype="float64")


def test_batch_statistics_move_the_running_ones():
    model, labels = segmenter(), np.random.default_rng(1).integers(0, 3, (4, 9, 7))
    still = value_and_grad(model, PIXELS, labels=labels)
    assert still.running == {}
    moved = value_and_grad(model, PIXELS, labels=labels, batch_statistics=True)
    named = flatten(model.params)
    assert moved.running.keys() == {name for name in named if ".running_" in name}
    assert moved.loss != still.loss
    assert not any(np.array_equal(named[name], array) for name, array in moved.running.items())
    assert not any(".running_" in name for name in flatten(moved.grads))


def test_frozen_batch_norms_use_the_batch_too():
    """As in PyTorch, where freezing parameters does not change what a batch norm in training computes."""
    model, labels = segmenter(), np.random.default_rng(1).integers(0, 3, (4, 9, 7))
    free = value_and_grad(model, PIXELS, labels=labels, batch_statistics=True)
    frozen = value_and_grad(
        model,
        PIXELS,
        labels=labels,
        batch_statistics=True,
        frozen=["*.classifier.*", "*.bn.*", "beit*", "fpn*", "*.conv.*"],
    )
    assert frozen.loss == free.loss
    assert all(np.array_equal(frozen.running[name], array) for name, array in free.running.items())


# Errors ---------------------------------------------------------------------------------------------------------------


def test_no_weights_are_packed_in_a_step(monkeypatch):
    """Copying the model would: of a base model 340 MB in every step."""
    model = make(BeitForImageClassification, tiny_config(), backend="numba")
    monkeypatch.setattr(type(model), "__init__", lambda *a, **k: pytest.fail("a model was made anew"))
    assert value_and_grad(model, PIXELS.astype(np.float32), labels=LABELS).loss > 0


def test_errors_are_sentences():
    model = classifier()
    with pytest.raises(ValueError, match=r"frozen: 'encoder\.0' matches no parameter; their names are like 'beit"):
        value_and_grad(model, PIXELS, labels=LABELS, frozen="encoder.0")
    with pytest.raises(ValueError, match="labels: expected labels for the model's own loss"):
        value_and_grad(model, PIXELS)
    with pytest.raises(ValueError, match="labels: expected labels for the model's own loss"):
        value_and_grad(make(BeitModel, tiny_config()), PIXELS)
    with pytest.raises(ValueError, match="labels: expected class numbers 0 to"):
        value_and_grad(model, PIXELS, labels=np.array([0, 1, 2, 99]))


def test_public_names():
    assert minibeit.value_and_grad is value_and_grad
    assert minibeit.Noise is Noise
