"""The numba backend's machinery: threads, memory that is used again, other CPUs."""

from __future__ import annotations

import os
import platform
import threading

import numpy as np
import pytest

pytest.importorskip("numba")

from llvmlite import binding as llvm
from other_process import SMALL, run_python
from python_threads import call_in_threads

from minibeit import machine
from minibeit.ops import get_ops, numba_cpu
from minibeit.ops.numba_cpu import gemm, machine_code, memory, pool, queue
from minibeit.ops.numba_cpu.arguments import SHARES
from minibeit.ops.numba_cpu.target import TILE
from minibeit.params import Linear

OPS = get_ops("numba")


def layer_and_rows(rows=70, steps=96, out=130):
    rng = np.random.default_rng(0)
    layer = Linear(rng.standard_normal((out, steps), dtype=np.float32), None)
    return OPS.prepare(layer), rng.standard_normal((rows, steps), dtype=np.float32)


@pytest.fixture
def many_cpus(monkeypatch):
    """As many threads work as are asked for, also where that is more than this machine has CPUs."""
    monkeypatch.setattr(pool, "usable_cpus", lambda: 1000)


def test_the_same_bits_at_any_number_of_threads(many_cpus):
    layer, x = layer_and_rows(400, 96, 400)
    with numba_cpu.num_threads(1):
        expected = OPS.linear(x, layer).copy()
    for count in (2, 3, 5):
        with numba_cpu.num_threads(count):
            for _ in range(20):
                assert np.array_equal(OPS.linear(x, layer), expected)
    assert threading.active_count() >= 4  # the workers are there: the equality above was earned


def test_more_threads_than_a_job_has_shares_or_tasks(many_cpus):
    layer, x = layer_and_rows(400, 96, 400)
    expected = OPS.linear(x, layer).copy()
    with numba_cpu.num_threads(SHARES + 3):
        for _ in range(3):
            assert np.array_equal(OPS.linear(x, layer), expected)


def test_every_task_is_done_once_whoever_does_it(many_cpus):
    """A kernel that adds 1 at its task's place, for numbers of tasks around the number of threads."""
    done = np.zeros(1000, np.float32)
    kernel = machine_code.Kernel("count_tasks", "count_task")
    for threads in (1, 2, 3, 7):
        for tasks in (1, 2, 3, 5, 7, 8, 1000):
            done[:] = 0
            with numba_cpu.num_threads(threads):
                queue.run(kernel, tasks, (memory.operand(done),), ())
            assert (done[:tasks] == 1).all() and not done[tasks:].any(), (threads, tasks)


