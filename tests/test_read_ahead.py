"""Images are read by threads while the model computes: in order, within bounds, and without keeping anybody waiting."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from cli_helpers import run, save, save_pictures, start_python
from PIL import Image

import minibeit
from minibeit import BeitImageProcessor, ImageError, machine, read_ahead
from minibeit.cli import bench
from minibeit.cluster import engine
from minibeit.images.ahead import MOST_WORKERS, default_workers

WAIT = 30.0


def test_the_order_is_that_of_the_items():
    delays = [0.03, 0.0, 0.02, 0.0, 0.01, 0.0]
    results = list(read_ahead(range(6), lambda i: (time.sleep(delays[i]), i)[1], workers=3, most=6))
    assert results == list(range(6))
    assert list(read_ahead([], lambda i: i)) == []


def test_a_processor_reads_ahead(tmp_path):
    paths = save_pictures(tmp_path, "a.png", "b.png", "c.png")
    processor = BeitImageProcessor(size=8)
    found = [inputs.pixel_values for inputs in minibeit.read_ahead(iter(paths), processor)]
    assert [x.tobytes() for x in found] == [processor(path).pixel_values.tobytes() for path in paths]


@pytest.mark.parametrize("most", [0, 1, 5])
def test_no_more_is_read_than_was_said(most):
    taken = []
    results = read_ahead((taken.append(i) or i for i in range(100)), lambda i: i, workers=2, most=most)
    for count in range(1, 10):
        assert next(results) == count - 1
        assert len(taken) == count + most


def test_items_are_read_while_the_caller_computes():
    later = threading.Event()
    results = read_ahead(range(4), lambda i: later.set() if i else None, workers=1, most=2)
    next(results)
    assert later.wait(WAIT)  # nobody has asked for the second one yet


def test_an_error_comes_in_its_turn():
    def read(item):
        if item == 2:
            raise ImageError("item 2 is broken")
        return item

    results = read_ahead(range(4), read, workers=3)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ImageError, match="item 2 is broken"):
        next(results)


@pytest.mark.parametrize("words", [{"workers": 0}, {"most": -1}])
def test_nonsense_is_refused_at_once(words):
    with pytest.raises(ValueError, match="at least one worker"):
        read_ahead([1], lambda i: i, **words)


def test_threads_end_with_the_iterator():
    results = read_ahead(range(1000), lambda i: i, workers=3)
    next(results)
    del results
    gc.collect()
    end = time.monotonic() + WAIT
    while any(thread.name == "minibeit-read" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("mask, quota, count", [(7, None, 7), (7, 2.5, 3), (30, None, 30), (30, 0.5, 1)])
def test_everything_counts_the_same_cpus(mask, quota, count, monkeypatch):
    """Those of the affinity mask, within what the control groups of a container have time for."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(mask)), raising=False)
    monkeypatch.setattr(machine, "_own_quota", lambda: quota)
    assert machine.usable_cpus() == count
    assert default_workers() == min(count, MOST_WORKERS)
    assert bench._threads(SimpleNamespace(threads=None)) == count
    started = []
    engine._local(SimpleNamespace(LocalCluster=lambda **options: started.append(options["n_workers"])), None, 2)
    assert started == [max(1, count // 2)]


def test_one_image_object_in_many_places_is_decoded_once_at_a_time(tmp_path):
    (path,) = save_pictures(tmp_path, "a.png", size=(200, 300))
    processor = BeitImageProcessor(size=8)
    expected = processor(path).pixel_values
    for _ in range(5):
        with Image.open(path) as image, open(path, "rb") as file:
            for item in (image, file):
                for inputs in read_ahead([item] * 8, processor, workers=4):
                    np.testing.assert_array_equal(inputs.pixel_values, expected)


def test_threads_leave_the_warnings_filters_alone(tmp_path):
    paths = save_pictures(tmp_path, *(f"{i}.png" for i in range(60)), size=(4, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        list(read_ahead(paths, BeitImageProcessor(size=8), workers=8))
        assert warnings.filters == before


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_does_not_wait_for_what_is_being_read():
    script = """
import time
from minibeit import read_ahead
def read(item):
    if item == 0:
        print("reading", flush=True)
    time.sleep(item and 60)
for _ in read_ahead(range(9), read, workers=2):
    pass
"""
    process = start_python("-c", script)
    assert process.stdout.readline() == "reading\n"
    time.sleep(0.2)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT)
    assert "KeyboardInterrupt" in err
    assert time.monotonic() - started < 10  # a second on an idle machine; the threads would take 60


# The commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["classify", "features", "segment"])
def test_commands_read_ahead_and_name_what_is_broken_in_its_place(command, capsys, tmp_path):
    kind = {"classify": "classify", "features": "bare", "segment": "segment"}[command]
    model = save(tmp_path / "model", kind)
    names = [f"{i:02}.png" for i in range(12)]
    save_pictures(tmp_path / "images", *names)
    (tmp_path / "images" / "05.png").write_bytes(b"no image")
    words = {"classify": ["--jsonl", "-b", "4"], "features": ["-o", tmp_path / "f.npz"], "segment": ["-o", tmp_path]}
    code, out, err = run(capsys, command, tmp_path / "images", "-m", model, "-q", *words[command])
    assert code == 1
    assert err.count("\n") == 1 and "05.png: expected an image in a format that Pillow reads" in err
    if command == "features":
        found = [os.path.basename(file) for file in np.load(tmp_path / "f.npz")["files"]]
        assert found == [name for name in names if name != "05.png"]
    else:
        places = [out.index(name) for name in names if name in out]
        assert places == sorted(places) and len(places) >= 11
