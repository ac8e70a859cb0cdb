"""Compiled kernels on disk: whose files are run, what becomes of damaged ones, several processes, forks.

`count_task` of count_tasks.py is a kernel that takes little time to compile.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from other_process import SMALL, run_python

from minibeit.ops.numba_cpu import cache, machine_code

posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="folders of this system have no owners and modes")
as_root = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can act as other users")
STRANGER = 54321
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
    """use(folder): kernels are kept below it, as in a process that has just begun."""

    def begin(base, **environment):
        for name, value in {"NUMBA_CACHE_DIR": str(base), **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(cache, "_complained", False)
        cache.folder.cache_clear()

    yield begin
    cache.folder.cache_clear()


def count_with_new_kernel():
    """(whether the kernel was compiled, what it added): its code is looked for on disk first."""
    kernel = machine_code.Kernel("count_tasks", "count_task")
    machine_code.ALL.remove(kernel)
    compiled_before, numbers = machine_code._compiled, np.zeros(5, np.float32)
    arguments = np.array([0, 0, numbers.ctypes.data])
    kernel(arguments.ctypes.data, 3, 0)
    assert not numbers[[0, 1, 2, 4]].any()
    return machine_code._compiled > compiled_before, numbers[3]


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def kept(base):
    (file,) = base.glob("kernels-*/count_task-*.o")
    return file


@pytest.fixture
def public():
    """A folder that other users can enter and nobody else can write to, in the one for temporary files."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@contextmanager
def acting_as(user):
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)


def test_kernels_are_compiled_once_and_only_those_that_are_needed(tmp_path):
    first = run_python(SMALL, NUMBA_CACHE_DIR=str(tmp_path))
    assert first.stderr.count("compiling") == 1
    names = {file.name.rpartition("-")[0] for file in tmp_path.glob("kernels-*/*.o")}
    assert {"pack", "product"} <= names <= {"pack", "product", "execute", "wait"}
    again = SMALL + "import sys; assert 'numba' not in sys.modules"  # the compiler is not even loaded
    assert not run_python(again, NUMBA_CACHE_DIR=str(tmp_path)).stderr


# Whose folder


@posix
@pytest.mark.parametrize("umask", [0, 0o777])
def test_folders_are_made_for_the_user_alone_whatever_the_umask(tmp_path, use, umask):
    use(tmp_path / "not" / "yet")
    before = os.umask(umask)
    try:
        assert count_with_new_kernel() == (True, 1)
    finally:
        os.umask(before)
    file = kept(tmp_path / "not" / "yet")
    assert [mode_of(path) for path in (file.parents[2], file.parents[1], file.parent, file)] == [0o700] * 3 + [0o600]
    assert count_with_new_kernel() == (False, 1)


def open_to(mode):
    def change(base):
        base.chmod(mode)

    return change


def parent_open_to(mode):
    def change(base):
        base.parent.chmod(mode)

    return change


def kernels_open_to(mode):
    def change(base):
        cache.folder().chmod(mode)

    return change


def linked(base):
    place = cache.folder()
    place.rmdir()
    (base / "elsewhere").mkdir(mode=0o700)
    place.symlink_to("elsewhere")


def a_file(base):
    shutil.rmtree(base)
    base.write_text("")


@posix
@pytest.mark.parametrize(
    "change, reason",
    [
        (open_to(0o770), "other users can write to"),
        (open_to(0o702), "other users can write to"),
        (parent_open_to(0o777), "other users can write to"),
        (kernels_open_to(0o720), "other users can write to"),
        (kernels_open_to(0o1777), "not yours alone"),
        (linked, "is no folder"),
        (a_file, "is no folder"),
    ],
)
def test_a_folder_that_others_can_change_is_not_used(tmp_path, use, change, reason, capsys):
    base = tmp_path / "parent" / "base"
    use(base)
    assert cache.folder().parent == base  # made, and good
    change(base)
    use(base)
    for _ in range(2):
        assert count_with_new_kernel() == (True, 1)
    assert not list(base.rglob("*.o"))
    text = capsys.readouterr().err
    assert text.count("no kernels are kept") == 1  # once in each process
    assert reason in text and str(base.parent) in text and "set NUMBA_CACHE_DIR" in text


