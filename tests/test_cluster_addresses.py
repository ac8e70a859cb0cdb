"""`evaluate` and `segment` with data and results at addresses: the same figures and maps as in folders."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import NAMES, run, save, save_pictures, served, start
from PIL import Image
from test_cli_pretrain import TOKENS
from test_evaluate_data import of_size
from test_evaluate_imagenet import SYNSETS, TRUE, flat, written_truth

from minibeit.evaluate.labelled import labelled_images
from minibeit.places import place
from minibeit.tokenizer.tokenizer import DalleTokenizer

pytest.importorskip("distributed", reason="needs the extra cluster")
import fsspec
import pyarrow.parquet as pq
from distributed import Client, LocalCluster
from fsspec.implementations.memory import MemoryFileSystem


@pytest.fixture(scope="module")
def dask():
    """The words that name a scheduler with a worker of two threads, in this process, which sees memory:// as well."""
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0") as client:
        yield ["--dask", client.scheduler.address]


@pytest.fixture(autouse=True)
def memory():
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{task: folder of a checkpoint}, and of a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    DalleTokenizer(TOKENS, backend="numpy").save_pretrained(folder / "tokens")
    changes = {"classify": {}, "segment": {}, "mask": {"vocab_size": 10}}
    found = {kind: save(folder / kind, kind, **more) for kind, more in changes.items()}
    return {**found, "tokens": folder / "tokens"}


# Data at an address ---------------------------------------------------------------------------------------------------


def class_folders(data):
    for name in NAMES:
        save_pictures(data / "val" / name, *(f"{name}{i}.png" for i in range(2)))
        save_pictures(data / "train" / name, f"{name}9.png")
    (data / "val" / "ant" / "ant1.png").write_bytes(b"no image")
    (data / "val" / "dog" / "dog1.png").write_bytes(b"")


def a_list(data, kind, name="list.csv"):
    images = save_pictures(data / "images", *(f"{i}.png" for i in range(6)), size=(20, 33))
    rows = []
    for i, image in enumerate(images):
        row = {"path": f"images/{image.name}", "split": "test" if i % 2 else "train"}
        rows.append(row | ({"label": NAMES[i % 4]} if kind == "classify" else {}))
    if kind == "classify":
        rows[5]["path"] = "images/gone.png"
    if kind == "segment":
        rows = [row | {"map": f"maps/{i}.png"} for i, row in enumerate(rows)]
        draw_maps(data / "maps", images)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".csv"):
        text = "\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)])
    (data / name).write_text(text)


def draw_maps(folder, images):
    folder.mkdir(parents=True)
    for image in images:
        labels = np.random.default_rng(len(image.name)).integers(0, 4, (20, 33)).astype(np.uint8)
        Image.fromarray(labels).save(folder / f"{image.stem}.png")


def scenes(data, images="images/validation", maps="annotations/validation"):
    for split in ("training", "validation"):
        found = save_pictures(data / images.replace("validation", split), "a.png", "b.png", "c.png", size=(20, 33))
        if split in maps or split == "training":
            draw_maps(data / maps.replace("validation", split), found)
    (data / images / "b.png").write_bytes(b"no image")


def photos(data):
    save_pictures(data / "deep/er", *(f"{i}.png" for i in range(3)))
    save_pictures(data, "4.png")


