"""The training loop: it learns, is the same however it is run or stopped, and never spoils what it has saved."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import signal

import numpy as np
import pytest
from training_data import QUICK, class_folders, stopped_and_resumed, trainer

from minibeit import BeitForImageClassification
from minibeit.train import loop, state
from minibeit.train.loop import CURVES_NAME, LOG_NAME, NotFinite
from minibeit.train.recipes import Recipe
from minibeit.train.state import Stopped


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """(trainer, folder) of a training that nobody has disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    made = trainer(data, folder, dataclasses.replace(QUICK, average=0.5))
    made.run()
    return made, folder


def stopping_at(step: int, data, folder, **options):
    def tell(progress):
        if progress.step == step:
            signal.raise_signal(signal.SIGTERM)

    return trainer(data, folder, dataclasses.replace(QUICK, average=0.5), tell=tell, **options)


def same_weights(a, b) -> bool:
    return all(np.array_equal(v, b._vectors()[name]) for name, v in a._vectors().items())


def test_it_learns_and_says_so(data, tmp_path):
    history = trainer(data, tmp_path, dataclasses.replace(QUICK, epochs=12, batch_size=8)).run()
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"] or history[-1]["held_out_top1"] == 1.0
    assert history[-1]["held_out_loss"] < history[0]["held_out_loss"]


