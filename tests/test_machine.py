"""Systems other than this one, acted: little memory, control groups, and what only Unix has."""

from __future__ import annotations

import ctypes
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make, tiny_config
from other_process import SMALL, run_python

from minibeit import BeitConfig, BeitForImageClassification, files, machine
from minibeit.tasks import memory

GB = 1 << 30
V1 = "7:cpu,cpuacct:/shop\n3:memory:/shop\n"
V2 = "0::/system/shop\n"


@pytest.fixture
def system(tmp_path, monkeypatch):
    """system(meminfo, membership, {file of a group: text}): what Linux would say."""

    def say(meminfo, membership="", groups=None):
        for name, text in {"meminfo": meminfo, "cgroup": membership}.items():
            (tmp_path / name).write_text(text)
        for name, text in (groups or {}).items():
            (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fs" / name).write_text(text)
        monkeypatch.setattr(machine, "MEMORY", tmp_path / "meminfo")
        monkeypatch.setattr(machine.control_groups, "__defaults__", (tmp_path / "cgroup", tmp_path / "fs"))

    return say


MEMINFO = "MemTotal: 4194304 kB\nMemAvailable: 2097152 kB\nSwapFree: 1048576 kB\n"


@pytest.mark.parametrize(
    "membership, groups, expected",
    [
        ("", {}, 2 * GB),
        (V2, {"system/shop/memory.max": "max\n", "system/shop/memory.current": "5\n"}, 2 * GB),
        (V2, {"system/shop/memory.max": f"{GB}\n", "system/shop/memory.current": f"{GB // 4}\n"}, GB - GB // 4),
        (
            V2,
            {
                "system/shop/memory.max": f"{GB}",
                "system/shop/memory.current": f"{GB // 2}",
                "system/shop/memory.stat": f"anon 7\ninactive_file {GB // 8}\nactive_file {GB // 8}\n",
            },
            GB - GB // 4,
        ),
        (V2, {"memory.max": f"{GB}", "memory.current": f"{2 * GB}"}, 0),  # a container sees its own group as the root
        (V1, {"memory/shop/memory.limit_in_bytes": f"{GB}", "memory/shop/memory.usage_in_bytes": "0"}, GB),
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "1"}, 2 * GB),
        (V2, {"memory.max": "what", "memory.current": "1"}, 2 * GB),
        ("nonsense", {}, 2 * GB),
    ],
)
def test_memory_is_that_of_the_system_and_of_its_control_groups(membership, groups, expected, system):
    system(MEMINFO, membership, groups)
    assert machine.available_memory() == expected


def test_swap_counts_where_it_is_asked_for(system):
    system(MEMINFO)
    assert machine.available_memory(swap=True) == 3 * GB
    system("MemAvailable: 2097152 kB\n")
    assert machine.available_memory() == 2 * GB


def test_where_there_is_no_meminfo_all_of_the_memory_counts(system, monkeypatch):
    system("")
    sizes = {"SC_PHYS_PAGES": 1 << 20, "SC_PAGE_SIZE": 1 << 14}  # macOS on Arm
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__, raising=False)
    assert machine.available_memory() == 16 * GB
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert machine.available_memory() is None


def test_memory_of_windows(system, monkeypatch):
    def status(reference):
        reference._obj.available = 5 * GB
        return reference._obj.size == 64

    system("")
    monkeypatch.setattr(sys, "platform", "win32")
    kernel = SimpleNamespace(GlobalMemoryStatusEx=status)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    assert machine.available_memory() == 5 * GB


