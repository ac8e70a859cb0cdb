"""Shards of images through a real Dask scheduler and workers: every image once, resumed, never mixed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import ENVIRONMENT, NAMES, run, save, save_pictures, served

from minibeit import BeitBackbone, BeitForImageClassification, BeitImageProcessor, CheckpointError

pytest.importorskip("distributed", reason="needs the extra cluster")
import cloudpickle
import dask.bag
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from distributed import Client, KilledWorker

from minibeit.cluster import Classify, Features, Summary, find, run_on_dask
from minibeit.cluster.engine import _gather
from minibeit.cluster.folder import MANIFEST, Folder
from minibeit.cluster.worker import Holder, compute_shard
from minibeit.cluster.works import fingerprint


@pytest.fixture(scope="module")
def client():
    """A scheduler and a worker of two threads in this process, where memory:// is the same for all."""
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0") as client:
        yield client


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), "classify")


@pytest.fixture(scope="module")
def work(checkpoint):
    model = BeitForImageClassification.from_pretrained(checkpoint)
    return Classify(model, BeitImageProcessor.from_pretrained(checkpoint))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """23 images and, as number 5, a file that is none."""
    folder = tmp_path_factory.mktemp("images")
    paths = [str(path) for path in save_pictures(folder, *(f"{i}.png" for i in range(24)))]
    (folder / "5.png").write_text("not an image")
    return paths


def rows(folder):
    return pq.read_table(folder).to_pylist()


def expected(work, paths):
    logits = work.model(work.processor(paths).pixel_values).logits
    return logits, [NAMES[i] for i in logits.argmax(1)]


# Results --------------------------------------------------------------------------------------------------------------


def test_every_image_has_one_row_in_its_order(client, work, images, tmp_path):
    told = []
    summary = run_on_dask(images, work, tmp_path / "out", dask=client, shard_size=5, tell=told.append)
    assert (summary.images, summary.broken, summary.shards, summary.kept, summary.failed) == (24, 1, 5, 0, [])
    assert sum(told) == 24 and "24 images in 5 shards, 1 of them could not be used" in summary.sentence()
    found = rows(tmp_path / "out")
    assert [row["file"] for row in found] == images
    assert "5.png" in found[5]["error"] and found[5]["labels"] is None
    good = [row for row in found if row["error"] is None]
    logits, labels = expected(work, [row["file"] for row in good])
    assert [row["labels"][0] for row in good] == labels and len(good) == 23
    np.testing.assert_allclose([row["logits"] for row in good], -np.sort(-logits, axis=1), rtol=1e-5, atol=1e-5)
    assert {len(row["scores"]) for row in good} == {4}


@pytest.mark.filterwarnings("ignore:.*another task")
@pytest.mark.parametrize("pool", ["mean", "cls", "none"])
def test_features_are_lists_of_one_size(client, checkpoint, images, tmp_path, pool):
    model = BeitBackbone.from_pretrained(
        checkpoint, out_indices=(3,), add_fpn=False, reshape_hidden_states=False, dtype="float64"
    )
    processor = BeitImageProcessor.from_pretrained(checkpoint)
    run_on_dask(images, Features(model, processor, pool=pool), tmp_path, dask=client)
    table = pq.read_table(tmp_path)
    size = 17 * 16 if pool == "none" else 16
    assert table.schema.field("features").type == pa.list_(pa.float64(), size)
    states = model(processor(images[0]).pixel_values).feature_maps[0]
    truth = {"mean": states[:, 1:].mean(1), "cls": states[:, 0], "none": states}[pool]
    np.testing.assert_allclose(table["features"][0].as_py(), truth.ravel(), rtol=1e-12)
    assert table["features"][5].as_py() is None and table["error"].null_count == 23


def test_a_bag_is_computed_by_partitions(client, work, images, tmp_path):
    bag = dask.bag.from_sequence(images, npartitions=4).map(str.strip)
    first = run_on_dask(bag, work, tmp_path, dask=client)
    assert (first.images, first.shards, first.kept) == (24, 4, 0)
    assert [row["file"] for row in rows(tmp_path)] == images
    (tmp_path / "shard-00000002.parquet").unlink()
    again = run_on_dask(dask.bag.from_sequence(images, npartitions=4).map(str.strip), work, tmp_path, dask=client)
    assert (again.images, again.kept, again.computed) == (24, 3, 6)
    with pytest.raises(ValueError, match=r"images is .* choose another --output"):
        run_on_dask(dask.bag.from_sequence(images[1:], npartitions=4), work, tmp_path, dask=client)


