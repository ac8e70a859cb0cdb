"""Tutorial 04 runs from end to end; it asserts what it says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parent.parent / "tutorials" / "04_checking_an_implementation.py"


def test_checking_an_implementation(monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "agg")
    matplotlib.use("agg")
    said = runpy.run_path(str(TUTORIAL))
    assert said["caught"][1e-2]
    assert "Diagnosis: epsilon 0.001 instead of 1e-12" in capsys.readouterr().out