# What does not fit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gigabytes", [1, 2, 4])
def test_a_batch_that_cannot_fit_is_refused_with_one_that_may(gigabytes, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda swap: gigabytes * GB)
    config, task = BeitConfig(), "image_classification"

    def check(count):
        memory.check_call(config, task, (count, 3, 224, 224), "numba", 4)

    check(64)
    with pytest.raises(ValueError, match=r"pixel_values: 4096 images of 224x224 take at least .* GB") as refusal:
        check(4096)
    fits = int(str(refusal.value).rpartition("at most ")[2].split()[0])
    check(fits)
    with pytest.raises(ValueError, match="pixel_values"):
        check(fits + 1 + fits // 100)


def test_an_image_that_cannot_fit_alone(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda swap: GB)
    with pytest.raises(ValueError, match="take smaller images"):
        memory.check_call(BeitConfig(), "image_classification", (1, 3, 2048, 2048), "numpy", 4)
    memory.check_call(BeitConfig(), "image_classification", (1, 3, 2048, 2048), "cupy", 4)  # the GPU's own affair


def test_a_model_asks_before_it_computes(monkeypatch):
    monkeypatch.setattr(memory, "WORTH_A_LOOK", 0)
    monkeypatch.setattr(memory, "KEPT", 0)
    model = make(BeitForImageClassification, tiny_config())
    pixels = np.zeros((2, 3, *model.config.image_shape), np.float32)
    monkeypatch.setattr(memory, "available_memory", lambda swap: 1000)
    with pytest.raises(ValueError, match="pixel_values: 2 images"):
        model(pixels)
    monkeypatch.setattr(memory, "available_memory", lambda swap: None)
    model(pixels)


def test_weights_that_cannot_be_packed_are_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda swap: GB // 4)
    with pytest.raises(ValueError, match=r"weights: .* 0.3 GB of memory, found 0.3 GB"):
        memory.check_weights(BeitConfig(), "image_classification", "numba", 4)
    memory.check_weights(BeitConfig(), "image_classification", "numpy", 4)


def test_the_estimate_is_less_than_what_a_call_takes():
    """tracemalloc sees NumPy's arrays: those of the reference, which keeps the scores."""
    import tracemalloc

    config = tiny_config(hidden_size=64, intermediate_size=256, num_attention_heads=4, image_size=64, patch_size=8)
    model = BeitForImageClassification(config, backend="numpy")
    pixels = np.zeros((8, 3, 64, 64), np.float32)
    tracemalloc.start()
    model(pixels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    least = memory.least_bytes(config, "image_classification", pixels.shape, "numpy", 4)
    assert peak / 4 < least - pixels.nbytes < peak


# What only Unix has -------------------------------------------------------------------------------------------------

WITHOUT_UNIX = """
import os, shutil, signal, sys
shutil._use_fd_functions = False  # as Python itself sets it there
if hasattr(shutil, "_rmtree_impl"):  # from Python 3.14 on chosen on import
    shutil._rmtree_impl = shutil._rmtree_unsafe
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for module, names in (
    (os, "fork register_at_fork sched_getaffinity getloadavg geteuid getuid sysconf mkfifo"),
    (os, "O_NOFOLLOW O_NONBLOCK O_CLOEXEC"),
    (signal, "setitimer SIGALRM SIGKILL SIGHUP SIGUSR1"),
):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
"""


def test_commands_run_without_what_only_unix_has(tmp_path):
    code = f"""{WITHOUT_UNIX}
from pathlib import Path
from minibeit.__main__ import _raise_where_it_is_safe
from minibeit.catalogue import weights_folder
from minibeit.cli import main
_raise_where_it_is_safe()
images, output = weights_folder() / "digits" / "images", Path({str(tmp_path)!r})
assert main(["classify", str(images), "--backend", "numpy", "--json"]) == 0
assert main(["convert", str(weights_folder() / "digits"), str(output / "copy")]) == 0
features = ["-m", str(output / "copy"), "--backend", "numpy", "-o", str(output / "f.npz")]
assert main(["features", str(images), *features]) == 0
assert (output / "f.npz").stat().st_size > 0
"""
    run_python(code)


def test_every_module_can_be_imported_without_what_only_unix_has():
    code = f"""{WITHOUT_UNIX}
import importlib, pkgutil
import minibeit
OPTIONAL = ("torch", "timm", "transformers", "distributed")
sys.modules["distributed"] = None  # whatever that library needs itself
count = 0
for module in pkgutil.walk_packages(minibeit.__path__, "minibeit."):
    if ".kernels" in module.name or "cupy" in module.name or module.name.endswith(("__main__", "_runner", "_kernel")):
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        assert "needs" in str(error) or error.name in OPTIONAL, (module.name, error)
    count += 1
assert count > 150
"""
    run_python(code)


def test_kernels_run_without_what_only_unix_has():
    run_python(WITHOUT_UNIX + SMALL)


def test_a_file_in_use_is_named_on_windows(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(13, "Access is denied", str(source), None, str(target))

    target = tmp_path / "model.safetensors"
    target.write_bytes(b"old")
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(files.sys, "platform", "win32")
    with pytest.raises(PermissionError, match="while it is in use") as refusal, files.atomic_write(target) as file:
        file.write(b"new")
    assert refusal.value.filename == str(target)
    assert [entry.name for entry in tmp_path.iterdir()] == [target.name] and target.read_bytes() == b"old"


def test_a_report_names_the_memory():
    from minibeit.cli.about import about

    assert any(line.startswith("memory: ") and "GB" in line for line in about())
