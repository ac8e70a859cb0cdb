"""Compiled kernels on disk: what is compiled, what becomes of damaged files, several processes, forks."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("numba")

from kernel_files import count_with_new_kernel, kept, kernels_below, posix
from other_process import SMALL, run_python

from minibeit.ops.numba_cpu import cache, machine_code

TESTS = str(Path(__file__).parent)
LOAD = f"""
import sys
sys.path.insert(0, {TESTS!r})
from minibeit.ops.numba_cpu import cache
from minibeit.ops.numba_cpu.machine_code import Kernel
Kernel("count_tasks", "count_task").load()
"""


@pytest.fixture
def use(monkeypatch):
    yield from kernels_below(monkeypatch)


@pytest.mark.slow
def test_kernels_are_compiled_once_and_only_those_that_are_needed(tmp_path):
    first = run_python(SMALL, NUMBA_CACHE_DIR=str(tmp_path))
    assert first.stderr.count("compiling") == 1
    names = {file.name.rpartition("-")[0] for file in tmp_path.glob("kernels-*/*.o")}
    assert {"pack", "product"} <= names <= {"pack", "product", "execute", "wait"}
    again = SMALL + "import sys; assert 'numba' not in sys.modules"  # the compiler is not even loaded
    assert not run_python(again, NUMBA_CACHE_DIR=str(tmp_path)).stderr


# Which files


def cut(file):
    content = file.read_bytes()
    for size in (0, 1, 31, 32, 33, len(content) - 1):
        file.write_bytes(content[:size])
        yield


def flipped(file):
    choose, content = random.Random(0), file.read_bytes()
    for place in (0, 31, 32, len(content) - 1, *choose.sample(range(len(content)), 60)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << choose.randrange(8)
        file.write_bytes(damaged)
        yield


def of_another_kernel(file):
    name = "execute-" + file.name.rpartition("-")[2]
    cache.write(name, cache.read(file.name))
    os.replace(file.with_name(name), file)
    yield


def of_another_target(file):
    content = file.read_bytes()
    file.write_bytes(hashlib.sha256(f"{'0' * 64} {file.name}\n".encode() + content[32:]).digest() + content[32:])
    yield


def of_version_0_1(file):
    """Whose digest was of the code alone."""
    code = file.read_bytes()[32:]
    file.write_bytes(hashlib.sha256(code).digest() + code)
    yield


@pytest.mark.parametrize("damage", [cut, flipped, of_another_kernel, of_another_target, of_version_0_1])
def test_a_damaged_file_or_one_of_something_else_is_compiled_anew(tmp_path, use, damage):
    use(tmp_path)
    count_with_new_kernel()
    file = kept(tmp_path)
    count = 0
    for _ in damage(file):
        assert cache.read(file.name) is None
        count += 1
    assert count and count_with_new_kernel() == (True, 1)
    assert count_with_new_kernel() == (False, 1)


def soft_link(file):
    file.rename(file.with_name("moved"))
    file.symlink_to("moved")


def hard_link(file):
    os.link(file, file.with_name("other"))


def queue_without_writer(file):
    file.unlink()
    os.mkfifo(file)


def full_queue(file):
    content = file.read_bytes()
    queue_without_writer(file)
    os.write(os.open(file, os.O_RDWR | os.O_NONBLOCK), content)  # it stays open: a queue is empty without anybody


def writable_by_the_group(file):
    file.chmod(0o620)


@posix
@pytest.mark.parametrize("change", [soft_link, hard_link, queue_without_writer, full_queue, writable_by_the_group])
def test_only_plain_files_of_the_user_are_read(tmp_path, use, change):
    use(tmp_path)
    count_with_new_kernel()
    file = kept(tmp_path)
    change(file)
    assert cache.read(file.name) is None
    assert count_with_new_kernel() == (True, 1)  # and put in its place
    assert cache.read(file.name) is not None


def test_a_folder_in_a_files_place_does_no_harm(tmp_path, use, capsys):
    use(tmp_path)
    count_with_new_kernel()
    file = kept(tmp_path)
    file.unlink()
    file.mkdir()
    for _ in range(2):
        assert count_with_new_kernel() == (True, 1)
    assert capsys.readouterr().err.count("no kernels are kept") == 1


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a limit of the size of files")
def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """A limit of the size of files stands for it: the write itself fails halfway."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    done = run_python(limit + LOAD + 'Kernel("count_tasks", "count_task").load()', NUMBA_CACHE_DIR=str(tmp_path))
    assert done.stderr.count("no kernels are kept") == 1 and os.strerror(errno.EFBIG) in done.stderr
    assert [file.name for file in tmp_path.glob("kernels-*/*")] == ["lock"]
    assert "compiling" in run_python(LOAD, NUMBA_CACHE_DIR=str(tmp_path)).stderr
    assert not run_python(LOAD, NUMBA_CACHE_DIR=str(tmp_path)).stderr


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that kills")
def test_a_kill_in_the_middle_of_a_write(tmp_path, use):
    kill = "import os\nos.fsync = lambda file: os.kill(os.getpid(), 9)\n"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", kill + LOAD], env=environment, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("kernels-*/.new-*")
    assert not list(tmp_path.glob("kernels-*/*.o"))
    use(tmp_path)
    assert count_with_new_kernel() == (True, 1)
    assert left.exists()  # it might be another process's that still writes
    os.utime(left, (0, 0))
    kept(tmp_path).unlink()
    assert count_with_new_kernel() == (True, 1)
    assert not left.exists()