@posix
def test_in_a_home_that_others_can_write_to_nothing_is_kept(tmp_path, use, capsys):
    tmp_path.chmod(0o770)
    use("", HOME=str(tmp_path), XDG_CACHE_HOME="")
    assert cache.folder() is None and not list(tmp_path.iterdir())
    assert f"other users can write to {str(tmp_path)!r}" in capsys.readouterr().err


@posix
def test_what_lies_above_the_home_is_the_systems_business(tmp_path, use):
    tmp_path.chmod(0o777)
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    use(home / "caches", HOME=str(home))
    assert cache.folder() is not None
    use(tmp_path / "caches", HOME=str(home))
    assert cache.folder() is None


@posix
def test_in_a_folder_for_all_users_only_one_for_the_user_alone_is_used(tmp_path, use):
    tmp_path.chmod(0o1777)
    base = tmp_path / "mine"
    use(base)
    place = cache.folder()
    assert mode_of(base) == mode_of(place) == 0o700
    place.chmod(0o755)
    use(base)
    assert cache.folder() is None


@posix
def test_a_link_that_the_user_names_leads_to_a_folder_that_is_looked_at(tmp_path, use):
    real = tmp_path / "real" / "base"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    use(tmp_path / "link")
    assert cache.folder().parent == real.resolve()
    real.parent.chmod(0o777)
    use(tmp_path / "link")
    assert cache.folder() is None


@as_root
@pytest.mark.parametrize("strangers", [0, 1])  # the kernels' folder, the one above
def test_a_folder_of_another_user_is_not_used(tmp_path, use, strangers, capsys):
    use(tmp_path / "base")
    os.chown([cache.folder(), tmp_path / "base"][strangers], STRANGER, STRANGER)
    use(tmp_path / "base")
    assert cache.folder() is None
    assert f"belongs to another user, number {STRANGER}" in capsys.readouterr().err


def evil_file(base, use):
    """A whole file of the kernels' folder whose code adds 2, made as anybody can make it: with a digest and `cat`."""
    use(base)
    count_with_new_kernel()
    file = kept(base)
    code = file.read_bytes()[32:].replace(np.float32(1).tobytes(), np.float32(2).tobytes())
    head = f"{cache.fingerprint()} {file.name}\n".encode()
    return file, hashlib.sha256(head + code).digest() + code


def test_the_evil_file_would_run(tmp_path, use):
    """If it were the user's own: the attacks below have something to fear."""
    file, evil = evil_file(tmp_path / "base", use)
    file.write_bytes(evil)
    assert count_with_new_kernel() == (False, 2)


@as_root
def test_a_file_of_another_user_is_not_run(tmp_path, use):
    """Also where the folder is the user's own by now."""
    file, evil = evil_file(tmp_path / "base", use)
    file.write_bytes(evil)
    os.chown(file, STRANGER, STRANGER)
    assert count_with_new_kernel() == (True, 1)
    assert os.stat(file).st_uid == 0 and count_with_new_kernel() == (False, 1)


@as_root
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_what_another_user_puts_into_a_shared_folder_is_not_run(public, tmp_path, use, mode):
    made, evil = evil_file(tmp_path, use)
    shared = public / "shared"
    shared.mkdir()
    shared.chmod(mode)
    os.chown(shared, 0, STRANGER)  # 0775: by the group
    os.setegid(STRANGER)
    try:
        with acting_as(STRANGER):
            (shared / made.parent.name).mkdir(mode=0o755)
            (shared / made.parent.name / made.name).write_bytes(evil)
            (shared / made.parent.name / made.name).chmod(0o644)
    finally:
        os.setegid(0)
    use(shared)
    assert count_with_new_kernel() == (True, 1)


@as_root
def test_what_root_prepared_is_used_and_not_changed(public, use):
    use(public / "base")
    count_with_new_kernel()
    file = kept(public / "base")
    for path in (public / "base", file.parent, file):
        path.chmod(0o755)
    home = os.environ.get("HOME", "")
    use(public / "base", HOME=str(public))  # so that the folder for temporary files does not lie between
    with acting_as(STRANGER):
        assert cache.folder() == file.parent and cache.read(file.name) is not None
    use(public / "base", HOME=home)
    with acting_as(STRANGER):  # below the folder for temporary files it must be the user's own
        assert cache.folder() is None


