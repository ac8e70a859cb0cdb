"""The verifier streams: its runs side by side hold few of the model's arrays, and give back what they do not hold."""

from __future__ import annotations

import mmap
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from verify_plant import job, model_of

from minibeit.verify import difference, float64_model, release_memory
from minibeit.verify.lockstep import check, model_source

PROBS = "*.attention.probs"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked to take memory back")


# In units of the largest map in float64.  It took 16.2 and 17.5 when convolutions widened their whole input and all
# runs made their array before the first was compared.
@pytest.mark.parametrize(
    "yardstick, limit", [pytest.param(False, 13.0, marks=pytest.mark.slow), (True, 14.0)]
)  # measured: 12.3 and 13.3
def test_few_maps_are_alive_at_a_time(monkeypatch, yardstick, limit):
    monkeypatch.setattr(float64_model, "STRIP_BYTES", 1 << 17)  # scratch as small beside the maps as it is at full size
    monkeypatch.setattr(difference, "PIECE", 1 << 14)
    sizes = dict(hidden_size=64, num_attention_heads=4, image_size=64, patch_size=4)
    made = job("semantic_segmentation", batch=1, **sizes)
    theirs = model_source(made, model_of(made), "theirs", leave_out=PROBS) if yardstick else None
    candidate = model_source(made, model_of(made), "ours", leave_out=PROBS)
    tracemalloc.start()
    try:
        report = check(made, candidate, theirs, leave_out=PROBS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.ok
    largest = 8 * int(np.prod(made.shapes()["fpn.0"]))
    assert peak < limit * largest


# 640x640 pixels, a quarter of a base model's width: the process grows by the maps and by what no array is, such as
# freed blocks and PyTorch's scratch.  Measured at this width before the streams were made lean: 27.8 maps.
AT_FULL_SIZE = """
import numpy as np
from pathlib import Path
from verify_plant import job, model_of
from minibeit.verify.lockstep import check, model_source
from minibeit.verify.torch_runner import torch_source

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])

made = job("semantic_segmentation", batch=1, hidden_size=192, num_attention_heads=4, image_size=640, patch_size=16)
probs = ("*.attention.probs",)
candidate, theirs = model_source(made, model_of(made, "numba"), "ours", probs), torch_source(made, probs)
before = status("VmRSS")
assert check(made, candidate, theirs, leave_out=probs).ok
print((status("VmHWM") - before) / (8 * np.prod(made.shapes()["fpn.0"])))
"""


@LINUX
@pytest.mark.live
def test_the_process_stays_small_beside_pytorch(request):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    child = subprocess.run(
        [sys.executable, "-c", AT_FULL_SIZE],
        cwd=request.path.parent,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert float(child.stdout.split()[-1]) < 24.5  # measured: 21.7


@LINUX
def test_pages_of_mapped_weights_are_given_back_and_read_again(tmp_path):
    numbers = np.arange(1 << 22, dtype=np.float32)
    path = tmp_path / "weights"
    path.write_bytes(numbers.tobytes())
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    weights = np.frombuffer(memoryview(mapped)[: numbers.nbytes // 2], np.float32).reshape(-1, 1 << 10)
    unused = release_memory.Unused({"a": weights, "b": weights[3:].T, "c": numbers})
    before = _file_pages()
    assert weights.sum() > 0
    assert _file_pages() > before + weights.nbytes // 2
    unused.give_back()
    assert _file_pages() < before + weights.nbytes // 2
    assert np.array_equal(weights.reshape(-1), numbers[: weights.size])


def test_private_copies_of_a_file_keep_what_was_written(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 16))
    with open(path, "rb") as file:
        weights = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.float32)
    weights[:] = 1
    release_memory.Unused({"a": weights}).give_back()
    assert (weights == 1).all()


def _file_pages() -> int:
    with open("/proc/self/status") as file:
        return sum(1024 * int(line.split()[1]) for line in file if line.startswith(("RssFile", "RssShmem")))