def test_a_folder_and_a_scheduler_by_the_name_of_its_file(client, work, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("scheduler.json").write_text(json.dumps({"address": client.scheduler.address}))
    summary = run_on_dask(os.path.dirname(images[0]), work, "out", dask="scheduler.json")
    assert (summary.images, summary.shards) == (24, 1)
    assert [row["file"] for row in rows(tmp_path / "out")] == images


# Resuming -------------------------------------------------------------------------------------------------------------


def test_finished_shards_are_kept(client, work, images, tmp_path):
    run_on_dask(images, work, tmp_path, dask=client, shard_size=5)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    os.unlink(tmp_path / "shard-00000001.parquet")
    summary = run_on_dask(images, work, tmp_path, dask=client, shard_size=5)
    assert (summary.kept, summary.computed, summary.images, summary.broken) == (4, 5, 24, 1)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    assert {name for name in after if after[name] == before[name]} == set(before) - {"shard-00000001.parquet"}
    assert "(4 of them finished before)" in summary.sentence()
    done = run_on_dask(images, work, tmp_path, dask="tcp://127.0.0.1:9", shard_size=5)  # asks no cluster
    assert (done.kept, done.computed) == (5, 0)


def test_other_work_is_not_mixed_in(client, work, checkpoint, images, tmp_path):
    run_on_dask(images, work, tmp_path / "out", dask=client)
    processor = BeitImageProcessor.from_pretrained(checkpoint)
    other = BeitForImageClassification.from_pretrained(save(tmp_path / "other", "classify", initializer_range=0.2))
    for images_, changed, said in (
        (images, Classify(other, processor), "work"),
        (images, Classify(work.model, processor, top_k=2), "work"),
        (images[::-1], work, "images"),
    ):
        with pytest.raises(ValueError, match=rf"has shards of other work, whose {said} is .*; choose another --output"):
            run_on_dask(images_, changed, tmp_path / "out", dask=client)
    with pytest.raises(ValueError, match=r'whose work is \{"top_k": 5\} and not \{"top_k": 3\}; choose'):
        run_on_dask(images, Classify(work.model, processor, top_k=3), tmp_path / "out", dask=client)
    with pytest.raises(ValueError, match="shard size is 256 and not 7"):
        run_on_dask(images, work, tmp_path / "out", dask=client, shard_size=7)
    assert len(rows(tmp_path / "out")) == 24


def test_a_folder_with_other_files(work, images, tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "mine.parquet")
    with pytest.raises(ValueError, match="expected an empty folder or one of this work, found other Parquet files"):
        run_on_dask(images, work, tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="expected a manifest of minibeit"):
        run_on_dask(images, work, tmp_path)


def test_a_shard_appears_complete_or_not_at_all(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    assert folder.prepare({"work": 1}) == set()

    def full(descriptor):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)  # when all has been written, but under another name
    with pytest.raises(OSError, match="no space"):
        folder.write(0, pa.table({"x": [1]}))
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_a_damaged_shard_is_named(client, work, images, tmp_path, memory):
    for place in (str(tmp_path), "memory://out"):
        run_on_dask(images, work, place, dask=client, shard_size=12)
        with fsspec.open(f"{place}/shard-00000001.parquet", "wb") as file:
            file.write(b"PAR1")
        with pytest.raises(ValueError, match=r"/shard-00000001.parquet: the shard is damaged \(.*once deleted"):
            run_on_dask(images, work, place, dask=client, shard_size=12)


def test_models_are_told_apart(tmp_path, checkpoint):
    one = fingerprint(BeitForImageClassification.from_pretrained(checkpoint))
    again = fingerprint(BeitForImageClassification.from_pretrained(checkpoint))
    model = BeitForImageClassification.from_pretrained(checkpoint)
    changed = {name: array.copy() for name, array in model.arrays.items()}
    changed["classifier.bias"][0] += 1
    assert one == again != fingerprint(BeitForImageClassification(model.config, arrays=changed))


# Errors ---------------------------------------------------------------------------------------------------------------


class Failing(Classify):
    """Work that a checkpoint's absence ends in every worker."""

    def table(self, images):
        raise CheckpointError("model.safetensors: is not on this host")


def test_an_error_of_the_work_ends_the_run(client, work, images, tmp_path):
    with pytest.raises(CheckpointError, match=r"^model.safetensors: is not on this host$"):
        run_on_dask(images, Failing(work.model, work.processor), tmp_path, dask=client, shard_size=3)


def test_a_scheduler_that_is_not_there(work, images, tmp_path, monkeypatch):
    monkeypatch.setattr("minibeit.cluster.engine.CONNECTING", 0.2)
    with pytest.raises(OSError, match=r"^tcp://127.0.0.1:9: no Dask scheduler can be reached there"):
        run_on_dask(images, work, tmp_path, dask="tcp://127.0.0.1:9")


def test_a_cluster_without_workers(work, images, tmp_path, monkeypatch):
    monkeypatch.setattr("minibeit.cluster.engine.JOINING", 0.2)
    with Client(processes=False, n_workers=0, dashboard_address=":0", set_as_default=False) as empty:
        address = empty.scheduler.address
        with pytest.raises(OSError, match=r"no worker has joined the scheduler within 0.2 seconds"):
            run_on_dask(images, work, tmp_path, dask=address)


class Future:
    """What Dask has of a shard: a result, or an error each time that it is asked for."""

    def __init__(self, *results):
        self.results, self.retried = list(results), 0

    def result(self):
        found = self.results[self.retried]
        if isinstance(found, Exception):
            raise found
        return found

    def retry(self):
        self.retried += 1


def test_only_a_shard_that_kills_a_worker_when_it_is_alone_is_to_blame():
    killed = KilledWorker("key", None, 3)
    futures = [Future((5, 1)), Future(killed, killed), Future(killed, (7, 0)), Future((5, 0))]
    told, summary = [], Summary()
    _gather(zip(["a", "b", "c", "d"], futures), summary, told.append)
    assert summary.failed == ["b: 4 workers died of it, one after another"]
    assert (summary.images, summary.computed, summary.broken, told) == (17, 17, 1, [5, 5, 7])
    assert [future.retried for future in futures] == [0, 1, 1, 0]
    with pytest.raises(CheckpointError):
        _gather([("a", Future(CheckpointError("gone")))], summary, told.append)


def test_what_a_worker_had_finished_is_not_computed_again(client, work, images, tmp_path):
    folder, found = Folder(str(tmp_path)), []
    folder.prepare({"work": 1})
    for items in (images[:7], ["never read"]):
        client.register_plugin(Holder(cloudpickle.dumps(work), str(tmp_path)), name="again")
        found.append(client.submit(compute_shard, "again", 0, items, pure=False).result())
        client.unregister_worker_plugin("again")
    assert found == [(7, 1), (7, 1)] and [row["file"] for row in rows(tmp_path)] == images[:7]


# Places ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def test_addresses_are_listed_fetched_and_written_to(client, work, images, memory):
    for path in images[:12]:
        memory.pipe_file(f"/photos/{os.path.basename(path)}", Path(path).read_bytes())
    memory.pipe_file("/photos/deep/a.png", b"")
    memory.pipe_file("/photos/notes.txt", b"photos are here")
    found = find(["memory://photos"])
    assert [place.rpartition("/")[2] for place in found] == [f"{i}.png" for i in range(12)]
    assert len(find(["memory://photos"], recursive=True)) == 13
    assert len(find(["memory://photos/1*.png"])) == 3
    summary = run_on_dask([*found, "memory://photos/gone.png"], work, "memory://out", dask=client, shard_size=4)
    assert (summary.images, summary.broken) == (13, 2)
    assert run_on_dask([*found, "memory://photos/gone.png"], work, "memory://out", dask=client, shard_size=4).kept == 4
    table = pa.concat_tables(Folder("memory://out").read(number) for number in range(4))
    assert table["file"].to_pylist() == [*found, "memory://photos/gone.png"]
    errors = [row["error"] for row in table.to_pylist() if row["error"]]
    assert re.match(r"memory://.*5\.png: expected an image", errors[0])
    assert errors[1] == "memory://photos/gone.png: there is no such file"
    good = [i for i in range(12) if i != 5]
    assert [table["labels"][i].as_py()[0] for i in good] == expected(work, [images[i] for i in good])[1]


def test_images_from_a_web_server(client, work, images, tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec needs it for http")
    with served(os.path.dirname(images[0])) as address:
        found = [f"{address}/{i}.png" for i in (0, 1, 2)] + [f"{address}/gone.png"]
        assert find([f"{found[0]}?size=5"]) == [f"{found[0]}?size=5"]  # which is no pattern
        summary = run_on_dask(found, work, tmp_path, dask=client)
    assert (summary.images, summary.broken) == (4, 1)
    assert [row["labels"][0] for row in rows(tmp_path)[:3]] == expected(work, images[:3])[1]


def test_lists_folders_and_patterns_are_found(images, tmp_path, monkeypatch):
    folder = os.path.dirname(images[0])
    assert find([folder]) == images and find([f"{folder}/1?.png"]) == images[10:20]
    listing = tmp_path / "list.txt"
    listing.write_text(f"\ufeff{images[3]}\n\n  near.png \ns3://bucket/far.png\n", encoding="utf-8")
    assert find([str(listing)]) == [images[3], str(tmp_path / "near.png"), "s3://bucket/far.png"]
    monkeypatch.chdir(tmp_path)
    assert find(["list.txt"]) == find([str(listing)]) and find(["a.png"]) == [str(tmp_path / "a.png")]
    assert find([f"file://{folder}"]) == [f"file://{image}" for image in images]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("-", "workers cannot read standard input"),
        ("nowhere*.png", "no file matches"),
        ("memory://nothing", "memory://nothing"),
        ("oddly://bucket/x", "oddly://bucket/x: cannot be opened"),
        ("memory://*.png", "there is no image"),
    ],
)
def test_words_that_name_nothing(word, said, memory):
    if word == "memory://nothing":  # perhaps an image whose name has no suffix; the workers will see
        assert find([word]) == [word]
        return
    with pytest.raises(ValueError, match=re.escape(said)):
        find([word])


