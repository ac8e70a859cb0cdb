"""Guard mode: faults of memory that are planted are found, and all five tasks run in it without one.

MINIBEIT_GUARD_RUNS sets the number of random configurations (default 12; the slow test runs up to 2,000 or for four
minutes).  All of them: `MINIBEIT_GUARD_SECONDS=100000 pytest -m slow tests/test_guard.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("numba")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guard mode needs Linux")

TESTS = Path(__file__).parent
RUNS = int(os.environ.get("MINIBEIT_GUARD_RUNS", "12"))
SECONDS = float(os.environ.get("MINIBEIT_GUARD_SECONDS", "240"))


def guarded(code, *arguments, timeout=600):
    """Runs Python code in guard mode, where it finds the modules of the tests."""
    environment = {**os.environ, "MINIBEIT_GUARD": "1", "MINIBEIT_NUM_THREADS": "2", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-X", "faulthandler", "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


START = """
import gc, sys
import numpy as np
import guard_runs
from minibeit.ops import get_ops
from minibeit.ops.numba_cpu import gemm, guard, memory, norm, queue
from minibeit.ops.numba_cpu.memory import Operand
from minibeit.params import LayerNorm, Linear

OPS = get_ops("numba")
rng = np.random.default_rng(0)
def normal(*shape):
    return rng.standard_normal(shape, dtype=np.float32)
layer, norm_ = OPS.prepare(Linear(normal(160, 96), normal(160))), OPS.prepare(LayerNorm(normal(96), normal(96)))
x = normal(300, 96)
def forget_owners(run):
    def careless(kernel, tasks, operands, numbers, *rest, **more):
        return run(kernel, tasks, [Operand(None, o.address, None, 0) for o in operands], numbers, *rest, **more)
    return careless
def change(module, name, made):
    setattr(module, name, made(getattr(module, name)))
def number_changed(module, field, by):
    def made(run):
        def wrong(kernel, tasks, operands, numbers, *rest, **more):
            numbers = list(numbers)
            numbers[kernel.arguments.number_names.index(field)] += by
            return run(kernel, tasks, operands, numbers, *rest, **more)
        return wrong
    change(module, "run", made)
"""

LONG_SUM = """
memory._KEPT_BYTES = 0
queue._MOST_HELD = 1 << 20
wide, long = OPS.prepare(Linear(normal(2048, 96), None)), OPS.prepare(Linear(normal(64, 2048), None))
change(gemm, "run", forget_owners)
with OPS.queued():
    OPS.linear(OPS.linear(x, wide), long)
"""
SEGMENTATION_FAULT = "segmentation fault"

# name: (code that plants a fault and meets it, what tells of it: a word of a GuardError, or the segmentation fault)
PLANTED = {
    # The fault that guard mode was made for: a flush dropped what kept the memory of a long sum's second half alive.
    "bare addresses, as the queue once had them": (LONG_SUM, "keeps alive|was freed"),
    "the same when jobs are not checked": ("guard._check = lambda *_: None" + LONG_SUM, SEGMENTATION_FAULT),
    "a result that nobody keeps": (
        """
memory._KEPT_BYTES = 0
def bare(y, o, row_bytes):
    return y, Operand(None, o.address, None, 0), row_bytes
change(norm, "result", lambda result: lambda shape: bare(*result(shape)))
with OPS.queued():
    OPS.layer_norm(x, norm_, 1e-6)
""",
        "was freed",
    ),
    "weights collected while queued": (
        """
with OPS.queued():
    panels, bias = layer.operands
    object.__setattr__(layer, "operands", (Operand(None, panels.address, x, 0), Operand(None, bias.address, x, 0)))
    OPS.linear(x, layer)
    del layer, panels, bias
    gc.collect()
""",
        "was freed",
    ),
    "an owner that owns something else": (
        """
change(norm, "rows", lambda rows: lambda x: (Operand(x, memory.operand(x).address, normal(3), 0), *rows(x)[1:]))
OPS.layer_norm(x, norm_, 1e-6)
""",
        "does not point at",
    ),
    "an offset beyond the operand": (
        """
