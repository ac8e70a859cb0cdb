"""Makes hostile checkpoint files for the tests, and checks how they are refused."""

from __future__ import annotations

import gc
import io
import pickle
import struct
import time
import zipfile
from pathlib import Path

import pytest

from minibeit.checkpoint.formats import load_file
from minibeit.errors import CheckpointError

FOLDER = Path(__file__).parent / "data" / "formats"
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)


def refused(content: bytes, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        loaded = load_file(content, "evil.bin")
        for name in loaded.tensors:
            loaded.tensors[name]
    message = str(error.value)
    assert message.startswith("evil.bin: ") and "\n" not in message and len(message) < 1000


def torch_zip(pickled: bytes, method: int = 0, **entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in entries.items():
            archive.writestr(f"archive/data/{name.lstrip('_')}", content)
    return buffer.getvalue()


def legacy(pickled: bytes, keys: bytes = pickle.dumps([], 2), storages: bytes = b"") -> bytes:
    return MAGIC + pickled + keys + storages


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def assert_cheap(function) -> None:
    """At most one second of processor time and 200 MB of memory beyond what is there already."""
    gc.collect()
    gc.freeze()  # the collector would look through all that earlier tests left, again and again
    try:
        _assert_cheap(function)
    finally:
        gc.unfreeze()


def _assert_cheap(function) -> None:
    status = Path("/proc/self/status")
    if status.exists():
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the highest memory so far, starts again from now
        before = memory(status, "VmRSS")
    start = time.thread_time()
    function()
    seconds = time.thread_time() - start
    if status.exists():
        megabytes = memory(status, "VmHWM") - before
        assert megabytes < 200, f"took {megabytes} MB"
    for _ in range(3):  # a busy neighbour makes the processor itself slower
        if seconds >= 1:
            start = time.thread_time()
            function()
            seconds = min(seconds, time.thread_time() - start)
    assert seconds < 1, f"took {seconds:.2f} s"


def memory(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) // 1024
