"""Every intermediate of tiny random BEiTs beside PyTorch's, from files: no torch needed."""

from __future__ import annotations

import pytest
from conftest import available_backends, distance, rms
from golden import DATA, NAMES, load
from tolerances import EPS32, FACTOR, FEW, FEW_FLOOR, FLOOR, GOLDEN64

COMPAT = {"non_square": {"compat": "transformers"}}  # the right answer is another: see test_deviations


def test_all_files_are_listed():
    assert {path.name for path in DATA.glob("golden_*.safetensors")} >= {f"golden_{n}.safetensors" for n in NAMES}
    assert sum((DATA / f"golden_{name}.safetensors").stat().st_size for name in NAMES) < 2e6


@pytest.mark.parametrize("name", NAMES)
def test_files_say_how_they_were_made(name):
    assert {"torch", "transformers", "numpy"} <= set(load(name).versions)


@pytest.mark.parametrize("name", NAMES)
def test_float64_equals_pytorch(name):
    golden = load(name)
    found = golden.run("float64", **COMPAT.get(name, {}))
    assert set(found) == set(golden.truth)
    assert len(found) > 20
    for key, truth in golden.truth.items():
        assert distance(found[key], truth) <= GOLDEN64, key


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("name", NAMES)
def test_float32_is_as_close_as_pytorch(name, backend):
    golden = load(name)
    found = golden.run("float32", backend, **COMPAT.get(name, {}))
    assert set(found) == set(golden.truth)
    last = golden.config.num_hidden_layers - 1
    expected = golden.float32_rms[f"encoder.{last}.output"] / rms(golden.truth[f"encoder.{last}.output"])
    for key, truth in golden.truth.items():
        assert found[key].dtype == "float32", key
        assert found[key].shape == truth.shape, key
        floor = FLOOR * EPS32 if truth.size >= FEW else max(FEW_FLOOR * EPS32, expected)
        allowed = FACTOR * max(golden.float32_rms[key], floor * rms(truth))
        assert rms(found[key] - truth) <= allowed, key
