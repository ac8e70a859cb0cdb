"""Every command with --dask: the same figures and the same maps as in one process."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from cli_helpers import NAMES, run, save, save_pictures
from PIL import Image
from safetensors.numpy import load_file
from test_cli_pretrain import TOKENS

from minibeit import BeitImageProcessor
from minibeit.tokenizer.tokenizer import DalleTokenizer

pytest.importorskip("distributed", reason="needs the extra cluster")
import pyarrow.parquet as pq
from distributed import Client


@pytest.fixture(scope="module")
def dask():
    """The words that name a scheduler with a worker of two threads, in this process."""
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0") as client:
        yield ["--dask", client.scheduler.address, "-q"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Five images in each of four class folders, two of which cannot be read."""
    data = tmp_path_factory.mktemp("evaluate") / "val"
    for name in NAMES:
        save_pictures(data / name, *(f"{name}{i}.png" for i in range(5)))
    (data / "ant" / "ant1.png").write_bytes(b"no image")
    (data / "dog" / "dog4.png").write_bytes(b"")
    return data


def both(capsys, tmp_path, dask, *words, pages=False):
    """What `evaluate` writes as JSON in one process and on Dask, in shards of 4; (page, page) too if asked."""
    found = []
    for name, more in (("one", ["-q"]), ("dask", [*dask, "--shard-size", 4, "-o", tmp_path / "shards"])):
        page = ["--html", tmp_path / f"{name}.html"] if pages else []
        code, out, err = run(capsys, "evaluate", *words, "--json", tmp_path / f"{name}.json", *page, *more)
        values = json.loads((tmp_path / f"{name}.json").read_text())
        values.pop("seconds")
        found.append((code, out, err, values))
    return found


def test_a_classifier_is_measured_alike(capsys, dask, folders, tmp_path):
    model = save(tmp_path / "model", "classify")
    one, two = both(capsys, tmp_path, dask, folders, "-m", model, "--dtype", "float64", "-b", 2)
    assert one == two and one[0] == 1 and one[3]["images"] == 18 and len(one[3]["left_out"]) == 2
    table = pq.read_table(tmp_path / "shards")
    assert len(table) == 20 and table["error"].null_count == 18 and set(table["label"].to_pylist()[:3]) == {0}
    words = ("evaluate", folders, "-m", model, "--dtype", "float64", *dask, "--shard-size", 4)
    code, out, _ = run(capsys, *words, "-o", tmp_path / "shards")
    assert (code, out) == one[:2]  # from the shards that are there


def test_segmentation_is_measured_alike(capsys, dask, tmp_path):
    model = save(tmp_path / "model", "segment")
    rng = np.random.default_rng(0)
    (tmp_path / "maps").mkdir()
    for path in save_pictures(tmp_path / "val", *(f"{i}.png" for i in range(6)), size=(20, 33)):
        labels = rng.integers(0, 4, (20, 33)).astype(np.uint8)
        labels[0] = 255
        Image.fromarray(labels).save(tmp_path / "maps" / path.name)
    (tmp_path / "val" / "2.png").write_bytes(b"no image")
    words = (tmp_path / "val", "--maps", tmp_path / "maps", "-m", model, "--flip", "--worst", 3)
    one, two = both(capsys, tmp_path, dask, *words, pages=True)
    assert one == two and one[3]["images"] == 5 and len(one[3]["worst"]) == 3
    pages = [(tmp_path / f"{name}.html").read_text() for name in ("one", "dask")]
    assert [page.count("data:image/jpeg") for page in pages] == [9, 9]


def test_masked_modeling_is_measured_alike(capsys, dask, folders, tmp_path):
    tokens, model = tmp_path / "tokens", save(tmp_path / "model", "mask", vocab_size=10)
    DalleTokenizer(TOKENS, backend="numpy").save_pretrained(tokens)
    one, two = both(capsys, tmp_path, dask, folders, "-m", model, "--tokenizer", tokens, "-b", 2)
    assert one == two and one[3]["images"] == 18


def test_segment_writes_one_folder_of_maps(capsys, dask, tmp_path):
    model = save(tmp_path / "model", "segment")
    images = save_pictures(tmp_path, *(f"{i}.png" for i in range(5)), size=(20, 33))
    (tmp_path / "3.png").write_bytes(b"no image")
    code, _, _ = run(capsys, "segment", *images, "-m", model, "-o", tmp_path / "one", "--overlay", "-q")
    words = ("segment", *images, "-m", model, "-o", tmp_path / "two", "--overlay", *dask, "--shard-size", 2)
    again, out, err = run(capsys, *words)
    assert code == again == 1 and "5 images in 3 shards, 1 of them could not be used" in out and not err
    maps = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "two").glob("*.png")) == maps and len(maps) == 12
    for name in maps:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    table = pq.read_table(tmp_path / "two" / "shards").to_pylist()
    assert [row["file"] for row in table] == [str(path) for path in images] and "3.png" in table[3]["error"]
    assert table[0]["labels"] == str(tmp_path / "two" / "0_labels.png")
    assert sum(part["pixels"] for part in table[0]["classes"]) == 20 * 33
    code, _, err = run(capsys, *words, "--flip")
    assert code == 1 and "has shards of other work, whose work is" in err