# The command line -----------------------------------------------------------------------------------------------------


def test_classify_in_processes_of_this_machine(tmp_path, checkpoint, images):
    words = ["classify", *images, "-m", checkpoint, "--dask", "local", "--workers", 1, "--shard-size", 6, "-o", "out"]
    command = [sys.executable, "-m", "minibeit", *map(str, words)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1 and "out: 24 images in 4 shards, 1 of them could not be used" in done.stdout
    assert "1 images could not be used" in done.stderr and "Traceback" not in done.stderr
    assert [row["file"] for row in rows(tmp_path / "out")] == images


def test_without_the_extra_one_sentence_names_it(capsys, tmp_path, checkpoint, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    code, _, err = run(capsys, "classify", images[0], "-m", checkpoint, "--dask", "local", "-o", tmp_path / "out")
    said = 'needs the extra "cluster", of which distributed is missing: pip install "minibeit[cluster]"'
    assert code == 1 and said in err
    assert err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["classify", "--dask", "local"], "--dask needs --output FOLDER"),
        (["classify", "--dask", "local", "-o", "out", "--csv"], "--csv says how results are printed"),
        (["classify", "-o", "out"], "--output goes with --dask"),
        (["features", "-o", "x.npz", "--workers", "2"], "--workers goes with --dask"),
        (["evaluate", "--shard-size", "2"], "--shard-size goes with --dask"),
        (["classify", "--dask", "tcp://h:1", "--workers", "2", "-o", "out"], "this cluster has workers of its own"),
        (["classify", "--dask", "local", "-o", "notes.txt"], "is a file, expected a folder"),
    ],
)
def test_options_that_do_not_go_together(capsys, tmp_path, checkpoint, words, said, monkeypatch):
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, words[0], "images", "-m", checkpoint, *words[1:])
    assert code == 2 and said in err and err.count("\n") == 1