@as_root
def test_a_folder_that_cannot_be_written_is_named_once(public, use, capsys):
    base = public / "base"
    base.mkdir(mode=0o755)
    use(base, HOME=str(public))
    with acting_as(STRANGER):
        assert cache.folder() is None and cache.folder() is None
    text = capsys.readouterr().err
    assert text.count("no kernels are kept") == 1 and str(base) in text and "Permission denied" in text


def test_a_relative_folder_is_not_made_in_the_working_directory(tmp_path, use, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    use("caches", HOME=str(home), XDG_CACHE_HOME="more", LOCALAPPDATA=str(home))
    assert cache.folder().is_relative_to(home.resolve())
    assert not list(here.iterdir())


def test_without_a_home_kernels_are_compiled_in_each_process(tmp_path, use, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it does where nothing is known of the user
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, "")
    use("")
    assert count_with_new_kernel() == (True, 1)
    assert "no home folder" in capsys.readouterr().err and not list(tmp_path.iterdir())


@posix
def test_without_a_home_and_a_working_directory(tmp_path, use, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    use(tmp_path / "base")
    assert cache.folder() is not None


@as_root
def test_a_user_without_home_and_entry(tmp_path, use, monkeypatch, capsys):
    use("", XDG_CACHE_HOME="")
    monkeypatch.delenv("HOME")
    before = os.getuid()
    os.setreuid(STRANGER, 0)
    try:
        assert cache.folder() is None
    finally:
        os.setreuid(before, 0)
    assert "no home folder" in capsys.readouterr().err


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


# Which folder


@pytest.mark.parametrize(
    "name",
    ["OPT", "DEBUGINFO", "BOUNDSCHECK", "LOOP_VECTORIZE", "SLP_VECTORIZE", "ENABLE_PROFILING", "ENABLE_AVX"]
    + ["CPU_NAME", "CPU_FEATURES", "EXTEND_VARIABLE_LIFETIMES", "LLVM_REFPRUNE_PASS", "OF_A_VERSION_TO_COME"],
)
def test_each_setting_of_the_compiler_has_its_folder(name, monkeypatch):
    make = cache.fingerprint.__wrapped__
    monkeypatch.delenv(f"NUMBA_{name}", raising=False)
    before = make()
    monkeypatch.setenv(f"NUMBA_{name}", "0")
    zero = make()
    monkeypatch.setenv(f"NUMBA_{name}", "1")
    assert len({before, zero, make()}) == 3


@pytest.mark.parametrize("name", ["CACHE_DIR", "NUM_THREADS", "THREADING_LAYER", "CUDA_DEBUGINFO"])
def test_settings_that_change_no_code_share_a_folder(name, monkeypatch):
    before = cache.fingerprint.__wrapped__()
    monkeypatch.setenv(f"NUMBA_{name}", "7")
    assert cache.fingerprint.__wrapped__() == before


def test_numbas_file_of_settings_and_the_version_of_python_are_seen(tmp_path, monkeypatch):
    make = cache.fingerprint.__wrapped__
    monkeypatch.chdir(tmp_path)
    found = [make()]
    Path(".numba_config.yaml").write_text("opt: 0")
    found.append(make())
    monkeypatch.setattr(sys, "version_info", (3, 99, 0))
    found.append(make())
    assert len(set(found)) == 3


def test_updates_of_macos_share_a_folder(monkeypatch):
    found = set()
    for triple in ("arm64-apple-darwin23.4.0", "arm64-apple-darwin24.0.0", "arm64-apple-macosx15.1"):
        monkeypatch.setattr(cache, "target", lambda triple=triple: (triple, "apple-m1", ""))
        found.add(cache.fingerprint.__wrapped__())
    assert len(found) == 2


def test_kernels_are_kept_apart_from_those_of_other_sources(tmp_path, monkeypatch):
    """Also where only a constant changed that a kernel takes from the module that runs it."""
    package = Path(cache.__file__).parent
    shutil.copytree(package, tmp_path / "numba_cpu", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "numba_cpu" / "cache.py"))
    found = [cache.fingerprint.__wrapped__()]
    for name in ("pool.py", "kernels/micro.py", "winograd.py"):
        with open(tmp_path / "numba_cpu" / name, "a") as file:
            file.write("X = 1\n")
        found.append(cache.fingerprint.__wrapped__())
    assert len(set(found)) == 4


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