def test_features_of_the_command_are_those_of_one_process(capsys, dask, tmp_path):
    model = save(tmp_path / "model", "bare")
    images = save_pictures(tmp_path, "a.png", "b.png", "c.png")
    words = ("features", *images, "-m", model, "--layer", 2, "--dtype", "float64")
    assert run(capsys, *words, "-o", tmp_path / "one.safetensors", "-q")[0] == 0
    code, out, err = run(capsys, *words, "-o", tmp_path / "two", *dask)
    assert code == 0 and "3 images in 1 shards" in out and not err
    found = np.array(pq.read_table(tmp_path / "two")["features"].to_pylist())
    np.testing.assert_array_equal(found, load_file(tmp_path / "one.safetensors")["features"])


def test_a_model_that_has_gone_ends_the_run_with_a_sentence(capsys, dask, folders, tmp_path, monkeypatch):
    from minibeit.checkpoint import travel

    monkeypatch.setattr(travel, "LEAST", 0)  # by reference however small
    model = save(tmp_path / "model", "classify")
    monkeypatch.setattr("minibeit.cluster.engine._held", gone(model))
    code, out, err = run(capsys, "classify", folders, "-r", "-m", model, *dask, "-o", tmp_path / "out")
    assert code == 1 and not out and err.count("\n") == 1
    assert "the file is not here or has changed; put it back" in err


def gone(model):
    """`engine._held`, but for the weights, which vanish before the workers load them."""
    from minibeit.cluster import engine

    held = engine._held

    def without(client, work, folder):
        context = held(client, work, folder)
        shutil.rmtree(model)
        return context

    return without


# What results depend on -----------------------------------------------------------------------------------------------


def refused(capsys, *words):
    """Runs a command that finds shards that were made otherwise."""
    code, out, err = run(capsys, *words)
    return code == 1 and not out and "has shards of other work, whose work is" in err and err.count("\n") == 1


def test_shards_of_another_table_of_colours_or_image_processor_are_refused(capsys, dask, tmp_path):
    model, table = save(tmp_path / "model", "segment"), tmp_path / "colours.txt"
    for path in save_pictures(tmp_path / "val", "a.png", "b.png", size=(20, 33)):
        colours = np.full((20, 33, 3), 9, np.uint8)
        colours[:7] = 3
        (tmp_path / "maps").mkdir(exist_ok=True)
        Image.fromarray(colours).save(tmp_path / "maps" / path.name)
    words = [
        "evaluate",
        tmp_path / "val",
        "--maps",
        tmp_path / "maps",
        "-m",
        model,
        "--colours",
        table,
        *dask,
        "--slide",
    ]
    table.write_text("3 3 3 ant\n9 9 9 bee\n")
    assert run(capsys, *words, "-o", tmp_path / "out")[0] == 0
    assert run(capsys, *words, "-o", tmp_path / "out", "-b", 2)[0] == 0  # which changes no result
    table.write_text("3 3 3 bee\n9 9 9 ant\n")
    assert refused(capsys, *words, "-o", tmp_path / "out")
    assert run(capsys, *words, "-o", tmp_path / "two")[0] == 0
    BeitImageProcessor(size=16, resample=2, do_normalize=False).save_pretrained(model)
    assert refused(capsys, *words, "-o", tmp_path / "two")


def test_shards_of_another_tokenizer_are_refused(capsys, dask, folders, tmp_path):
    tokens, model = tmp_path / "tokens", save(tmp_path / "model", "mask", vocab_size=10)
    words = ["evaluate", folders, "-m", model, "-t", tokens, *dask, "-o", tmp_path / "out"]
    DalleTokenizer(TOKENS, backend="numpy").save_pretrained(tokens)
    assert run(capsys, *words)[0] == 1
    shutil.move(tokens, tmp_path / "moved")
    DalleTokenizer(TOKENS, backend="numpy", seed=1).save_pretrained(tokens)
    assert refused(capsys, *words)
    words[words.index(tokens)] = tmp_path / "moved"  # the same one elsewhere
    assert run(capsys, *words)[0] == 1


def test_overwrite_removes_the_shards_that_tell_of_another_models_maps(capsys, dask, tmp_path):
    save_pictures(tmp_path / "in", "a.png", "b.png")
    models = [save(tmp_path / str(i), "segment", initializer_range=0.1 * i) for i in (1, 2)]
    words = ["segment", "-o", tmp_path / "out", *dask]
    assert run(capsys, *words, tmp_path / "in", "-m", models[0])[0] == 0
    code, _, err = run(capsys, *words, tmp_path / "in/a.png", "-m", models[1])
    assert code == 2 and "--overwrite removes its 2 results" in err
    code, out, err = run(capsys, *words, tmp_path / "in/a.png", "-m", models[1], "--overwrite")
    assert code == 0 and "1 images in 1 shards;" in out and not err
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["a_labels.png", "a_legend.png"]
    run(capsys, "segment", "-o", tmp_path / "out", tmp_path / "in/b.png", "-m", models[0], "--overwrite", "-q")
    assert not list((tmp_path / "out/shards").iterdir())