run = gemm.run
gemm.run = lambda kernel, tasks, o, *rest: run(kernel, tasks, (o[0], o[1].at(1 << 22), *o[2:]), *rest)
OPS.linear(x, layer)
""",
        "does not point at",
    ),
    "one row too many": ("number_changed(norm, 'count', 1)\nOPS.layer_norm(x, norm_, 1e-6)", SEGMENTATION_FAULT),
    "one column too many": ("number_changed(norm, 'width', 1)\nOPS.layer_norm(x, norm_, 1e-6)", SEGMENTATION_FAULT),
    "one step of the sum too many": ("number_changed(gemm, 'steps', 1)\nOPS.linear(x, layer)", SEGMENTATION_FAULT),
    "rows too far apart": (
        "number_changed(gemm, 'y_bytes', 64)\nnumber_changed(gemm, 'y_unit_bytes', 64 * gemm.MR)\nOPS.linear(x, layer)",
        SEGMENTATION_FAULT,
    ),
    "too little scratch memory": (
        """
fused = sys.modules[memory.__package__ + ".attention"]
change(fused, "run", lambda run: lambda kernel, tasks, o, n, scratch: run(kernel, tasks, o, n, scratch - 8192))
q, k, v = normal(1, 50, 3, 4, 32).transpose(2, 0, 3, 1, 4)
OPS.attention(q, k, v, None)
""",
        SEGMENTATION_FAULT,
    ),
    "a number in front of the result": (
        """
change(norm, "result", lambda result: lambda shape: (lambda y, o, b: (y, o.at(-4), b))(*result(shape)))
guard._check = lambda *_: None
OPS.layer_norm(x, norm_, 1e-6)
""",
        "in front of",
    ),
    "a buffer in use given out again": (
        """
memory._UNUSED += 1
y = OPS.layer_norm(x, norm_, 1e-6)
OPS.layer_norm(x, norm_, 1e-6)
""",
        "another one is alive",
    ),
    "a result read before it was written": (
        """
y = memory.padded((300, 96))
assert np.isfinite(OPS.linear(y, layer)).all(), "GuardError: NaN"
""",
        "NaN",
    ),
    "a view of a freed buffer read by Python": (
        """
import ctypes
y = memory.aligned((300, 96))
address = memory.operand(y).address
del y
ctypes.string_at(address, 4)
""",
        SEGMENTATION_FAULT,
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name):
    code, words = PLANTED[name]
    done = guarded(START + code)
    if words is SEGMENTATION_FAULT:
        assert done.returncode == -signal.SIGSEGV, done.stderr[-2000:]
    else:
        assert "GuardError" in done.stderr and any(word in done.stderr for word in words.split("|")), done.stderr[
            -2000:
        ]


def test_without_faults_nothing_is_found():
    done = guarded(START + "guard_runs.run(0, 4, 60)\nprint(guard.ACTIVE, len(guard._regions.starts) > 10)")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == ["True", "True"]


GRADIENTS = """
from minibeit.train.gradients import value_and_grad
from minibeit.train.optimizer import AdamW
for width, heads, size, batch in ((36, 3, 48, 2), (65, 5, 32, 3), (96, 2, 80, 1)):
    config = minibeit.BeitConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=2 * width + 1, num_hidden_layers=2,
        image_size=size, num_labels=5, use_relative_position_bias=True, drop_path_rate=0.3,
    )
    model = minibeit.BeitForImageClassification(config, backend="numba", num_threads=2)
    optimizer = AdamW(model)
    pixels = normal(batch, 3, size, size)
    for recompute in (False, True):
        found = value_and_grad(model, pixels, labels=np.arange(batch), rng=minibeit.Noise(1), recompute=recompute)
        optimizer.step(found.grads, 1e-3)
    assert np.isfinite(found.loss) and np.isfinite(optimizer.weights).all()
print("learned")
"""


def test_gradients_in_guard_mode():
    done = guarded("import minibeit\n" + START + GRADIENTS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "learned"


def test_random_configurations_in_guard_mode():
    done = guarded(f"import guard_runs; print(guard_runs.run(100, {RUNS}, 60))")
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 3


@pytest.mark.slow
def test_many_random_configurations_in_guard_mode():
    start = time.perf_counter()
    done = guarded(f"import guard_runs; print(guard_runs.run(1000, 2000, {SECONDS}))", timeout=SECONDS + 300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == 2000 or time.perf_counter() - start > SECONDS * 0.9


@pytest.mark.slow
def test_the_ops_and_the_queue_in_guard_mode():
    tests = [str(TESTS / name) for name in ("test_numba_ops.py", "test_numba_queue.py", "test_batches.py")]
    code = f"import sys, pytest; sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', *{tests!r}]))"
    done = guarded(code)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_guard_mode_is_refused_where_it_cannot_work():
    code = "import sys, numba; sys.platform = 'darwin'; import minibeit.ops.numba_cpu.guard"
    done = guarded(code)
    assert done.returncode != 0 and "MINIBEIT_GUARD: guard mode protects pages as Linux does" in done.stderr
