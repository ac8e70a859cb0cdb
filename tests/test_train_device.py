"""Training with the backend cupy, on the stand-in for CuPy: the same as on the CPU, and hardly ever waited for."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import signal
import threading
from importlib import import_module

import numpy as np
import pytest
from cli_helpers import config, run, save
from cuda_on_cpu import kernels
from cuda_on_cpu.backend import cupy_backend
from cuda_on_cpu.world import counted
from rank_trainers import KINDS, save_data
from rank_trainers import trainer as trainer_of_kind
from thread_ranks import on_ranks
from training_data import QUICK, class_folders, trainer

from minibeit import BeitForImageClassification
from minibeit.cli import ranks as cli_ranks
from minibeit.cli.terminal import UsageError
from minibeit.errors import DeviceError
from minibeit.outputs import ImageClassifierOutput
from minibeit.train import mpi
from minibeit.train.gradients import Gradients
from minibeit.train.loop import NotFinite, Trainer
from minibeit.train.state import STATE_NAME, Stopped, load_state

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no g++")
AVERAGED = dataclasses.replace(QUICK, average=0.5)
STEPS = dataclasses.replace(AVERAGED, epochs=4)  # eight of them
TOO_LARGE = 2.0**22  # as a scale, for float16
CLOSE = 2e-5  # of a weight after eight steps of Adam, whose first ones are of the size of the rate, 1e-2


@pytest.fixture
def cupy():
    with cupy_backend() as module:
        yield module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def on_cpu(data, tmp_path_factory):
    made = trainer(data, tmp_path_factory.mktemp("cpu"), STEPS)
    made.run()
    return made


def farthest(made: Trainer, truth: Trainer) -> float:
    """The largest difference of a weight or an average."""
    a, b = made._vectors(), truth._vectors()
    assert a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
    assert np.array_equal(a["steps"], b["steps"])
    return max(float(np.abs(a[name] - b[name]).max()) for name in ("weights", "average") if name in a)


# The same training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"recompute": True}], ids=str)
def test_steps_are_those_of_the_cpu(cupy, data, on_cpu, tmp_path, options):
    made = trainer(data, tmp_path, STEPS, backend="cupy", device=1, **options)
    history = made.run()
    assert farthest(made, on_cpu) < CLOSE
    for row, truth in zip(history, on_cpu.state.history, strict=True):
        assert row.keys() == truth.keys() and row["train_accuracy"] == truth["train_accuracy"]
        assert row["train_loss"] == pytest.approx(truth["train_loss"], rel=1e-4)
        assert row["held_out_loss"] == pytest.approx(truth["held_out_loss"], rel=1e-4)
    model = BeitForImageClassification.from_pretrained(tmp_path, backend="numpy")
    assert model.config.id2label == {0: "green", 1: "red"}


def test_in_float64_nothing_but_the_order_of_sums_differs(cupy, data, tmp_path):
    recipe = dataclasses.replace(AVERAGED, clip=0.0)
    truth = trainer(data, tmp_path / "cpu", recipe, dtype="float64")
    truth.run()
    made = trainer(data, tmp_path / "gpu", recipe, backend="cupy", dtype="float64")
    made.run()
    assert farthest(made, truth) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training(cupy, kind, tmp_path):
    """With dropout, stochastic depth, mixing and clipping, the noise being that of the CPU."""
    folder = save_data(kind, tmp_path / "data")
    changes = {"epochs": 1, "batch_size": 8}
    truth = trainer_of_kind(kind, folder, tmp_path / "cpu", "float32", dict(changes))
    truth.run()
    made = trainer_of_kind(kind, folder, tmp_path / "gpu", "float32", {**changes, "backend": "cupy"})
    made.run()
    a, b = made._vectors(), truth._vectors()
    assert all(np.abs(a[name] - b[name]).max() < 2e-3 for name in a if name != "steps")
    assert made.state.history[0]["train_loss"] == pytest.approx(truth.state.history[0]["train_loss"], rel=1e-3)


def test_a_trainer_of_the_cpu_refuses_a_model_of_a_gpu(cupy, data, tmp_path):
    made = trainer(data, tmp_path, backend="cupy")
    with pytest.raises(ValueError, match=r"found the backend cupy; use trainer_of\(model\)"):
        Trainer(made.model, made.objective, made.recipe, tmp_path)


def test_what_is_frozen_stays(cupy, data, tmp_path):
    made = trainer(data, tmp_path, backend="cupy", frozen="beit.encoder.0.*")
    before = dict(made._portable().arrays)
    made.run()
    moved = {name for name, array in made._portable().arrays.items() if not np.array_equal(array, before[name])}
    assert not [name for name in moved if name.startswith("beit.encoder.0.")] and "classifier.weight" in moved


# Stops ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "then"), [("numpy", "cupy"), ("cupy", "numpy"), ("cupy", "cupy")])
def test_a_training_goes_on_where_it_is_taken_up(cupy, data, on_cpu, tmp_path, first, then):
    def stop(progress):
        if progress.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped, match="stopped after step 3 of 8"):
        trainer(data, tmp_path, STEPS, backend=first, tell=stop).run()
    made = trainer(data, tmp_path, STEPS, backend=then)
    made.resume()
    assert made.state.step == 3 and made.state.seen == 4
    made.run()
    assert farthest(made, on_cpu) < CLOSE


def test_resumed_equals_undisturbed_bit_for_bit(cupy, data, tmp_path):
    whole = trainer(data, tmp_path / "whole", AVERAGED, backend="cupy")
    whole.run()

    def stop(progress):
        if progress.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        trainer(data, tmp_path / "parts", AVERAGED, backend="cupy", tell=stop).run()
    again = trainer(data, tmp_path / "parts", AVERAGED, backend="cupy")
    again.resume()
    again.run()
    assert again.state.history == whole.state.history
    assert all(np.array_equal(v, again._vectors()[name]) for name, v in whole._vectors().items())


# What is not finite ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["weights", "forward"])
def test_a_loss_that_is_no_number_stops_with_the_first_array(cupy, data, tmp_path, what):
    made = trainer(data, tmp_path, backend="cupy")

    def spoil(progress):
        if progress.step == 3:
            weight = dict(made.model.arrays)["beit.encoder.1.fc1.weight"]
            weight[...] = np.nan if what == "weights" else 1e38

    made.tell = spoil
    found = "weights beit.encoder.1.fc1.weight" if what == "weights" else "is encoder.1"
    with pytest.raises(NotFinite, match=found) as error:
        made.run()
    assert "step 4" in str(error.value) and "of epoch 1" in str(error.value)
    again = trainer(data, tmp_path, backend="cupy")
    again.resume()
    assert again.state.step == 2


def test_in_float16_an_overflow_leaves_a_step_out_and_the_scale_is_saved(cupy, data, tmp_path):
    made = trainer(data, tmp_path, STEPS, backend="cupy", dtype="float16")

    def spoil(progress):
        if progress.step == 2:
            made.optimizer.device.control[0] = TOO_LARGE
        if progress.step == 6:
            signal.raise_signal(signal.SIGTERM)

    made.tell = spoil
    with pytest.raises(Stopped):
        made.run()
    vectors = made._vectors()
    (done,) = set(vectors["steps"].tolist())
    assert 3 <= done < 6 and np.isfinite(vectors["weights"]).all()
    assert made.state.loss_scale == TOO_LARGE / 2 ** (6 - done)
    saved, _ = load_state(tmp_path, made.identity)
    assert saved.loss_scale == made.state.loss_scale and saved.good_steps == made.state.good_steps
    again = trainer(data, tmp_path, STEPS, backend="cupy", dtype="float16")
    again.resume()
    assert again.optimizer.device.control.get()[:2].tolist() == [saved.loss_scale, saved.good_steps]
    assert (tmp_path / STATE_NAME).exists()


def test_in_float16_a_loss_that_is_never_finite_ends_the_training(cupy, data, tmp_path):
    made = trainer(data, tmp_path, STEPS, backend="cupy", dtype="float16")
    made.optimizer.device.set_scale(2.0, 0)
    dict(made.model.arrays)["classifier.weight"][...] = np.nan
    with pytest.raises(NotFinite, match=r"the weights classifier\.weight"):
        made.run()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_has_float32_weights_and_stays_near_float32(cupy, data, on_cpu, tmp_path, dtype):
    made = trainer(data, tmp_path, STEPS, backend="cupy", dtype=dtype)
    history = made.run()
    assert made.optimizer.weights.dtype == np.float32 and made._vectors()["weights"].dtype == np.float32
    for row, truth in zip(history, on_cpu.state.history, strict=True):
        assert row["train_loss"] == pytest.approx(truth["train_loss"], rel=0.05)


# Waiting --------------------------------------------------------------------------------------------------------------


def test_a_step_is_waited_for_once_the_next_one_runs(cupy, tmp_path):
    """All that the trainer does itself; gradients are made up, as whether an op waits is a matter of the op."""
    data = class_folders(tmp_path / "data", 11)
    made, seen = trainer(data, tmp_path / "o", dataclasses.replace(STEPS, epochs=1), backend="cupy"), []

    def gradients(piece, samples, weight, ready, wait):
        assert isinstance(piece.pixels, cupy.ndarray) and not wait
        for name, array in made.model.arrays.items():
            ready(name, cupy.ones(array.shape, np.float32) * weight)
        logits = piece.pixels.sum((1, 2, 3))[:, None] * cupy.ones((1, 2), np.float32)
        return Gradients(cupy.ones((), np.float32), None, ImageClassifierOutput(logits=logits), {})

    made._gradients = gradients
    with counted() as world:
        made.tell = lambda progress: seen.append((list(world.waits), list(world.copies)))
        made.run()
    assert made.steps == len(seen) == 4
    for (waits, copies), (more_waits, more_copies) in itertools.pairwise(seen[1:]):
        (wait,) = more_waits[len(waits) :]
        assert "transfers.py" in wait
        new = more_copies[len(copies) :]
        assert [copy.nbytes for copy in new if copy.way == "upload"] == [4 * 3 * 16 * 16 * 4]  # the pixels
        assert [copy.nbytes for copy in new if copy.way == "download"] == [5 * 8, 4 * 2 * 4]  # numbers, logits


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"dtype": "bfloat16"}], ids=str)
def test_no_op_of_the_transformer_is_waited_for(cupy, tmp_path, options):
    data = class_folders(tmp_path / "data", 11)
    made, waits = trainer(data, tmp_path / "o", dataclasses.replace(STEPS, epochs=1), backend="cupy", **options), []
    with counted() as world:
        made.tell = lambda progress: waits.append(len(world.waits))
        made.run()
    assert np.diff(waits[1:]).tolist() == [1, 1]  # for the step before


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_training_waits_within_a_step(cupy, kind, tmp_path):
    """Not for the statistics of batch norms, and not to count the patches that are masked."""
    changes = {"epochs": 1, "batch_size": 7, "backend": "cupy"}
    made, waits = trainer_of_kind(kind, save_data(kind, tmp_path / "data"), tmp_path / "o", "float32", changes), []
    with counted() as world:
        made.tell = lambda progress: waits.append(len(world.waits))
        made.run()
    assert np.diff(waits[1:]).tolist() == [1] * (made.steps - 2)  # for the step before


# Memory, ranks and commands -------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_said_with_what_may(cupy, data, tmp_path):
    made = trainer(data, tmp_path, backend="cupy")
    pool = cupy.get_default_memory_pool()
    pool.set_limit(pool.used_bytes() + 4096)
    try:
        with pytest.raises(MemoryError, match="a batch of 4 does not fit, try --accumulate 2 or --recompute"):
            made.run()
    finally:
        pool.set_limit(0)


def test_ranks_with_a_device_each_train_as_one(cupy, data, on_cpu, tmp_path):
    nccl = import_module("minibeit.train.nccl")

    def work(ranks):
        own = nccl.on_device(ranks, nccl.own_device(ranks.rank, 2))
        made = trainer(data, tmp_path / f"rank{own.rank}", STEPS, backend="cupy", device=own.rank, ranks=own)
        made.run()
        return made

    first, second = on_ranks(2, work)
    assert farthest(first, on_cpu) < CLOSE and farthest(second, first) == 0
    assert [row["train_accuracy"] for row in first.state.history] == [
        row["train_accuracy"] for row in on_cpu.state.history
    ]
    vector, loss = first.sums.vector.nbytes, 4
    assert first.ranks.handed_over == first.steps * (vector + loss)


def test_commands_give_each_rank_a_gpu(cupy, monkeypatch):
    monkeypatch.setattr(cli_ranks, "started", lambda: 2)
    local = threading.local()
    monkeypatch.setattr(mpi, "world", lambda: local.ranks)

    def work(ranks):
        local.ranks = ranks
        ranks.local, ranks.on_host = ranks.rank, 2
        args = argparse.Namespace(backend="cupy", device=None, threads=None, workers=None, quiet=False)
        cli_ranks.join(args)
        with cupy.cuda.Device(args.device):
            total = cupy.ones(3, np.float32) * (1 + args.device)
            assert args.ranks.total(total).get().tolist() == [3, 3, 3]
        assert args.ranks.total(np.ones(2)).tolist() == [2, 2]  # of the host, by the others' way
        args.device = 1
        with pytest.raises(UsageError, match="--device: of several ranks each takes the GPU of its number"):
            cli_ranks.join(args)
        return args.ranks.rank

    assert on_ranks(2, work) == [0, 1]


def test_more_ranks_than_gpus_are_refused(cupy):
    nccl = import_module("minibeit.train.nccl")
    with pytest.raises(ValueError, match="3 ranks were started on a machine with 2 GPUs"):
        nccl.own_device(2, 3)
    with pytest.raises(DeviceError, match=r"each needs its own .*Duplicate GPU"):
        on_ranks(2, lambda ranks: nccl.on_device(ranks, 1))


def test_the_commands_train_on_a_gpu(cupy, capsys, data, tmp_path):
    settings = tmp_path / "config.json"
    settings.write_text(json.dumps(config(num_hidden_layers=2, use_mask_token=True).to_dict()))
    common = ("--epochs", 1, "--batch-size", 4, "--backend", "cupy", "--device", 1, "--workers", 1)
    tokens = ("--image-size", 16, "--groups", 2, "--blocks", 1, "--width", 8, "--codes", 12)
    for words in (
        ("finetune", data, "--from-scratch", settings, "-o", tmp_path / "classifier", "--dtype", "bfloat16"),
        ("dvae", data, "-o", tmp_path / "tokens", *tokens),
        ("pretrain", data, "-t", tmp_path / "tokens", "--config", settings, "-o", tmp_path / "mim", "--recompute"),
    ):
        code, out, err = run(capsys, *words, *common)
        assert code == 0 and "best epoch 1 of 1" in out, err
    assert "of the 17.2 GB of GPU 1" in err
    probe = ("--linear-probe", "--epochs", 2, "--backend", "cupy", "-o", tmp_path / "probe")
    code, out, err = run(capsys, "finetune", data, "-m", tmp_path / "classifier", *probe)
    assert code == 0 and "best: block" in out, err


def test_gradients_are_verified(cupy, capsys, tmp_path):
    made = save(tmp_path / "model", "classify", num_hidden_layers=2)
    words = ("verify", "--gradients", "-m", made, "--random-seed", 1, "--backend", "cupy", "--device", 1)
    code, out, err = run(capsys, *words)
    assert code == 0 and "minibeit cupy float32 are within the error budget" in out, out + err
    assert "gradient.beit.embeddings.patch.weight" in out


@pytest.mark.parametrize(("words", "said"), [
    (("--dtype", "bfloat16"), "--dtype bfloat16: training in half precision needs a GPU, --backend cupy"),
    (("--device", 1), "--device: names a GPU, which --backend cupy computes on"),
])  # fmt: skip
def test_what_a_cpu_does_not_have_is_refused(capsys, data, tmp_path, words, said):
    start = ("--from-scratch", "tiny", "-o", tmp_path / "o", "--backend", "numpy")
    code, _, err = run(capsys, "finetune", data, *start, *words)
    assert code == 2 and said in err and not (tmp_path / "o").exists()
