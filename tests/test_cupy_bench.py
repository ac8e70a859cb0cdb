"""The benchmark of a GPU: its contestants on the stand-in for CuPy, its report, and what it says without a GPU."""

from __future__ import annotations

import types

import numpy as np
import pytest
from conftest import distance
from cuda_on_cpu.backend import FRESH
from cuda_on_cpu.fake_cupy import pretend
from cuda_on_cpu.kernels import compiler

from minibeit.bench import contestants, gpu, measure, report, worker, workloads
from minibeit.bench.measure import Plan, Result, Table
from minibeit.cli import main

DIGITS = workloads.make("classification", "digits", None, 2)
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no g++ to run kernels on the CPU with")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return workloads.write_checkpoint(DIGITS, tmp_path_factory.mktemp("bench"))


@needs_compiler
def test_contestants_take_turns(checkpoint):
    with pretend(fresh=FRESH):
        answers = list(
            worker.run_interleaved(
                ["cupy"], DIGITS.to_dict(), str(checkpoint), {"cupy": "unused"}, 1, 3, 1.0, agree=1e-4
            )
        )
    assert answers[0] == {"differences": {"cupy": 0.0}}
    assert len(answers[1]["times"]["cupy"]) == 3
    assert all(seconds > 0 for seconds in answers[1]["times"]["cupy"])
    assert answers[1]["roofs"] == []


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_and_peak_memory(dtype, checkpoint):
    x = workloads.pixels(DIGITS)
    expected = contestants.load("numpy", DIGITS, checkpoint, checkpoint, 1)(x)
    with pretend(fresh=FRESH):
        forward = contestants.load("cupy", DIGITS, checkpoint, checkpoint, 1, dtype, 1)
        assert distance(forward(x), expected) < gpu.allowed_difference(dtype)
        answers = list(worker.run_once("cupy", DIGITS.to_dict(), str(checkpoint), "", 1, dtype, 1))
        assert answers[0] == {"first_output": [2, 1000]}
        assert answers[1]["peak_device_bytes"] > sum(a.nbytes for a in (x, expected))


@needs_compiler
def test_profile_counts_the_operations_of_every_product(checkpoint):
    with pretend(fresh=FRESH):
        found = next(worker.run_profile("cupy", DIGITS.to_dict(), str(checkpoint), 1))["ops"]
    expected = next(worker.run_profile("numpy", DIGITS.to_dict(), str(checkpoint), 1))["ops"]
    assert found["attention"]["origin"] == "cupy"
    for op in ("linear", "linear_activation", "linear_residual", "project_qkv", "attention"):
        assert found[op]["operations"] == expected[op]["operations"] > 0


@needs_compiler
@pytest.mark.parametrize("task, dtype", [("classification", "float32"), ("mim", "float16")])
def test_a_step_of_training(task, dtype, tmp_path):
    workload = workloads.make(task, "digits", None, 2, training=True)
    folder, x = workloads.write_checkpoint(workload, tmp_path / "model"), workloads.pixels(workload)
    step = contestants.load("numpy", workload, folder, folder, 1)
    expected = [step(x), step(x)]
    with pretend(fresh=FRESH):
        forward = contestants.load("cupy", workload, folder, folder, 1, dtype, 1)
        for truth in expected:  # the second step is that of weights which the first has changed
            assert distance(forward(x), truth.reshape(-1)) < gpu.allowed_difference(dtype)
        assert forward.seconds(x) > 0 and forward.peak_bytes() > 4 * 4 * sum(a.size for a in step.model.arrays.values())


def test_allowed_differences(monkeypatch):
    monkeypatch.delenv("MINIBEIT_TF32", raising=False)
    assert gpu.allowed_difference("float32") == measure.AGREE
    monkeypatch.setenv("MINIBEIT_TF32", "1")
    assert gpu.allowed_difference("float32") == gpu.AGREE_TF32
    assert gpu.allowed_difference("float16") == gpu.AGREE["float16"]


def test_peers_of_a_gpu(monkeypatch):
    monkeypatch.setattr(measure, "missing", lambda name, *_: [])
    assert measure.choose_peers(None, print, on_gpu=True) == ("torch-cuda", "torch-compiled")
    assert Plan(("cupy", "torch-cuda"), 1).on_gpu
    assert not Plan(("numba", "torch"), 1).on_gpu
    with pytest.raises(ValueError, match="--against: expected none or some of torch on a GPU, found 'openvino'"):
        measure.choose_peers(["openvino"], print, on_gpu=True)


def test_pytorch_without_cuda():
    torch = types.SimpleNamespace(__version__="2.13", cuda=types.SimpleNamespace(is_available=lambda: False))
    with pytest.raises(ValueError, match=r"torch 2.13 finds no GPU; install the build of PyTorch for your CUDA"):
        gpu.torch_forward(torch, None, None, "torch-cuda", "float32", None)


def test_report_tells_the_device():
    results = [
        Result("cupy", [0.002, 0.001], 0.0, 1_000_000, [], 500_000_000),
        Result("torch-compiled", [0.004], 1e-3, 1_000_000, [], 700_000_000),
    ]
    table = Table(DIGITS, 2, 10**9, [], results, [], "bfloat16")
    lines = report.rows(table)
    assert [line[0] for line in lines] == ["minibeit cupy", "PyTorch compiled"]
    assert [line[7] for line in lines] == ["500", "700"]
    facts = {"cpu": "?", "cores": 1, "system": "?", "python": "3", "time": "now", "gpu": "A GPU (80 GB, CUDA 12.9)"}
    footer = "\n".join(report.footer(facts, [table]))
    assert "A GPU (80 GB, CUDA 12.9); times by device events" in footer
    assert "bfloat16, random weights" in footer
    assert table.to_dict()["results"][0]["peak_device_mb"] == 500


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "cupy"], "no NVIDIA GPU was found"),
        (["--backend", "numba", "--dtype", "float16"], "--dtype float16 and --device go with --backend cupy alone"),
        (["--device", "1"], "--dtype float16 and --device go with --backend cupy alone"),
        (["--backend", "cupy", "--dtype", "int8"], "--dtype int8 and bfloat16 measure a forward pass"),
        (["--train", "--dtype", "int8"], "--dtype int8 and bfloat16 measure a forward pass"),
        (["--backend", "cupy", "numba"], "--backend cupy is measured by itself"),
    ],
)
def test_command_line(words, message, capsys):
    with pretend(fresh=FRESH, devices=0):
        assert main(["bench", "--size", "digits", *words]) != 0
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_every_float_dtype_of_a_gpu_has_a_limit():
    from minibeit.ops import DTYPES, HALF_DTYPES

    assert set(gpu.AGREE) == {*DTYPES, *HALF_DTYPES}
    assert np.all(np.array(list(gpu.AGREE.values())) < 1)