LAYOUTS = {
    "class folders": (class_folders, "", ["classify"], 6),
    "held-out class folders": (class_folders, "/val", ["classify"], 6),
    "a list in CSV": (lambda data: a_list(data, "classify"), "/list.csv", ["classify"], 2),
    "a list in JSON lines": (lambda data: a_list(data, "classify", "x.jsonl"), "/x.jsonl", ["classify"], 2),
    "ADE20K": (scenes, "", ["segment"], 2),
    "maps elsewhere": (scenes, "/images/validation", ["segment", "--maps", "{}/annotations/validation"], 2),
    "a list of maps": (lambda data: a_list(data, "segment"), "/list.csv", ["segment"], 3),
    "photos": (photos, "", ["mask", "--tokenizer", "{tokens}"], 4),
    "a list of photos": (lambda data: a_list(data, "mask"), "/list.csv", ["mask", "--tokenizer", "{tokens}"], 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_measured_as_in_a_folder(capsys, dask, memory, models, tmp_path, layout):
    """In one process and on Dask: all that is printed and written is the same, names of places apart."""
    make, within, words, images = LAYOUTS[layout]
    make(tmp_path / "data")
    memory.put(f"{tmp_path}/data/", "/data", recursive=True)
    found = []
    for root, more in (
        (f"{tmp_path}/data", []),
        ("memory://data", []),
        ("memory://data", [*dask, "--shard-size", "2", "-o", "memory://judged"]),
    ):
        model, *options = (word.format(root, **models) for word in words)
        files = ["--json", tmp_path / "figures.json", "--html", tmp_path / "page.html"]
        command = ["evaluate", root + within, "-m", models[model], *options, *files, "-b", "1", "-q", *more]
        code, out, err = run(capsys, *command)
        values = json.loads((tmp_path / "figures.json").read_text().replace(root, "ROOT"))
        values.pop("seconds")
        drawn = (tmp_path / "page.html").read_text().count("data:image/jpeg")
        found.append((code, out, err.replace(root, "ROOT"), drawn, values))
    assert found[0] == found[1] == found[2]
    code, _, err, drawn, values = found[0]
    assert values["images"] == images and drawn and (code == 1) == bool(values["left_out"])
    assert err.count("\n") == len(values["left_out"])


class Together(MemoryFileSystem):
    """A file system that opens no image before seven others are asked for."""

    protocol = "together"
    store: dict = {}
    pseudo_dirs = [""]
    waiting = threading.Barrier(8, timeout=20)

    def open(self, path, mode="rb", **options):
        if mode == "rb":
            self.waiting.wait()
        return super().open(path, mode, **options)


@pytest.mark.parametrize("kind", ["classify", "mask"])
def test_images_are_fetched_at_the_same_time(capsys, dask, models, tmp_path, kind):
    fsspec.register_implementation("together", Together, clobber=True)
    for name in NAMES:
        for path in save_pictures(tmp_path / name, *(f"{i}.png" for i in range(4))):
            place(f"together://val/{name}/{path.name}").write_bytes(path.read_bytes())
    words = [
        "evaluate",
        "together://val",
        "-m",
        models[kind],
        "-q",
        *(["-t", models["tokens"]] if kind == "mask" else []),
    ]
    for more in ([], [*dask, "-o", tmp_path / "out"]):
        code, _, err = run(capsys, *words, *more)
        assert (code, err) == (0, "")


@pytest.mark.parametrize("kind", ["devkit", "synsets", "numbers", "kaggle"])
def test_imagenets_layouts_at_an_address(memory, tmp_path, kind):
    flat(tmp_path / "val")
    written_truth(kind, tmp_path)
    save_pictures(tmp_path / "other" / "val" / SYNSETS[7], "7.png")
    memory.put(f"{tmp_path}/", "/imagenet", recursive=True)
    data = place("memory://imagenet")
    assert [image.label for image in labelled_images(data, of_size(1000)).images] == TRUE
    truth = data / written_truth(kind, tmp_path).name
    found = labelled_images(data / "val", of_size(1000), truth)
    assert [image.label for image in found.images] == TRUE
    assert found.images[0].path == "memory://imagenet/val/ILSVRC2012_val_00000001.JPEG"
    assert [image.label for image in labelled_images(data / "other", of_size(1000)).images] == [7]


def test_a_list_here_may_name_images_and_maps_anywhere(capsys, dask, memory, models, tmp_path):
    a_list(tmp_path, "segment")
    memory.put(f"{tmp_path}/", "/far", recursive=True)
    lines = (tmp_path / "list.csv").read_text().splitlines()
    lines[2] = lines[2].replace("images/", "memory://far/images/")
    lines[4] = lines[4].replace("maps/", "memory://far/maps/").replace("images/", f"{tmp_path}/images/")
    command = ["evaluate", tmp_path / "list.csv", "-m", models["segment"], "-q"]
    expected = run(capsys, *command)
    (tmp_path / "list.csv").write_text("\n".join(lines))
    for gone in (tmp_path / "images/1.png", tmp_path / "maps/3.png"):
        gone.unlink()
    assert expected[0] == 0 and run(capsys, *command) == expected
    assert run(capsys, *command, *dask, "-o", tmp_path / "out") == expected


def test_a_list_on_a_web_server(capsys, models, tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec needs it for http")
    a_list(tmp_path, "classify")
    found = []
    with served(tmp_path) as address:
        for root in (str(tmp_path), address):
            code, out, err = run(capsys, "evaluate", f"{root}/list.csv", "-m", models["classify"], "-b", 1, "-q")
            found.append((code, out, err.replace(root, "ROOT")))
    assert found[0] == found[1] and found[0][0] == 1 and "ROOT/images/gone.png: there is no such file" in found[0][2]


@pytest.mark.parametrize(
    ("data", "model", "words", "said"),
    [
        ("memory://nowhere", "classify", [], "memory://nowhere: there is no such folder or list of images"),
        ("memory://data/val/ant", "classify", [], "expected a folder for each class with its images in it"),
        ("memory://data/val", "classify", ["--labels", "memory://x"], "--labels is for ImageNet's flat folder"),
        ("memory://nowhere", "segment", [], "memory://nowhere: there is no such folder or list of images and label"),
        ("memory://data/val", "segment", ["--maps", "memory://gone"], "memory://gone: there is no such folder"),
        ("memory://data/val/ant/ant0.png", "classify", [], "expected a folder, a .csv or a .jsonl file, found .png"),
        ("oddly://data", "classify", [], "oddly://data: cannot be opened (Protocol not known: oddly)"),
        ("zip://val::memory://data", "mask", ["-t", "{tokens}"], "zip://val::memory://data: cannot be opened"),
    ],
)
def test_data_that_is_not_there_is_one_sentence(capsys, memory, models, tmp_path, data, model, words, said):
    class_folders(tmp_path)
    memory.put(f"{tmp_path}/", "/data", recursive=True)
    words = [word.format(**models) for word in words]
    code, out, err = run(capsys, "evaluate", data, "-m", models[model], "-q", *words)
    assert code == 1 and not out and said in err and err.count("\n") == 1


# Maps at an address ---------------------------------------------------------------------------------------------------


@pytest.fixture
def images(memory, tmp_path):
    """Five images at an address, the fourth of which is none."""
    for path in save_pictures(tmp_path / "in", *(f"{i}.png" for i in range(5)), size=(20, 33)):
        memory.pipe_file(f"/in/{path.name}", path.read_bytes())
    memory.pipe_file("/in/3.png", b"no image")
    (tmp_path / "in/3.png").write_bytes(b"no image")
    return tmp_path / "in"


def test_maps_are_written_to_an_address_and_kept(capsys, dask, memory, models, images, tmp_path):
    command = ["segment", "-m", models["segment"], "--overlay", "--figure", "--scores", "-q"]
    assert run(capsys, *command, images, "-o", tmp_path / "one")[0] == 1
    words = [*command, "memory://in", *dask, "--shard-size", 2, "-o", "memory://out/maps"]
    code, out, err = run(capsys, *words)
    assert code == 1 and "memory://out/maps: 5 images in 3 shards, 1 of them could not be used" in out and not err
    expected = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    there = {name.rpartition("/")[2]: memory.cat_file(name) for name in memory.glob("/out/maps/*.*")}
    assert len(expected) == 20 and {name: there[name] for name in expected if name.endswith("png")} == {
        name: content for name, content in expected.items() if name.endswith("png")
    }
    assert sorted(there) == sorted(expected)
    rows = [
        row
        for i in range(3)
        for row in pq.read_table(memory.open(f"/out/maps/shards/shard-{i:08}.parquet")).to_pylist()
    ]
    assert [row["labels"] for row in rows] == [
        f"memory://out/maps/{i}_labels.png" if i != 3 else None for i in range(5)
    ]
    assert "3.png" in rows[3]["error"]

    made = {name: memory.created(name) for name in memory.find("/out/maps")}
    memory.rm_file("/out/maps/shards/shard-00000001.parquet")  # of images 2 and 3
    assert "5 images in 3 shards (2 of them finished before)" in run(capsys, *words)[1]
    again = {name for name in memory.find("/out/maps") if memory.created(name) != made[name]}
    assert again == {
        f"/out/maps/2_{kind}" for kind in ("labels.png", "legend.png", "overlay.png", "figure.png", "scores.npz")
    } | {"/out/maps/shards/shard-00000001.parquet"}
    code, _, err = run(capsys, *words, "--flip", "--palette", "auto")
    assert code != 0 and err.count("\n") == 1


def test_maps_of_other_runs_are_not_mixed_in(capsys, dask, memory, models, images, tmp_path):
    words = ["segment", "memory://in", "-q", *dask, "-o", "memory://out"]
    memory.pipe_file("/out/old_labels.png", b"whose is it")
    code, _, err = run(capsys, *words, "-m", models["segment"])
    assert code == 2 and "memory://out/old_labels.png: is a map that this command has not made" in err
    memory.rm_file("/out/old_labels.png")
    assert run(capsys, *words, "-m", models["segment"])[0] == 1
    other = save(tmp_path / "other", "segment", initializer_range=0.1)
    code, _, err = run(capsys, *words, "-m", other)
    assert code == 1 and "has shards of other work, whose work is" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{here}", "-o", "memory://out"], "without --dask maps go to a folder, found the address memory://out"),
        (["memory://in", "-o", "memory://out", "--overwrite", "dask"], "--overwrite removes maps from a folder"),
        (["memory://in", "-o", "memory://in/0.png", "dask"], "memory://in/0.png is a file, expected a folder"),
        (["memory://in/0.png", "memory:///in/0_labels.png", "-o", "memory://in", "dask"], "this is an input"),
    ],
)
def test_outputs_that_cannot_be(capsys, dask, memory, models, images, words, said):
    memory.pipe_file("/in/0_labels.png", b"an image")
    before = {name: memory.cat_file(name) for name in memory.find("/")}
    words = [more for word in words for more in (dask if word == "dask" else [word.format(here=images)])]
    code, out, err = run(capsys, "segment", *words, "-m", models["segment"], "-q")
    assert code == 2 and not out and said in err and err.count("\n") == 1
    assert {name: memory.cat_file(name) for name in memory.find("/")} == before


# Processes of their own -----------------------------------------------------------------------------------------------


def test_addresses_in_worker_processes(models, images, tmp_path):
    """From end to end, over file://, which processes share: data in, maps and figures out, what is there is kept."""
    shutil.copytree(images, tmp_path / "data" / "val")
    draw_maps(tmp_path / "maps", [Path(f"{i}.png") for i in range(5)])
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as cluster:
        root = f"file://{tmp_path}"
        more = ["-m", models["segment"], "--shard-size", 2, "--dask", cluster.scheduler_address, "-q"]
        for kept in ("", " (3 of them finished before)"):
            program = start("segment", f"{root}/data/val", *more, "-o", f"{root}/out")
            out, err = program.communicate(timeout=120)
            assert (program.returncode, err) == (1, "") and f"5 images in 3 shards{kept}, 1 of them could not" in out
        words = ["evaluate", f"{root}/data/val", "--maps", "maps", *more, "-o", "judged"]
        out, err = start(*words, cwd=tmp_path).communicate(timeout=120)  # workers are in another folder
    assert "mean IoU" in out and err == f"minibeit: left out: {root}/data/val/3.png: " + err.partition("3.png: ")[2]
    names = sorted(path.name for path in (tmp_path / "out").glob("*"))
    assert names == sorted(["shards", *(f"{i}_{kind}.png" for i in (0, 1, 2, 4) for kind in ("labels", "legend"))])
    assert len(list((tmp_path / "judged").glob("*.parquet"))) == 3
