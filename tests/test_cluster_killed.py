"""Twenty thousand images while workers and the client are killed: every image once, and only the shards at hand are
computed twice."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import save, start
from PIL import Image

pytest.importorskip("distributed", reason="needs the extra cluster")
import pyarrow.parquet as pq
from distributed import LocalCluster

from minibeit import BeitForImageClassification, BeitImageProcessor
from minibeit.cluster import Classify, run_on_dask

pytestmark = pytest.mark.slow
COUNT, SHARD = 20_000, 250


@pytest.fixture(scope="module")
def cluster():
    """Two processes of one thread, each started anew when it dies."""
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as cluster:
        yield cluster


def shards(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.parquet")}


def until(folder: Path, count: int, process: subprocess.Popen) -> set[str]:
    """Waits until that many shards are finished; their names."""
    end = time.monotonic() + 600
    while len(found := shards(folder)) < count:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    return found


def processes(cluster) -> dict[str, int]:
    """{address: process id} of the workers."""
    return {nanny.worker_address: nanny.pid for nanny in cluster.workers.values()}


def test_every_image_once_though_a_worker_and_the_client_die(cluster, tmp_path):
    model, images, output = save(tmp_path / "model", "classify"), tmp_path / "images", tmp_path / "out"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(images / f"{i}.bmp")
    (images / "777.bmp").write_bytes(b"no image")
    words = ["classify", str(images), "-m", str(model), "--dask", cluster.scheduler_address, "-o", str(output)]
    words += ["--shard-size", str(SHARD), "-k", "1", "-q"]

    client = start(*words)
    until(output, 10, client)
    victim, pid = next(iter(processes(cluster).items()))
    os.kill(pid, signal.SIGKILL)  # its shard is computed by another worker
    until(output, 25, client)
    assert victim not in processes(cluster) or processes(cluster)[victim] != pid
    client.kill()
    client.communicate()
    time.sleep(1)  # shards that workers have begun are finished
    kept = {name: (output / name).stat().st_mtime_ns for name in shards(output)}

    client = start(*words)
    out, err = client.communicate(timeout=900)
    assert client.returncode == 1 and not err and f"{COUNT} images in {COUNT // SHARD} shards" in out
    assert f"({len(kept)} of them finished before)" in out or len(kept) < COUNT // SHARD
    table = pq.read_table(output)
    assert Counter(table["file"].to_pylist()) == Counter(str(images / f"{i}.bmp") for i in range(COUNT))
    assert len(table) - table["error"].null_count == 1
    assert {name: (output / name).stat().st_mtime_ns for name in kept} == kept


def test_a_shard_that_kills_its_workers_is_named_and_the_others_are_finished(tmp_path):
    """As an image would that takes more memory than the host has."""
    model = BeitForImageClassification.from_pretrained(save(tmp_path / "model", "classify"))
    work = Deadly(model, BeitImageProcessor(size=16))
    images = [str(tmp_path / f"{i}.png") for i in range(6)]
    for path in images:
        Image.new("RGB", (16, 16)).save(path)
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as cluster:
        summary = run_on_dask(images, work, tmp_path / "out", dask=cluster.scheduler_address, shard_size=2)
    assert summary.failed == ["shard 1 (images 3 to 4): 4 workers died of it, one after another"]
    assert [row["file"] for row in pq.read_table(tmp_path / "out").to_pylist()] == images[:2] + images[4:]


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no groups of processes")
def test_ctrl_c_leaves_one_line_and_no_process(tmp_path):
    model, image = save(tmp_path / "model", "classify"), tmp_path / "image.png"
    Image.new("RGB", (16, 16)).save(image)
    (tmp_path / "list.txt").write_text(f"{image}\n" * 100_000)
    words = ["classify", str(tmp_path / "list.txt"), "-m", str(model), "--dask", "local", "--workers", "2", "-q"]
    program = start(*words, "-o", tmp_path / "out", start_new_session=True)
    until(tmp_path / "out", 2, program)
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does, to workers as well
    out, err = program.communicate(timeout=120)
    assert (program.returncode, out, err) == (130, "", "minibeit: error: interrupted\n")
    assert gone(program.pid)


def gone(group: int) -> bool:
    """Whether the processes of a group end within half a minute."""
    for _ in range(300):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


class Deadly(Classify):
    def table(self, images):
        if any(image.endswith("3.png") for image in images):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().table(images)
