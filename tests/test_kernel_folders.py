"""The folder of compiled kernels: only one that nobody else can write to is used, and settings do not share one."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from kernel_files import count_with_new_kernel, kept, kernels_below, posix

from minibeit.ops.numba_cpu import cache

as_root = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can act as other users")
STRANGER = 54321


@pytest.fixture
def use(monkeypatch):
    yield from kernels_below(monkeypatch)


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


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
