"""`minibeit bench`: operations counted by hand and by watching, fair turns, honest memory, reports, missing peers."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import make, tiny_config

from minibeit.bench import contestants, flops, low_precision, measure, report, roof, worker, workloads
from minibeit.bench.measure import Plan, Result, Table
from minibeit.bench.profile import profile, watched
from minibeit.cli import bench
from minibeit.cli.terminal import UsageError

DIGITS = workloads.make("classification", "digits", None, 1)


def parse(*words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def table(workload=DIGITS, roofs=(2e9, 4e9, 3e9), **changes):
    results = [
        Result("numba", [0.02, 0.01, 0.04], 0.0, 300_000_000, [0.5, 0.7, 0.6]),
        Result("torch", [0.05, 0.03, 0.04], 1e-6),
    ]
    return Table(**{**dict(workload=workload, threads=2, operations=10**7, roofs=list(roofs), results=results,
                           skipped=["OpenVINO: cannot be exported (why)"]), **changes})  # fmt: skip


# Counting -----------------------------------------------------------------------------------------------------------


def test_operations_of_base_by_hand():
    config = workloads.make("classification", "base", None, 1).config
    N, D, F = 197, 768, 3072
    block = N * (3 * D * D) + N * D * D + 2 * N * N * D + 2 * N * D * F  # qkv, output, scores and context, mlp
    by_hand = 2 * (196 * 768 * D + 12 * block + D * 1000)
    assert flops.total(config, "image_classification") == by_hand == 35_127_656_448
    assert flops.total(config, "image_classification", 8) == 8 * by_hand


def test_operations_of_the_ade20k_head_by_hand():
    """The decode head is about 1.5 TFLOP, of which fpn_bottleneck alone 1.09."""
    parts = flops.count(workloads.make("segmentation", "base", None, 1).config, "semantic_segmentation")
    assert parts["fpn_bottleneck"] == 2 * 160 * 160 * 768 * 9 * 4 * 768
    assert parts["fpn_convs"] == 2 * (160**2 + 80**2 + 40**2) * 768 * 9 * 768
    assert parts["classifier"] == 2 * 160 * 160 * 768 * 150
    assert parts["mlp"] == 10 * 2 * 2 * 1601 * 768 * 3072  # index 11 is the output of the 10th block


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("classification", {}),
        ("mim", {"use_mask_token": True}),
        ("segmentation", {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}),
        ("segmentation", {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3], "feature_convention": "unilm"}),
        ("backbone", {"num_hidden_layers": 4, "out_indices": [1, 3]}),
        ("backbone", {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "add_fpn": True}),
    ],
)
def test_the_formula_counts_what_the_ops_do(task, changes, backend):
    if backend == "numba":
        pytest.importorskip("numba")
    config = tiny_config(image_size=(20, 16), use_relative_position_bias=True, **changes)  # 5x4 patches, an odd grid
    model = make(workloads.model_class(task), config, "float32", backend)
    entries = {}
    model.ops = watched(model.ops, entries)
    x = np.random.default_rng(0).standard_normal((2, 3, 20, 16), dtype=np.float32)
    model(x)
    counted = sum(entry.operations for entry in entries.values())
    assert counted == flops.total(config, workloads.TASKS[task][0], batch_size=2) > 0


def test_a_profile_accounts_for_the_time_and_leaves_the_model_as_it_was():
    model = make(workloads.model_class("classification"), tiny_config(), "float32")
    ops, x = model.ops, np.ones((1, 3, 12, 8), np.float32)
    entries, seconds = profile(model, x, runs=3)
    assert model.ops is ops
    assert entries["attention"].calls == 2 and entries["layer_norm"].calls == 5
    assert 0 < sum(entry.seconds for entry in entries.values()) <= seconds
    rows = report.profile_rows(entries, seconds)
    assert len({len(row) for row in rows}) == 1 and rows[-1][0] == "everything else"


# Measuring ----------------------------------------------------------------------------------------------------------


def test_turns_rotate_and_every_run_is_kept(monkeypatch):
    monkeypatch.setattr(worker, "PAUSE", 0)
    order = []
    runners = {name: (lambda x, name=name: order.append(name)) for name in "abc"}
    times = worker.take_turns(runners, None, 3)
    assert "".join(order) == "abc" + "bca" + "cab"
    assert {len(values) for values in times.values()} == {3} and min(map(min, times.values())) > 0


def test_outputs_are_compared_and_zeros_refused():
    x = np.array([[3.0, -4.0]])
    found = worker.differences({"one": x, "two": x * 1.5})
    assert found == {"one": 0.0, "two": pytest.approx(0.5)}
    with pytest.raises(ValueError, match="one: the output has RMS 0"):
        worker.differences({"one": 0 * x, "two": x})
    with pytest.raises(ValueError, match="one: the output has RMS nan"):
        worker.differences({"one": np.nan * x, "two": x})
    with pytest.raises(ValueError, match=r"two: expected an output of shape \(1, 2\)"):
        worker.differences({"one": x, "two": x[:, :1]})


@pytest.mark.parametrize("difference", [1e-3, float("nan")])
def test_nothing_is_timed_when_outputs_disagree(monkeypatch, tmp_path, difference):
    jobs = []

    def lines(job, threads):  # in this process, so that the contestants can be made to disagree
        jobs.append(job.copy())
        return list(worker.JOBS[job.pop("job")](**job))

    monkeypatch.setattr(measure, "_lines", lines)
    monkeypatch.setattr(worker, "differences", lambda outputs: {"numba": 0.0, "numpy": difference})
    monkeypatch.setattr(worker, "take_turns", lambda *a: pytest.fail("timed"))
    with pytest.raises(ValueError, match="the output of minibeit numpy differs from minibeit numba"):
        measure.measure(DIGITS, Plan(("numba", "numpy"), 1), tmp_path, lambda message: None)
    assert [job["job"] for job in jobs] == ["interleaved"] and jobs[0]["agree"] == measure.AGREE


def test_a_suite_that_fails_prints_what_it_has_measured(monkeypatch, capsys):
    """The first workload's figures are printed though the second's contestants disagree."""
    shapes = [
        ("classification", "digits", None, 1, ("numpy",), 0),
        ("classification", "digits", None, 2, ("numpy",), 0),
    ]
    monkeypatch.setitem(bench.SUITES, "readme", shapes)
    answers = iter([table(), ValueError("they disagree")])

    def answer(*args):
        found = next(answers)
        if isinstance(found, ValueError):
            raise found
        return found

    monkeypatch.setattr(measure, "measure", answer)
    with pytest.raises(ValueError, match="they disagree"):
        bench.run(parse("--suite", "readme"))
    assert DIGITS.name in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="getrusage of a child counts its parent's memory on Linux only")
def test_peak_memory_is_the_process_own():
    code = "from minibeit.bench.worker import peak_rss; print(peak_rss())"
    ballast = np.ones(400_000_000, np.uint8)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env=measure._environment(1))  # fmt: skip
    assert 5e6 < int(child.stdout) < 200e6 < ballast.nbytes < worker.peak_rss()


def test_a_failing_process_is_one_sentence(tmp_path):
    job = dict(job="once", name="numpy", workload=DIGITS.to_dict(), folder=str(tmp_path), exports="", threads=1)
    line = measure._lines(job, 1)[-1]
    assert line["error"].startswith("FileNotFoundError: ") and str(tmp_path) in line["error"]


@pytest.mark.skipif(not roof.available(), reason="the roof needs numba's compiler")
def test_the_roof_is_plausible():
    rates = [roof.measure(1) for _ in range(3)]
    assert 1e8 < max(rates) < 1e12  # a CPU core of these years


def test_random_weights_leave_nothing_to_skip(tmp_path):
    """No tensor of zeros, and an output that depends on the picture."""
    workload = workloads.make("segmentation", "digits", 16, 2)
    model = workloads.model_class("segmentation").from_pretrained(
        workloads.write_checkpoint(workload, tmp_path), backend="numpy"
    )
    for name, array in model.arrays.items():
        assert np.abs(array).max() > 0.05, name
    logits = model(workloads.pixels(workload)).logits
    assert logits.shape == (2, 150, 16, 16)
    assert 0.01 < np.std(logits[0] - logits[1]) < 100


# Reports ------------------------------------------------------------------------------------------------------------

RESULT_KEYS = {
    "contestant", "versions", "median_s", "min_s", "times_s", "images_per_s", "gflops", "share_of_roof",
    "relative_rms_from_first", "peak_rss_mb", "peak_device_mb", "cold_start_s", "cold_starts_s",
}  # fmt: skip
WORKLOAD_KEYS = {
    "task", "size", "image_size", "batch_size", "training", "threads", "dtype", "gflop", "roof_gflops",
    "skipped", "results",
}  # fmt: skip


def test_json_has_every_number(tmp_path):
    report.write_json(tmp_path / "bench.json", measure.machine(), [table()])
    document = json.loads((tmp_path / "bench.json").read_text())
    assert set(document) == {"minibeit_bench", "machine", "workloads"}
    assert {"cpu", "cores", "system", "python", "time"} <= set(document["machine"])
    (found,) = document["workloads"]
    assert set(found) == WORKLOAD_KEYS
    assert found["roof_gflops"] == {"median": 3.0, "best": 4.0} and found["gflop"] == 0.01
    ours, theirs = found["results"]
    assert set(ours) == set(theirs) == RESULT_KEYS
    assert ours["median_s"] == 0.02 and ours["min_s"] == 0.01 and ours["images_per_s"] == 50
    assert ours["gflops"] == pytest.approx(0.5) and ours["share_of_roof"] == pytest.approx(0.5 / 3)
    assert ours["peak_rss_mb"] == 300 and ours["cold_start_s"] == 0.6
    assert theirs["peak_rss_mb"] is None and theirs["cold_start_s"] is None
    without = table(roofs=()).to_dict()
    assert without["results"][0]["share_of_roof"] is None and without["roof_gflops"]["best"] is None


def test_tables_compare_with_the_first():
    rows = report.rows(table())
    assert rows[0] == ("minibeit numba", "20", "10", "1.00", "50", "0", "17 %", "300", "0.60")
    assert rows[1] == ("PyTorch eager", "40", "30", "2.00", "25", "0", "8 %", "", "")
    text = report.markdown(measure.machine(), [table()])
    lines = text.splitlines()
    assert {line.count("|") for line in lines[:4]} == {lines[0].count("|")}
    assert lines[2].startswith("| digits 32 classification | **minibeit numba** | 20 |")
    assert "cannot be exported" in text and "medians of 3 rounds" in text


def test_the_chart_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    report.write_plot(tmp_path / "bench.png", measure.machine(), [table(), table()])
    assert (tmp_path / "bench.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_chart_without_matplotlib_names_the_extra_before_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "minibeit\[tutorials\]"'):
        bench.run(parse("--plot", "x.png"))


# The command --------------------------------------------------------------------------------------------------------


def test_the_command_measures_the_numpy_backend(tmp_path, capsys):
    words = ("--size", "digits", "--image-size", 16, "--batch-size", 1, 2, "--threads", 1, "--backend", "numpy")
    words += ("--against", "none", "--repeats", 2, "--profile", "--json", tmp_path / "o.json", "--folder", tmp_path)
    assert bench.run(parse(*words)) == 0
    text = capsys.readouterr().out
    assert "digits 16 classification: 0.0 GFLOP, 1 threads" in text and "digits 16 classification x 2:" in text
    assert "linear_activation" in text and "everything else" in text
    document = json.loads((tmp_path / "o.json").read_text())
    assert [w["batch_size"] for w in document["workloads"]] == [1, 2]
    for found in document["workloads"]:
        (result,) = found["results"]
        assert result["contestant"] == "numpy" and len(result["times_s"]) == 2
        assert 0 < result["min_s"] <= result["median_s"] < result["cold_start_s"]


def test_peers_that_are_not_installed_are_left_out_with_a_line(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        contestants.importlib.util, "find_spec", lambda name: None if name in ("torch", "openvino") else real(name)
    )
    said = []
    assert measure.choose_peers(None, said.append) == ()
    assert len(said) == 3 and "PyTorch eager is left out: torch" in said[0]
    with pytest.raises(ImportError, match=r"--against openvino needs openvino and torch.*pip install openvino torch"):
        measure.choose_peers(["openvino"], said.append)


def test_unknown_peers_and_impossible_sizes():
    with pytest.raises(ValueError, match="--against: expected none or some of torch, onnxruntime, openvino"):
        bench.run(parse("--against", "jax"))
    with pytest.raises(UsageError, match="--image-size: expected a multiple of the patch size 16, found 225"):
        bench.run(parse("--image-size", 225))


def test_a_peer_that_cannot_be_exported_is_left_out_unless_asked_for(monkeypatch, tmp_path):
    def lines(job, *_):
        if job["job"] == "export":
            return [{"error": "RuntimeError: no such operator"}]
        return [{"differences": {"numpy": 0.0}}, {"times": {"numpy": [1.0]}, "roofs": []}]

    monkeypatch.setattr(measure, "_lines", lines)
    names = ("numpy", "openvino")
    found = measure.measure(DIGITS, Plan(names, 1, starts=0), tmp_path, lambda message: None)
    assert found.skipped == ["OpenVINO: cannot be exported (RuntimeError: no such operator)"]
    assert [result.name for result in found.results] == ["numpy"]
    with pytest.raises(ValueError, match="OpenVINO: digits 32 classification cannot be exported"):
        measure.measure(DIGITS, Plan(names, 1, starts=0, explicit=True), tmp_path, lambda message: None)


@pytest.mark.parametrize(
    "words",
    [("--train",), ("--task", "classification"), ("--size", "base"), ("--image-size", "32"), ("--batch-size", "1"),
     ("--against", "none"), ("--cold-start",), ("--backend", "numpy")],
)  # fmt: skip
def test_options_that_a_suite_does_not_heed_are_refused(words):
    with pytest.raises(UsageError, match=f"--suite says itself what is measured, so {words[0]} does not go with it"):
        bench.run(parse("--suite", "readme", *words))


def test_times_and_bars_are_two_files(tmp_path):
    with pytest.raises(UsageError, match="is to be written twice"):
        bench.run(parse("--json", tmp_path / "a.png", "--plot", tmp_path / "a.png"))


def test_the_suite_is_the_table_of_the_readme(monkeypatch):
    monkeypatch.setattr(measure, "missing", lambda name, *_: [] if name == "torch" else [name])
    races = bench._suite(parse("--suite", "readme", "--threads", 2))
    names = [workload.name for workload, _ in races]
    assert names == [
        "base 224 classification",
        "base 224 classification x 8",
        "base 224 classification x 32",
        "large 224 classification",
        "base 384 classification",
        "base 640 segmentation",
    ]
    assert all({"numba", "torch"} <= set(plan.contestants) <= {"numba", "numpy", "torch"} for _, plan in races)


# Low precision ------------------------------------------------------------------------------------------------------


def test_low_precision_is_measured_beside_float32(monkeypatch):
    monkeypatch.setattr(measure, "missing", lambda name, dtype="float32": ["nncf"] if name == "openvino" else [])
    said = []
    assert measure.choose_peers(None, said.append, dtype="int8") == ("onnxruntime",)
    assert said == ["OpenVINO is left out: nncf not installed"]
    with pytest.raises(
        ValueError, match="--against: expected none or some of torch, openvino in bfloat16, found 'onnx"
    ):
        measure.choose_peers(["onnxruntime"], said.append, dtype="bfloat16")
    ((workload, plan),) = bench._races(parse("--dtype", "int8", "--size", "digits", "--against", "none"))
    assert plan.contestants == ("numba-float32", "numba") and plan.dtype == "int8"
    assert contestants.label("numba-float32") == "minibeit numba, float32"


def test_float32_and_int8_of_the_same_weights(tmp_path):
    pytest.importorskip("numba")
    folder = workloads.write_checkpoint(DIGITS, tmp_path)
    x = workloads.pixels(DIGITS)
    outputs = {
        name: contestants.load(name, DIGITS, folder, tmp_path, 1, "int8")(x) for name in ("numba-float32", "numba")
    }
    found = worker.differences(outputs)
    assert found["numba-float32"] == 0 and 1e-4 < found["numba"] < low_precision.AGREE["int8"]