def test_log_curves_and_model_are_written(finished):
    made, folder = finished
    rows = [json.loads(line) for line in (folder / LOG_NAME).read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and rows == made.state.history
    assert {"train_loss", "train_accuracy", "held_out_top1", "held_out_top5", "lr"} <= set(rows[0])
    assert (folder / CURVES_NAME).read_bytes().startswith(b"\x89PNG")
    model = BeitForImageClassification.from_pretrained(folder, backend="numpy")
    assert model.config.id2label == {0: "green", 1: "red"}


@pytest.mark.parametrize("step", [1, 2, 3])
def test_resumed_equals_undisturbed_bit_for_bit(finished, data, tmp_path, step):
    recipe = dataclasses.replace(QUICK, average=0.5)
    again = stopped_and_resumed(functools.partial(trainer, data, tmp_path, recipe), step)
    assert again.steps == 4
    assert same_weights(again, finished[0])
    assert again.state.history == finished[0].state.history
    assert (tmp_path / "model.safetensors").read_bytes() == (finished[1] / "model.safetensors").read_bytes()


def test_handlers_are_those_of_before(data, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped):
        stopping_at(1, data, tmp_path).run()
    assert signal.getsignal(signal.SIGTERM) is before


def test_stopped_within_an_evaluation_the_learned_weights_are_saved(finished, data, tmp_path, monkeypatch):
    made = trainer(data, tmp_path, dataclasses.replace(QUICK, average=0.5))
    real, asked = made._read_judged, []

    def asking(example):
        if not asked:  # once: a second signal ends the program
            asked.append(example)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(example)

    monkeypatch.setattr(made, "_read_judged", asking)
    with pytest.raises(Stopped):
        made.run()
    again = trainer(data, tmp_path, dataclasses.replace(QUICK, average=0.5))
    again.resume()
    again.run()
    assert same_weights(again, finished[0])


def test_number_of_workers_changes_nothing(finished, data, tmp_path):
    made = trainer(data, tmp_path, dataclasses.replace(QUICK, average=0.5), workers=5)
    made.run()
    assert same_weights(made, finished[0])


def test_pieces_give_the_gradients_of_the_whole_batch(data, tmp_path):
    whole, pieces = (trainer(data, tmp_path, accumulate=n) for n in (1, 3))
    batch = next(whole._batches())
    a, b = whole._learned(batch), pieces._learned(batch)
    assert abs(a.loss - b.loss) < 1e-6
    for x, y in zip(loop.flatten(a.grads).values(), loop.flatten(b.grads).values()):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    assert (a.right, a.answers) == (b.right, b.answers) == (a.right, len(batch))


def test_other_data_or_settings_are_not_resumed(finished, data, tmp_path):
    folder = finished[1]
    with pytest.raises(ValueError, match="was saved with other settings"):
        trainer(data, folder, QUICK).resume()
    recipe = dataclasses.replace(QUICK, average=0.5)
    with pytest.raises(ValueError, match="other pictures, labels or split"):
        trainer(class_folders(tmp_path / "more", 6), folder, recipe).resume()
    with pytest.raises(ValueError, match="other weights of --model"):
        trainer(data, folder, recipe, seed=0)  # the same again is fine
        other = trainer(data, folder, recipe)
        other.identity["weights of --model"] = "others"
        other.resume()
    with pytest.raises(FileNotFoundError, match="no stopped training"):
        trainer(data, tmp_path / "none", recipe).resume()


@pytest.mark.parametrize("clip", [0.0, 1.0])  # without clipping each parameter is updated as the backward passes it
@pytest.mark.parametrize("what", ["weights", "forward"])
def test_a_loss_that_is_no_number_stops_with_the_first_array(data, tmp_path, what, clip):
    recipe = dataclasses.replace(QUICK, clip=clip)
    made = trainer(data, tmp_path, recipe)
    folder = tmp_path

    def spoil(progress):
        if progress.step == 3:
            params = loop.flatten(made.model.params)
            if what == "weights":
                params["beit.encoder.1.fc1.weight"][0, 0] = np.nan
            else:
                params["beit.encoder.1.fc1.weight"][...] = 1e38

    made.tell = spoil
    found = "weights beit.encoder.1.fc1.weight" if what == "weights" else "is encoder.1"
    with pytest.raises(NotFinite, match=found) as error:
        made.run()
    assert "of epoch 1" in str(error.value) and "step 4" in str(error.value)
    model = BeitForImageClassification.from_pretrained(folder, backend="numpy")
    assert all(np.isfinite(array).all() and np.abs(array).max() < 1e3 for array in model.arrays.values())
    again = trainer(data, tmp_path, recipe)
    again.resume()
    assert again.state.step == 2 and np.isfinite(again.optimizer.weights).all()


def test_weights_that_are_no_numbers_are_not_saved_by_a_stop(data, tmp_path):
    made = trainer(data, tmp_path)

    def spoil_and_stop(progress):
        if progress.step == 3:
            made.optimizer.weights[0] = np.inf
            signal.raise_signal(signal.SIGTERM)

    made.tell = spoil_and_stop
    with pytest.raises(NotFinite, match=r"the weights beit\.embeddings"):
        made.run()
    again = trainer(data, tmp_path)
    again.resume()
    assert again.state.step == 2


def test_a_full_disk_leaves_the_last_checkpoint_whole(finished, data, tmp_path, monkeypatch):
    made = trainer(data, tmp_path)
    real, calls = state.write_safetensors, []

    def full(path, *args, **options):
        calls.append(path)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, *args, **options)

    monkeypatch.setattr(state, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left on device"):
        made.run()
    again = trainer(data, tmp_path)
    again.resume()
    assert again.state.step == 2


@pytest.mark.parametrize("changes", [dict(mixup=0.8, cutmix=1.0), dict(smoothing=0.0), dict(color=0.4)])
def test_every_kind_of_recipe_runs(data, tmp_path, changes):
    history = trainer(data, tmp_path, dataclasses.replace(QUICK, epochs=1, **changes), recompute=True).run()
    assert np.isfinite(history[0]["train_loss"])


def test_what_is_frozen_stays(data, tmp_path):
    made = trainer(data, tmp_path, frozen="beit.encoder.0.*")
    before = {name: np.array(array) for name, array in made.model.arrays.items()}
    made.run()
    moved = {name for name, array in made.model.arrays.items() if not np.array_equal(array, before[name])}
    assert not [name for name in moved if name.startswith("beit.encoder.0.")] and "classifier.weight" in moved


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0.0), ("lr", float("nan")), ("epochs", 0), ("smoothing", 1.0), ("layer_decay", 0.0), ("clip", -1.0)],
)
def test_numbers_that_make_no_training_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        Recipe(**{field: value})


def test_steps_and_epochs_are_recorded(data, tmp_path):
    told = []
    trainer(data, tmp_path, record=lambda step, numbers: told.append((step, numbers))).run()
    assert [step for step, numbers in told if "train/loss" in numbers] == [1, 2, 3, 4]
    assert [step for step, numbers in told if "epoch/held_out_top1" in numbers] == [2, 4]
    assert all(np.isfinite(value) for _, numbers in told for value in numbers.values())


def test_tensorboard_events_hold_the_losses(data, tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    from minibeit.train.tensorboard import events

    with events(tmp_path / "events") as record:
        made = trainer(data, tmp_path / "o", record=record)
        history = made.run()
    (file,) = (tmp_path / "events").iterdir()
    content, found = file.read_bytes(), {}
    while content:  # a record: its length, a checksum of that, the event, a checksum of it
        size = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + size])
        found.update({(value.tag, event.step): value.simple_value for value in event.summary.value})
        content = content[16 + size :]
    assert len([1 for tag, _ in found if tag == "train/loss"]) == made.steps
    assert found["epoch/held_out_loss", made.steps] == pytest.approx(history[-1]["held_out_loss"], rel=1e-6)
