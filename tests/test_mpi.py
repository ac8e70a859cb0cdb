"""Training on real MPI processes, started by mpiexec: as one process, and ended by whichever rank fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import ENVIRONMENT
from rank_trainers import KINDS, save_data, trainer
from test_ranks import assert_as_one, distance
from tolerances import RANKS32, RANKS64
from training_data import class_folders

from minibeit.train.state import load_state

pytest.importorskip("mpi4py", reason="needs the extra mpi")
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MPIEXEC is None, reason="needs mpiexec, as of the package mpich")]

PROGRAM = Path(__file__).with_name("rank_trainers.py")
PLAIN = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
TWENTY_STEPS = {"epochs": 10, "lr": 1e-3}  # of two steps each
SECONDS = 120
CANCELLED = re.compile(r"fpn\.deconv[123]\.bias")


def mpiexec(count, *words, **options):
    """A command of so many ranks, started."""
    command = [MPIEXEC, "-n", str(count), sys.executable, *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=PLAIN, stdout=pipe, stderr=pipe, text=True, encoding="utf-8", **options)


def finished(process) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command that ends by itself."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def train(count, kind, data, folder, dtype="float64", changes=TWENTY_STEPS, *words) -> list[dict[str, np.ndarray]]:
    """The final vectors of each rank."""
    folder.mkdir(exist_ok=True)
    code, _, err = finished(mpiexec(count, PROGRAM, kind, data, folder, dtype, json.dumps(changes), *words))
    assert code == 0, err
    return [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {kind: save_data(kind, folder / kind) for kind in KINDS}


def compared(weights, made):
    """The weights, in float32 without those whose gradient is rounding alone, of which Adam makes whole steps: biases
    that the mean of a batch norm takes away again."""
    if weights.dtype == np.float64:
        return weights
    left = [weights[slot.start : slot.stop] for slot in made.optimizer.slots if not CANCELLED.fullmatch(slot.name)]
    return np.concatenate(left)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_one_process_does(kind, dtype, data, tmp_path):
    """Twenty steps: two ranks of batch 4 and one process of batch 8; every gradient is handed to MPI once a step."""
    one = trainer(kind, data[kind], tmp_path / "one", dtype, TWENTY_STEPS)
    one.run()
    made = train(2, kind, data[kind], tmp_path / "two", dtype)
    tolerance = RANKS32 if dtype == "float32" else RANKS64
    for vectors in made:
        assert distance(compared(vectors["weights"], one), compared(one.optimizer.weights, one)) <= tolerance
        assert vectors["handed over"].tolist() == [20 * one.optimizer.weights.nbytes, 20]
        for name, vector in made[0].items():
            np.testing.assert_array_equal(vectors[name], vector, err_msg=name)


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_the_fast_backend_trains_on_ranks_too(kind, data, tmp_path):
    recipe = {**TWENTY_STEPS, "backend": "numba"}
    one = trainer(kind, data[kind], tmp_path / "one", "float32", recipe)
    one.run()
    for vectors in train(2, kind, data[kind], tmp_path / "two", "float32", recipe):
        assert distance(compared(vectors["weights"], one), compared(one.optimizer.weights, one)) <= RANKS32


@pytest.mark.parametrize("count", [2, 3])
def test_as_many_ranks_give_the_same_bits_again(count, data, tmp_path):
    kind = "segmentation"
    first, again = (train(count, kind, data[kind], tmp_path / name, "float32", {})[0] for name in ("a", "b"))
    for name, vector in first.items():
        np.testing.assert_array_equal(again[name], vector, err_msg=name)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 3), (3, 2)])
def test_a_stopped_training_goes_on_with_any_number_of_ranks(before, after, data, tmp_path):
    kind, recipe = "classification", {"epochs": 3}
    whole = train(after, kind, data[kind], tmp_path / "whole", "float64", recipe)[0]
    train(before, kind, data[kind], tmp_path / "o", "float64", recipe, "stop", 3)
    made = train(after, kind, data[kind], tmp_path / "o", "float64", recipe, "resume")[0]
    assert made["handed over"][1] == 3
    if before == after:
        assert all(np.array_equal(made[name], whole[name]) for name in whole if name != "handed over")
    assert_as_one({"weights": made["weights"]}, {"weights": whole["weights"]})


# The command line -----------------------------------------------------------------------------------------------------


def words_of(data, output, *more):
    start = ("--from-scratch", "tiny", "--recipe", "tiny", "--batch-size", "8")
    return ("-m", "minibeit", "finetune", data, *start, "--output", output, *more)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("images"), 12)


def test_the_command_speaks_once_and_leaves_what_one_process_leaves(images, tmp_path):
    code, out, err = finished(mpiexec(2, *words_of(images, tmp_path / "two", "--epochs", "2")))
    assert code == 0, err
    assert out.count("best epoch") == 1 and err.count("held out") == 1 and "on 2 ranks" in err
    done = subprocess.run([sys.executable, *map(str, words_of(images, tmp_path / "one", "--epochs", "2"))], env=PLAIN)
    assert done.returncode == 0
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert names[0] == names[1] and "training_state.safetensors" in names[0]
    rows = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("one", "two")]
    for one, two in zip(*rows, strict=True):
        assert two == pytest.approx(one, rel=1e-4)


RANK_1 = """
import os, signal, sys
from minibeit.cli import main, ranks
from minibeit.train.objective import Classification
read = Classification.read
def failing(self, example, key):
    if ranks.rank() == 1 and key[1] == 2:  # in the third epoch
        {does}
    return read(self, example, key)
Classification.read = failing
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ('raise ValueError("a disk has failed")', "minibeit: error: rank 1: a disk has failed"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
    ],
)
def test_a_rank_that_dies_ends_the_run_and_the_last_checkpoint_goes_on(does, says, images, tmp_path):
    words = words_of(images, tmp_path / "o", "--epochs", "4", "--seed", "0")[2:]
    code, out, err = finished(mpiexec(2, "-c", RANK_1.format(does=does), *words))
    assert code != 0 and says in out + err and err.count("error:") == (1 if "raise" in does else 0)
    code, out, err = finished(mpiexec(2, "-m", "minibeit", *words, "--resume"))
    assert code == 0 and re.search("goes on after step [24] of 8", err), err  # the first may still have been saving


def test_what_all_ranks_find_wrong_is_said_once(tmp_path):
    code, _, err = finished(mpiexec(2, *words_of(tmp_path / "nothing", tmp_path / "o")))
    assert code == 1 and err.count("minibeit: error:") == 1 and "there is no such folder" in err


def test_ctrl_c_stops_all_ranks_after_the_same_step(images, tmp_path):
    process = mpiexec(2, *words_of(images, tmp_path / "o", "--epochs", "10000"))
    end = time.monotonic() + SECONDS
    while not (tmp_path / "o" / "log.jsonl").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    code, _, err = finished(process)
    assert code == 130 and err.count("the same command with --resume goes on") == 1, err
    state, _ = load_state(tmp_path / "o", {})
    assert f"stopped after step {state.step} of 20000" in err
