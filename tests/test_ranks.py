"""Several ranks train as one process does: here threads, which are fast; test_mpi.py has real processes."""

from __future__ import annotations

import shutil
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from cli_helpers import run
from rank_trainers import KINDS, save_data, trainer
from thread_ranks import on_ranks
from tolerances import RANKS64
from training_data import class_folders

from minibeit.cli import ranks as cli_ranks
from minibeit.noise import Noise
from minibeit.params import flatten
from minibeit.train import examples, loop
from minibeit.train.label_maps import read_pairs
from minibeit.train.optimizer import Slot
from minibeit.train.ranks import Ranks
from minibeit.train.state import Stopped, StopSign
from minibeit.train.summed import SummedGradients


def distance(a, b):
    """Of two vectors, relative to the length of the second."""
    return float(np.linalg.norm(np.float64(a) - b) / max(np.linalg.norm(np.float64(b)), 1e-300))


def assert_as_one(made, one, tolerance=RANKS64):
    for name, vector in one.items():
        assert distance(made[name], vector) <= tolerance, name


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {kind: save_data(kind, folder / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def single(folders, tmp_path_factory):
    """(vectors, history) of one process, by kind."""
    made = {}
    for kind in KINDS:
        one = trainer(kind, folders[kind], tmp_path_factory.mktemp("one") / "o", "float64", {})
        one.run()
        made[kind] = one._vectors(), one.state.history
    return made


def trained(kind, count, data, folder, **options):
    """The trainers of `count` ranks, of which only the first has a folder."""

    def work(ranks):
        made = trainer(kind, data, folder / f"rank{ranks.rank}", "float64", {}, ranks=ranks, **options)
        made.run()
        return made

    return on_ranks(count, work)


# What each rank has ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(8, 1), (8, 2), (8, 3), (7, 3), (5, 3), (1, 1)])
def test_every_sample_has_one_rank_and_comes_with_the_one_it_is_mixed_with(size, count):
    ranks = Ranks()
    ranks.count = count
    shares = ranks.shares(size)
    assert sorted(np.concatenate(shares).tolist()) == list(range(size))
    for share in shares:
        assert share.tolist() == sorted(share) == (size - 1 - share[::-1]).tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 2


def test_a_batch_too_small_for_the_ranks_is_refused():
    ranks = Ranks()
    ranks.count = 4
    with pytest.raises(ValueError, match="at least 7 for 4 ranks, which take two images at a time, found 6"):
        ranks.shares(6)


def test_pieces_of_shares_are_shares_of_pieces():
    """So that batch norms of a batch in pieces see the same samples on any number of ranks."""
    ranks = Ranks()
    ranks.count = 4
    pieces = [np.array_split(share, 2) for share in ranks.shares(16)]
    assert sorted(np.concatenate([first for first, _ in pieces]).tolist()) == list(range(8))


def test_noise_is_that_of_the_samples():
    whole = Noise(1, 2).random((8, 3))
    np.testing.assert_array_equal(Noise(1, 2, (1, 6)).random((2, 3)), whole[[1, 6]])
    with pytest.raises(ValueError, match="expected 2 samples, which have numbers, found 3"):
        Noise(1, 2, (1, 6)).random((3, 3))


# The loop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_train_as_one_process_does(kind, count, folders, single, tmp_path):
    made = trained(kind, count, folders[kind], tmp_path)
    vectors, history = single[kind]
    for each in made:
        assert_as_one(each._vectors(), vectors)
        assert each.state.history == made[0].state.history
        assert each.ranks.handed_over == each.steps * each.optimizer.weights.nbytes  # every gradient once a step
        np.testing.assert_array_equal(each.optimizer.weights, made[0].optimizer.weights)
    for row, expected in zip(made[0].state.history, history, strict=True):
        assert row == pytest.approx(expected, rel=1e-9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank0"]  # the others write nothing


def test_each_rank_reads_its_own_images_alone(folders, tmp_path):
    def work(ranks):
        made, read = trainer("classification", folders["classification"], tmp_path, "float64", {}, ranks=ranks), []
        real = made.objective.read
        made.objective.read = lambda example, key: read.append(example.path) or real(example, key)
        assert len(list(made._batches())) == made.steps_per_epoch == 2
        return read

    reads = on_ranks(2, work)
    assert [len(read) for read in reads] == [8, 8] and len({*reads[0], *reads[1]}) == 16


def test_each_rank_looks_at_a_part_of_the_data_and_all_know_the_whole(folders, tmp_path, monkeypatch):
    looked, real = [], examples.read_picture
    monkeypatch.setattr(examples, "read_picture", lambda path: looked.append(path) or real(path))
    shutil.copytree(folders["classification"], tmp_path / "d")
    (tmp_path / "d" / "red" / "1.png").write_bytes(b"no image")
    alone = examples.read_examples(tmp_path / "d", 0.2)
    assert len(alone.unreadable) == 1 and len(looked) == 26
    made = on_ranks(3, lambda ranks: examples.read_examples(tmp_path / "d", 0.2, ranks=ranks))
    assert made == [alone] * 3 and len(looked) == 2 * 26
    segments = on_ranks(2, lambda ranks: read_pairs(folders["segmentation"], 0.2, ranks=ranks))
    assert segments == [read_pairs(folders["segmentation"], 0.2)] * 2


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_ranks_compute_pieces_as_one_process_does(kind, folders, tmp_path):
    one = trainer(kind, folders[kind], tmp_path / "one", "float64", {}, accumulate=2)
    one.run()
    made = trained(kind, 2, folders[kind], tmp_path, accumulate=2)
    assert_as_one(made[0]._vectors(), one._vectors())
    assert made[0].ranks.handed_over == made[0].steps * made[0].optimizer.weights.nbytes


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_a_training_goes_on_with_another_number_of_ranks(before, after, folders, single, tmp_path, monkeypatch):
    kind, asking = "classification", []

    class OneRankIsAsked(StopSign):
        @property
        def asked(self):
            return bool(asking) and asking.pop()

    monkeypatch.setattr(loop, "stop_signals", lambda: nullcontext(OneRankIsAsked()))

    def stopped(ranks):
        def tell(progress):
            if progress.step == 3:
                asking.append(True)

        made = trainer(kind, folders[kind], tmp_path, "float64", {}, ranks=ranks, tell=tell)
        with pytest.raises(Stopped, match="stopped after step 3 of 4"):
            made.run()

    def resumed(ranks):
        made = trainer(kind, folders[kind], tmp_path, "float64", {}, ranks=ranks)
        made.resume()
        assert made.state.step == 3
        made.run()
        return made

    on_ranks(before, stopped)
    for each in on_ranks(after, resumed):
        assert_as_one(each._vectors(), single[kind][0])


def test_a_rank_with_other_settings_is_refused(folders, tmp_path):
    def work(ranks):
        recipe = {"lr": 1e-3} if ranks.rank else {}
        return trainer("classification", folders["classification"], tmp_path, "float64", recipe, ranks=ranks)

    def other_weights(ranks):
        made = trainer("classification", folders["classification"], tmp_path, "float64", {}, ranks=ranks)
        made.optimizer.weights[7] += ranks.rank
        made.state.step, made.state.seen = made.steps_per_epoch, made.batch_size
        made._end_epoch(StopSign())

    with pytest.raises(ValueError, match="rank 1 has other settings than the first; give all of them the same"):
        on_ranks(2, work)
    with pytest.raises(ValueError, match="rank 1 has other weights than the first; they must have the same program"):
        on_ranks(2, other_weights)


def test_what_is_not_finite_is_found_in_the_rank_that_has_it(folders, tmp_path):
    def work(ranks):
        made = trainer("classification", folders["classification"], tmp_path, "float64", {}, ranks=ranks)
        if ranks.rank == 1:
            flatten(made.model.params)["beit.encoder.1.fc1.weight"][0, 0] = np.nan
        made._step(next(made._batches()))

    with pytest.raises(loop.NotFinite, match=r"not finite is the weights beit\.encoder\.1\.fc1\.weight"):
        on_ranks(2, work)


# Sums while the backward goes on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_buckets_are_sent_while_gradients_are_still_to_come(kind, folders, tmp_path):
    events = []

    class Noting(Ranks):
        def begin_sum(self, array):
            events.append(array.nbytes)

    made = trainer(kind, folders[kind], tmp_path / "o", "float64", {}, accumulate=2)
    made.sums.ranks = Noting()
    real = made.sums.add
    made.sums.add = lambda name, g, last: events.append(name) or real(name, g, last)
    found = made._learned(made.objective.for_step(next(made._batches()), 0.0, (0,)))
    names = [event for event in events if isinstance(event, str)]
    sent = [i for i, event in enumerate(events) if not isinstance(event, str)]
    learned = [name for name in flatten(found.grads)]
    assert sorted(names) == sorted(2 * learned)  # every gradient once for each piece
    assert min(sent) > len(learned)  # none is sent before the last piece
    assert len(sent) > 3 and sum(1 for i in sent if i < len(events) - 1) >= len(sent) - 2
    assert sum(events[i] for i in sent) == made.optimizer.weights.nbytes


def test_gradients_are_handed_over_when_they_are_final(folders, tmp_path):
    """A table that all blocks share is complete only when the first block is through."""
    from minibeit.train.gradients import value_and_grad

    made = trainer("masked modelling", folders["masked modelling"], tmp_path / "o", "float64", {})
    batch = next(made._batches())
    options = dict(loss=made.objective.loss(batch), rng=Noise(0), **batch.inputs)
    plain = flatten(value_and_grad(made.model, batch.pixels, **options).grads)
    order = []

    def ready(name, gradient):
        order.append(name)
        np.testing.assert_array_equal(gradient, plain[name], err_msg=name)
        return 2 * gradient

    doubled = flatten(value_and_grad(made.model, batch.pixels, ready=ready, **options).grads)
    assert sorted(order) == sorted(plain)
    assert all(np.array_equal(doubled[name], 2 * plain[name]) for name in plain)
    places = [order.index(f"beit.{name}") for name in ("encoder.1.fc2.weight", "encoder.0.fc2.weight",
                                                       "shared_bias_table", "embeddings.patch.weight")]  # fmt: skip
    assert places == sorted(places)
    third = flatten(value_and_grad(made.model, batch.pixels, weight=1 / 3, **options).grads)
    assert all(distance(third[name], plain[name] / 3) < 1e-13 for name in plain)


def test_what_has_no_gradient_is_summed_as_zero():
    slots = [Slot("a", 0, 3, 1, 0), Slot("b", 3, 5, 1, 0), Slot("c", 5, 6, 1, 0)]
    sums = SummedGradients(slots, np.dtype("float64"), Ranks(), bucket_bytes=16)
    assert [[slot.name for slot in bucket] for bucket in sums.buckets] == [["a"], ["b"], ["c"]]
    for _ in range(2):
        sums.begin()
        sums.vector[...] = np.nan
        place = sums.add("c", np.array([2.0]), last=False)
        sums.add("a", np.ones(3), last=False)
        sums.add("c", np.array([3.0]), last=True)
        sums.end()
        np.testing.assert_array_equal(sums.vector, [1, 1, 1, 0, 0, 5])
        assert place.base is sums.vector


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (1, 0)),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, (4, 3)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, (2, 1)),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}, (8, 5)),
        ({"SLURM_PROCID": "5"}, (1, 0)),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, (1, 0)),
    ],
)
def test_the_environment_says_how_many_were_started(environment, expected, monkeypatch):
    for name in {*cli_ranks.SIZES, *cli_ranks.RANKS}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (cli_ranks.started(), cli_ranks.rank()) == expected