def test_rows_are_cut_into_no_more_blocks_than_there_are_tiles():
    for count in (1, 5, 6, 7, 91, 92, 197, 577, 1576, 5000):
        for threads in (1, 2, 3, 16):
            side, blocks, group = gemm.task_layout(count, 12, threads)
            assert blocks % side == 0 and 1 <= group <= 12 and blocks <= -(-count // TILE.rows)


def test_many_python_threads_may_call_at_once():
    layer, x = layer_and_rows(400, 96, 400)
    expected, wrong = OPS.linear(x, layer).copy(), []

    def call():
        for _ in range(100):
            if not np.array_equal(OPS.linear(x, layer), expected):
                wrong.append(1)

    call_in_threads(call)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_workers_of_its_own():
    layer, x = layer_and_rows(400, 96, 400)
    expected = OPS.linear(x, layer).copy()
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(OPS.linear(x, layer), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def new_pool(monkeypatch):
    """A pool without workers, as a process begins with one."""
    monkeypatch.setattr(pool, "_pool", pool._Pool())
    return pool._pool


def test_no_more_threads_work_than_the_process_has_cpus(new_pool, monkeypatch):
    """They would take turns on the CPUs, spinning: 64 threads on one CPU once took 22 times as long as one."""
    with numba_cpu.num_threads(1):
        layer, x = layer_and_rows(400, 96, 400)
    with numba_cpu.num_threads(64):
        monkeypatch.setattr(pool, "usable_cpus", lambda: 1)
        expected = OPS.linear(x, layer).copy()
        assert not new_pool.workers
        monkeypatch.setattr(pool, "usable_cpus", lambda: 3)
        assert np.array_equal(OPS.linear(x, layer), expected)
        assert len(new_pool.workers) == 2


def test_threads_that_cannot_be_started_are_done_without(new_pool, many_cpus, monkeypatch):
    with numba_cpu.num_threads(1):
        layer, x = layer_and_rows(400, 96, 400)
    start, started = threading.Thread.start, []

    def refuse(thread):
        if len(started) >= 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with numba_cpu.num_threads(1):
        expected = OPS.linear(x, layer).copy()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with numba_cpu.num_threads(5):
        for _ in range(3):
            assert np.array_equal(OPS.linear(x, layer), expected)
    assert len(new_pool.workers) == len(started) == 2


MODES = {"flush to zero": 0x9FC0, "round down": 0x3F80, "round up": 0x5F80, "round to zero": 0x7F80}  # MXCSR


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="sets a register of x86")
@pytest.mark.parametrize("mode", MODES)
def test_the_callers_mode_of_floating_point_changes_nothing_and_is_left_alone(mode, many_cpus):
    """Each thread has its own, and it once depended on who did which task."""
    set_mode, get_mode = (machine_code.Kernel("count_tasks", name, 1) for name in ("set_mode", "get_mode"))
    layer, x = layer_and_rows(400, 96, 400)
    x *= np.float32(1e-38)  # products below are denormal
    expected = OPS.linear(x, layer).copy()
    assert (np.abs(expected) < np.finfo(np.float32).tiny).any() and expected.any()
    place = np.zeros(1, np.int64)
    found = []
    get_mode.load()
    for threads in (1, 2, 3):
        with numba_cpu.num_threads(threads):
            set_mode(MODES[mode])
            try:
                found += [OPS.linear(x, layer) for _ in range(5)]
                get_mode(memory.operand(place).address)
            finally:
                set_mode(0x1F80)
        assert place[0] & ~0x3F == MODES[mode] & ~0x3F  # but for the flags of what happened
    assert all(np.array_equal(y, expected) for y in found)


V1 = "7:cpu,cpuacct:/shop\n3:memory:/shop\n"
V2 = "0::/system/shop\n"


@pytest.mark.parametrize(
    "membership, files, expected",
    [
        (V2, {}, None),
        (V2, {"system/shop/cpu.max": "max 100000"}, None),
        (V2, {"system/shop/cpu.max": "150000 100000"}, 1.5),
        (V2, {"system/shop/cpu.max": "400000 100000", "system/cpu.max": "50000 100000"}, 0.5),
        (V2, {"cpu.max": "200000 100000"}, 2.0),  # a container sees its own group as the root
        (V2, {"system/shop/cpu.max": "what is this"}, None),
        (V1, {"cpu,cpuacct/shop/cpu.cfs_quota_us": "-1", "cpu,cpuacct/shop/cpu.cfs_period_us": "100000"}, None),
        (V1, {"cpu,cpuacct/shop/cpu.cfs_quota_us": "250000", "cpu,cpuacct/shop/cpu.cfs_period_us": "100000"}, 2.5),
        (V1, {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        (V1, {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "0"}, None),
        ("nonsense", {}, None),
        (None, {}, None),
    ],
)
def test_quotas_of_control_groups(membership, files, expected, tmp_path):
    file, root = tmp_path / "cgroup", tmp_path / "fs"
    if membership is not None:
        file.write_text(membership)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    assert machine.cpu_quota(file, root) == expected


@pytest.mark.parametrize("quota, threads", [(None, 7), (0.5, 1), (1.5, 2), (30.0, 7)])
def test_the_default_number_of_threads_follows_mask_and_quota(quota, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)), raising=False)
    monkeypatch.setattr(machine, "_own_quota", lambda: quota)
    monkeypatch.delenv("MINIBEIT_NUM_THREADS", raising=False)
    assert pool.default_num_threads.__wrapped__() == threads


def test_workers_sleep_and_wake():
    layer, x = layer_and_rows(400, 96, 400)
    with numba_cpu.num_threads(2):
        expected = OPS.linear(x, layer).copy()
        for pause in (0.0, 0.001, 0.05):
            threading.Event().wait(pause)
            assert np.array_equal(OPS.linear(x, layer), expected)


@pytest.mark.parametrize("count", [0, -1, 2.5, "two"])
def test_a_wrong_number_of_threads(count):
    with pytest.raises(ValueError, match="num_threads must be"), numba_cpu.num_threads(count):
        pass


def test_the_environment_sets_the_number_of_threads(monkeypatch):
    pool.default_num_threads.cache_clear()
    monkeypatch.setenv("MINIBEIT_NUM_THREADS", "3")
    assert pool.get_num_threads() == 3
    pool.default_num_threads.cache_clear()
    monkeypatch.setenv("MINIBEIT_NUM_THREADS", "none")
    with pytest.raises(ValueError, match="MINIBEIT_NUM_THREADS"):
        pool.get_num_threads()
    monkeypatch.undo()
    pool.default_num_threads.cache_clear()


def test_a_result_is_never_overwritten_while_someone_holds_a_view_of_it():
    layer, x = layer_and_rows()
    kept = [OPS.linear(x * np.float32(i), layer)[3:5, 7:] for i in range(12)]
    copies = [view.copy() for view in kept]
    for i in range(30):
        OPS.linear(x * np.float32(100 + i), layer)
    assert all(np.array_equal(view, copy) for view, copy in zip(kept, copies))


def test_memory_of_dropped_results_is_used_again():
    first = memory.padded((1234, 567))  # a size that no other test uses
    address = first.ctypes.data
    other = memory.padded((1234, 567))
    assert other.ctypes.data != address
    del first
    assert memory.padded((1234, 567)).ctypes.data == address


def test_rows_lie_apart_so_that_they_do_not_share_cache_sets():
    for width in (1, 16, 768, 1024, 3072):
        x = memory.padded((4, width))
        assert x.ctypes.data % 64 == 0 and x.strides[0] // 64 % 2 == 1


def test_pages_of_a_mapped_file_are_released_and_come_back(tmp_path):
    path = tmp_path / "weights"
    np.arange(1_000_000, dtype=np.float32).tofile(path)
    mapped = np.memmap(path, np.float32, "r").reshape(1000, 1000)
    memory.release_pages(mapped[10:900])
    assert np.array_equal(mapped.reshape(-1), np.arange(1_000_000, dtype=np.float32))
    owned = np.ones((1000, 1000), np.float32)
    memory.release_pages(owned)
    assert (owned == 1).all()  # dropping pages that no file backs would lose them


def test_packing_is_reversible_and_leaves_the_source_alone():
    weight = np.random.default_rng(1).standard_normal((45, 20), dtype=np.float32)
    weight.flags.writeable = False
    layer = Linear(weight, None)
    assert np.array_equal(OPS.prepare(layer).weight(), weight)


def test_without_a_compiler_numpy_serves():
    run_python(SMALL + "assert ops.linear is reference.linear", NUMBA_DISABLE_JIT="1")


def test_a_kernel_that_needs_python_is_refused():
    from minibeit.ops.numba_cpu.kernels.compiler import compile_kernel

    def prints(a, b, c):
        print(a)

    with pytest.raises(RuntimeError, match="kernel prints calls"):
        compile_kernel(prints, "prints", 3)


names_of_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 CPUs")


@pytest.mark.slow
@names_of_x86
@pytest.mark.parametrize(
    "cpu, tile, rows",
    [
        ("haswell", "avx2", 6),
        ("nehalem", "portable", 4),
        ("skylake-avx512", "avx512", 6),
        ("znver4", "avx512", 12),
    ],
)
def test_the_tile_follows_the_cpu_that_numba_is_told_to_compile_for(cpu, tile, rows):
    features = llvm.get_host_cpu_features()
    if tile == "avx512" and not features.get("avx512bf16" if cpu == "znver4" else "avx512f"):
        pytest.skip(f"this CPU lacks instructions of {cpu}")
    check = f"from minibeit.ops.numba_cpu.target import TILE; assert (TILE.name, TILE.rows) == {tile, rows}, TILE\n"
    run_python(
        check + "import pytest; raise SystemExit(pytest.main(['-q', '-x', 'tests/test_numba_ops.py']))",
        NUMBA_CPU_NAME=cpu,
    )


@pytest.mark.slow
@names_of_x86
def test_code_for_another_cpu_has_that_cpus_instructions_only():
    """A host with AVX-512 has 32 registers, also for vectors of AVX2; a Haswell has 16 and no masks."""
    check = """
from minibeit.ops.numba_cpu.kernels.pack import pack
from numba import njit, types

(text,) = njit(types.void(types.intp, types.intp, types.intp))(pack).inspect_asm().values()
assert "ymm" in text
assert not any(word in text for word in ("ymm16", "zmm", "%k1")), text
"""
    run_python(check, NUMBA_CPU_NAME="haswell")
