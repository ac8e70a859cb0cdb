"""Files that appear whole or not at all: whose modes, links, pipes and leftovers are as everybody expects."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from minibeit import files
from minibeit.files import atomic_write, check_writable, scratch_folder

posix = pytest.mark.skipif(sys.platform == "win32", reason="files of POSIX")


@pytest.fixture(autouse=True)
def forgetful():
    files._cleaned.clear()


def write(path, content=b"new"):
    with atomic_write(path) as file:
        file.write(content)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_whole_or_not_at_all(tmp_path):
    write(tmp_path / "a", b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a") as file:
        file.write(b"half")
        assert (tmp_path / "a").read_bytes() == b"old" and len(names(tmp_path)) == 2
        raise ZeroDivisionError
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]
    write(tmp_path / ("x" * 250))  # as long as a name may be
    assert names(tmp_path) == ["a", "x" * 250]


@posix
def test_the_umask_is_honoured_and_never_touched(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask is of the whole process"))
        write(tmp_path / "a")
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    (tmp_path / "a").chmod(0o600)
    write(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600  # what was private stays private


@posix
def test_a_symbolic_link_stays_one_and_its_target_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("far/real")
    (tmp_path / "chain").symlink_to(tmp_path / "link")
    write(tmp_path / "chain")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "chain").is_symlink()
    assert (tmp_path / "far" / "real").read_bytes() == b"new" and names(tmp_path / "far") == ["real"]
    (tmp_path / "dangling").symlink_to("far/made")
    write(tmp_path / "dangling")
    assert (tmp_path / "far" / "made").read_bytes() == b"new"
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError) as caught:
        write(tmp_path / "round")
    assert caught.value.errno == errno.ELOOP and (tmp_path / "round").is_symlink()


@posix
def test_pipes_and_devices_are_written_through(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    write(pipe, b"all of it")
    reader.join(10)
    assert found == [b"all of it"] and stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "null").symlink_to("/dev/null")
    write(tmp_path / "null")
    write("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and names(tmp_path) == ["null", "pipe"]
    program = "from minibeit.files import atomic_write\nwith atomic_write('/dev/stdout') as f: f.write(b'hello')"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).stdout == b"hello"
    with open(tmp_path / "redirected", "wb") as out:
        out.write(b"before ")
        out.flush()
        subprocess.run([sys.executable, "-c", program], stdout=out, check=True)
    assert (tmp_path / "redirected").read_bytes() in (b"before hello", b"hello")  # one file, whatever the system makes
    if os.path.exists("/dev/full"):
        with pytest.raises(OSError, match=r"No space left.*'/dev/full'"):
            write("/dev/full")


@pytest.mark.parametrize("call, use", [("open", write), ("open", check_writable), ("mkdir", None), ("replace", write)])
def test_errors_name_the_users_file(tmp_path, monkeypatch, call, use):
    def refuse(path, *more, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(PermissionError) as caught:
        use(tmp_path / "a") if use else scratch_folder(tmp_path / "a").__enter__()
    assert caught.value.filename == str(tmp_path / "a")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError) as caught:
        write(tmp_path / "none" / "a")
    assert caught.value.filename == str(tmp_path / "none" / "a") and names(tmp_path) == []


@posix
def test_a_full_disk_is_named_and_nothing_is_left(tmp_path):
    write(tmp_path / "a", b"old")
    program = f"""
import resource, signal
from minibeit.files import atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with atomic_write({str(tmp_path / "a")!r}) as file:
    file.write(bytes(100_000))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"File too large: '{tmp_path / 'a'}'" in done.stderr
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_check_writable_leaves_nothing_and_takes_folders_to_come(tmp_path):
    check_writable(tmp_path / "a")
    check_writable(tmp_path / "deep" / "deeper" / "a")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OSError) as caught:
        check_writable(tmp_path / "file" / "a")
    assert caught.value.filename == str(tmp_path / "file" / "a")
    assert names(tmp_path) == ["file"]


WRITER = """
import sys, time
from pathlib import Path
from minibeit.files import atomic_write, scratch_folder
folder = Path(sys.argv[1])
with scratch_folder(folder / "model") as made, atomic_write(folder / "a") as file:
    (made / "weights").write_bytes(bytes(100))
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


@posix
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    living = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    living.stdout.readline()
    held = names(tmp_path)
    assert len(held) == 2 and all(name.startswith(files.MARK) for name in held)
    killed = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    assert len(names(tmp_path)) == 4
    (tmp_path / ".minibeit-notes").write_text("not ours")
    files._cleaned.clear()
    write(tmp_path / "b")
    assert names(tmp_path) == sorted([*held, ".minibeit-notes", "b"])
    living.terminate()
    living.wait()
    living.stdout.close()


@posix
def test_another_hosts_temporaries_are_kept_for_a_day(tmp_path):
    fresh, old = tmp_path / f"{files.MARK}00000000-1-a{files.END}", tmp_path / f"{files.MARK}00000000-1-b{files.END}"
    for path in (fresh, old):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 2 * files.STALE,) * 2)
    write(tmp_path / "a")
    assert names(tmp_path) == sorted([fresh.name, "a"])


@posix
def test_a_link_that_looks_like_a_leftover_is_left_alone(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"x")
    link = tmp_path / f"{files.MARK}{files._host()}-1-a{files.END}"
    link.symlink_to("precious")
    write(tmp_path / "a")
    assert (tmp_path / "precious" / "file").exists() and link.is_symlink()


def test_many_writers_and_cleaners_at_once_lose_nothing(tmp_path):
    """Each write forgets that the folder is clean, so that all look at each other's temporaries all the time."""
    failures = []

    def work(number):
        try:
            for i in range(60):
                files._cleaned.clear()
                write(tmp_path / f"{number}-{i % 5}", str(i).encode())
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert names(tmp_path) == sorted(f"{number}-{i}" for number in range(6) for i in range(5))