@pytest.fixture
def started_twice(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setattr(cli_ranks, "FIRST_SPEAKS", 0)


def test_without_mpi4py_one_sentence_says_what_to_install(started_twice, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    words = ("finetune", class_folders(tmp_path / "d", 2), "--from-scratch", "tiny", "--output", tmp_path / "o")
    code, _, err = run(capsys, *words)
    assert code == 1 and err.count("\n") == 1
    assert err.startswith("minibeit: error: rank 1: ") and 'pip install "minibeit[mpi]"' in err


def test_ranks_that_mpi4py_does_not_see_are_refused(started_twice, capsys, tmp_path, monkeypatch):
    from minibeit.train import mpi

    monkeypatch.setattr(mpi, "world", Ranks)
    words = ("finetune", class_folders(tmp_path / "d", 2), "--from-scratch", "tiny", "--output", tmp_path / "o")
    code, _, err = run(capsys, *words)
    assert code == 2 and "expected 2 ranks, as many as were started together, found one" in err


def test_words_that_make_no_command_are_said_by_the_first_alone(started_twice, capsys):
    assert run(capsys, "finetune", "--no-such-option") == (2, "", "")


@pytest.mark.parametrize(
    ("own", "others", "usable", "expected"),
    [
        ({0, 1, 2, 3}, [{0, 1, 2, 3}] * 2, 4, 2),  # not bound: they share all cores
        ({0, 1}, [{0, 1}, {2, 3}], 2, 2),  # bound to cores of their own
        ({0}, [{0}] * 4, 1, 1),
        (set(range(16)), [set(range(16))] * 4, 8, 2),  # a container with time for 8 of them
    ],
)
def test_ranks_of_one_machine_share_its_cores(own, others, usable, expected, monkeypatch):
    from minibeit.train import mpi

    monkeypatch.setattr(mpi, "own_cpus", lambda: frozenset(own))
    assert mpi.MpiRanks.cores(SimpleNamespace(_cores=list(map(frozenset, others))), usable) == expected