# Several processes


def test_processes_that_begin_together_compile_once(tmp_path):
    code = LOAD + "print('numba' in sys.modules)"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    found = [process.communicate(timeout=300)[0].strip() for process in processes]
    assert sorted(found) == ["False", "False", "True"]


HOLD = (
    LOAD
    + """
with cache.alone():
    print("held", flush=True)
    sys.stdin.read()
"""
)


def test_a_killed_process_holds_nobody_up_and_a_stuck_one_not_for_ever(tmp_path, use, monkeypatch):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        try:
            assert holder.stdout.readline().strip() == "held"
            use(tmp_path)
            kept(tmp_path).unlink()
            monkeypatch.setattr(cache, "_LONGEST_WAIT", 0.3)
            start = time.monotonic()
            assert count_with_new_kernel() == (True, 1)
            assert time.monotonic() - start >= 0.3
        finally:
            holder.kill()
    kept(tmp_path).unlink()
    monkeypatch.setattr(cache, "_LONGEST_WAIT", 60.0)
    start = time.monotonic()
    assert count_with_new_kernel() == (True, 1)
    assert time.monotonic() - start < 30


def test_no_locks_here(tmp_path, use, monkeypatch):
    use(tmp_path)

    def no_locks(file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache, "_wait_for", no_locks)
    assert count_with_new_kernel() == (True, 1)
    assert count_with_new_kernel() == (False, 1)


FORKS = """
import os, threading, time
import count_tasks

def compile_all():
    for _ in range(30):
        Kernel("count_tasks", "count_task").load()

worker = threading.Thread(target=compile_all)
worker.start()
children = []
while worker.is_alive() and len(children) < 12:
    time.sleep(0.05)
    child = os.fork()
    if child == 0:
        Kernel("count_tasks", "count_task").load()
        os._exit(0)
    children.append(child)
worker.join()
end = time.monotonic() + 40
hung = 0
for child in children:
    done = 0
    while not done and time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not done:
        os.kill(child, 9)
        os.waitpid(child, 0)
        hung += 1
assert children and not hung, f"{hung} of {len(children)} children hang"
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_another_thread_compiles_can_compile(tmp_path):
    """Nothing is kept on disk, so that each load compiles."""
    occupied = tmp_path / "file"
    occupied.write_text("")
    run_python(LOAD + FORKS, NUMBA_CACHE_DIR=str(occupied / "below"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_does_not_wait_for_ever(tmp_path, use, monkeypatch):
    """The child of a fork that waited in vain has a lock of its own."""
    use(tmp_path)
    count_with_new_kernel()
    ignored: list[object] = []  # what goes wrong around a fork is told to this hook only
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    monkeypatch.setattr(machine_code, "_FORK_WAITS", 0.2)
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with machine_code._lock:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=stay)
    thread.start()
    inside.wait()
    try:
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(0 if count_with_new_kernel() == (False, 1) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        leave.set()
        thread.join()
    assert not ignored
    assert count_with_new_kernel() == (False, 1)


# What is said


def test_on_a_terminal_each_kernel_is_named_and_the_line_cleared(tmp_path, use, monkeypatch, capsys):
    use(tmp_path)
    monkeypatch.setattr(machine_code, "_compiled", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    count_with_new_kernel()
    first, rest = capsys.readouterr().err.split("\n")
    assert first.startswith("minibeit: compiling kernels") and str(tmp_path) in first
    text, blank, end = rest.split("\r")
    assert text == f"kernel 1 of at most {len(machine_code.ALL)}: count_task"
    assert blank == " " * len(text) and not end


@pytest.mark.parametrize("stderr", ["None", "open(os.devnull)"])  # the second cannot be written
def test_without_anywhere_to_say_it_kernels_are_compiled_all_the_same(tmp_path, stderr):
    run_python(f"import os, sys; sys.stderr = {stderr}\n" + LOAD, NUMBA_CACHE_DIR=str(tmp_path))
    assert kept(tmp_path).is_file()
