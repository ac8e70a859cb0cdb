"""The table of ops is the only list of them: what is entered there is known to seam, verifier and profile."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from minibeit.bench.profile import operations
from minibeit.ops import BACKENDS, Ops, get_ops, numba_cpu, reference
from minibeit.ops.table import ARITHMETIC, ARRAYS, CONTROL, TABLE, Op, served_by
from minibeit.verify.bisect import fast_ops
from minibeit.verify.trace_names import _ghost_op


@pytest.mark.parametrize("name", TABLE)
def test_definitions_have_the_signatures_of_the_table(name):
    asked = list(inspect.signature(getattr(Ops, name)).parameters.values())[1:]
    defined = inspect.signature(getattr(reference, name)).parameters.values()
    assert [(p.name, p.default) for p in asked] == [(p.name, p.default) for p in defined]


@pytest.mark.parametrize("name", served_by("numba"))
def test_fast_versions_have_the_signatures_of_the_table(name):
    asked = [p.name for p in inspect.signature(getattr(Ops, name)).parameters.values()][1:]
    found = list(inspect.signature(getattr(numba_cpu, name)).parameters)
    assert found == asked + {"prepare": ["keep_source"]}.get(name, [])


def test_kinds_and_backends_are_known():
    assert {op.kind for op in TABLE.values()} == {ARITHMETIC, ARRAYS, CONTROL}
    assert {backend for op in TABLE.values() for backend in op.backends} <= set(BACKENDS)
    assert all(op.shape is not None for op in TABLE.values() if op.is_arithmetic)


def test_an_op_is_added_in_the_table_and_where_it_is_defined(monkeypatch):
    """Its NumPy definition, its fast version, its line in the table: then every list has it."""
    entry = Op("double", shape=lambda x: x.shape, products=lambda args, result: result.size, backends=("numba",))
    monkeypatch.setitem(TABLE, "double", entry)
    monkeypatch.setattr(reference, "double", lambda x: x + x, raising=False)
    monkeypatch.setattr(numba_cpu, "double", lambda x: 2 * x, raising=False)
    x = np.ones((2, 3), np.float32)
    for backend, origin in (("numpy", "numpy"), ("numba", "numba")):
        ops = get_ops(backend)
        assert ops.origin["double"] == origin
        assert np.array_equal(ops.double(x), x + x)
    assert get_ops("numba", only=["linear"]).origin["double"] == "numpy"
    assert "double" in fast_ops("numba")
    assert _ghost_op(entry)(x).shape == (2, 3)
    assert operations("double", (x,), x) == 12


def test_shapes_are_those_of_the_results():
    ops = get_ops("numpy")
    x = np.zeros((2, 7, 12), np.float32)
    layer = SimpleNamespace(weight=np.zeros((5, 12), np.float32), bias=None)
    assert TABLE["linear"].shape(x, layer) == ops.linear(x, layer).shape
    assert TABLE["tokens_to_map"].shape(x, (3, 2)) == ops.tokens_to_map(x, (3, 2)).shape
    assert TABLE["mean_patches"].shape(x) == ops.mean_patches(x).shape
    assert TABLE["add"].shape(x, x[:1]) == ops.add(x, x[:1]).shape
    assert TABLE["concatenate"].shape([x[:1, :1], x], 1) == ops.concatenate([x[:1, :1], x], 1).shape


def test_inference_does_not_import_what_only_training_needs():
    code = (
        "import sys, numpy as np; from minibeit import BeitConfig, BeitModel;"
        "sizes = dict(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2);"
        "BeitModel(BeitConfig(**sizes, intermediate_size=8), backend='numba')(np.zeros((1, 3, 8, 8), np.float32));"
        "print([name for name in sys.modules if name.endswith(('backward_maps', 'halves', 'minibeit.tape'))])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
