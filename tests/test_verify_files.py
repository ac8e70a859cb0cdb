"""Traces, golden packs, weights and published outputs on disk, and what is said about the wrong ones."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import actual_sums, listed_sums
from conftest import random_weights, tiny_config
from verify_plant import job, model_of

from minibeit import BeitForImageClassification, CheckpointError, Trace
from minibeit.catalogue import weights_folder
from minibeit.checkpoint.formats import write_safetensors
from minibeit.checkpoint.save import save_checkpoint
from minibeit.task_table import CLASSES
from minibeit.verify import published
from minibeit.verify.golden_pack import export_golden
from minibeit.verify.lockstep import Job, check
from minibeit.verify.published import check_published
from minibeit.verify.report_text import verdict
from minibeit.verify.trace_file import FORMAT, TraceFile, misfits, save_trace, weights_hash
from minibeit.verify.weights import compare_weights, describe


def saved(made: Job, path, **options):
    model = model_of(made)
    save_trace(path, made, lambda trace: model(**made.inputs, trace=trace), "me", **options)
    return TraceFile(path)


# Traces -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", CLASSES)
def test_a_trace_comes_back_as_it_was(task, tmp_path):
    made, trace = job(task), Trace()
    model_of(made)(**made.inputs, trace=trace)
    stored = saved(made, tmp_path / "t.safetensors")
    assert list(stored) == list(trace) or set(stored) == set(trace)
    for name, array in trace.items():
        assert np.array_equal(stored[name], array), name
    for name, array in made.inputs.items():
        assert np.array_equal(stored.inputs[name], array)
        assert stored.inputs[name].dtype == array.dtype
    assert misfits(stored, made) == []
    assert check(made, stored.source()).ok
    assert stored.metadata["format"] == FORMAT
    assert json.loads(stored.metadata["versions"])["numpy"] == np.__version__
    assert stored.config.to_dict() == made.config.to_dict()


def test_safetensors_package_reads_a_trace(tmp_path):
    from safetensors.numpy import load_file

    made = job("image_classification")
    stored = saved(made, tmp_path / "t.safetensors", select="encoder.*.output")
    plain = load_file(tmp_path / "t.safetensors")
    assert set(plain) == {"input.pixel_values", *(f"encoder.{i}.output" for i in range(3))}
    assert np.array_equal(plain["encoder.2.output"], stored["encoder.2.output"])


def test_a_foreign_trace_needs_only_the_format(tmp_path):
    made, trace = job("image_classification"), Trace()
    model_of(made)(**made.inputs, trace=trace)
    write_safetensors(tmp_path / "t.safetensors", dict(trace), {"format": FORMAT})
    stored = TraceFile(tmp_path / "t.safetensors")
    assert misfits(stored, made) == []
    assert check(made, stored.source()).ok


def test_bfloat16_traces_are_held_to_bfloat16(tmp_path):
    made, trace = job("image_classification"), Trace()
    model_of(made)(**made.inputs, trace=trace)
    write_safetensors(tmp_path / "t.safetensors", dict(trace), {"format": FORMAT}, dtype="bfloat16")
    report = check(made, TraceFile(tmp_path / "t.safetensors").source())
    assert {row.dtype for row in report.rows} == {"bfloat16"}
    assert report.ok, verdict(report)


def test_wrong_traces_are_told_apart(tmp_path):
    made = job("image_classification")
    stored = saved(made, tmp_path / "t.safetensors")

    def said(other: Job) -> str:
        (sentence,) = misfits(stored, other)
        assert str(tmp_path / "t.safetensors") in sentence
        return sentence

    assert "another model" in said(replace(made, task="model"))
    other = made.config.replace(layer_norm_eps=1e-6)
    assert "another config: layer_norm_eps is 1e-12, here 1e-06" in said(replace(made, config=other))
    pixels = made.inputs["pixel_values"]
    assert "another image" in said(replace(made, inputs={"pixel_values": pixels + np.float32(0.5)}))
    assert "another resolution" in said(replace(made, inputs={"pixel_values": pixels[:, :, :8]}))
    arrays = dict(made.arrays)
    arrays["classifier.bias"] = arrays["classifier.bias"] + 1
    assert "other weights" in said(replace(made, arrays=arrays))


def test_files_that_are_no_traces(tmp_path):
    made = job("image_classification")
    path = tmp_path / "t.safetensors"
    saved(made, path)
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 3):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"t\.safetensors"):
            TraceFile(path)
    write_safetensors(path, {"a": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match="is not a trace"):
        TraceFile(path)
    write_safetensors(path, {"layer1": np.zeros(2, np.float32)}, {"format": FORMAT})
    assert "has a name that this model records" in misfits(TraceFile(path), made)[0]
    with pytest.raises(FileNotFoundError):
        TraceFile(tmp_path / "nothing.safetensors")
    write_safetensors(path, {"logits": np.zeros(2, np.float32)}, {"format": FORMAT, "config": "{]"})
    with pytest.raises(ValueError, match="config in its metadata"):
        misfits(TraceFile(path), made)


def test_a_run_that_lacks_an_array_leaves_no_file(tmp_path):
    made = job("image_classification")
    with pytest.raises(ValueError, match="made no array called embeddings"):
        save_trace(tmp_path / "t.safetensors", made, lambda trace: None, "nobody")
    assert list(tmp_path.iterdir()) == []


def test_weights_hash_depends_on_every_number():
    arrays = {"a": np.arange(3, dtype=np.float32), "b": np.ones(2, np.float32)}
    same = dict(reversed(arrays.items()))
    assert weights_hash(arrays) == weights_hash(same)
    assert weights_hash(arrays) != weights_hash({**arrays, "b": np.array([1, 1 + 1e-7], np.float32)})


# Golden packs -------------------------------------------------------------------------------------------------------


def test_a_golden_pack_verifies_itself_and_a_port(tmp_path):
    made = job("semantic_segmentation")
    folder = export_golden(tmp_path / "pack", made, "some/model")
    assert listed_sums(folder) == actual_sums(folder)
    truth, single = (TraceFile(folder / f"{dtype}.safetensors") for dtype in ("float64", "float32"))
    assert {truth.dtypes[name] for name in truth} == {"float64"}
    assert {single.dtypes[name] for name in single} == {"float32"}
    exact = check(made, truth.source())
    assert exact.ok
    assert max(row.total.rms_rel for row in exact.rows) == 0
    assert check(made, single.source()).ok
    assert "decode_head.fpn_bottleneck" in (folder / "README.md").read_text()
    listed = json.loads((folder / "weights.json").read_text())
    assert set(listed["tensors"]) == set(made.arrays)


# Two checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """Two folders with the same checkpoint."""
    config = tiny_config(use_relative_position_bias=True)
    arrays = random_weights(config, "image_classification", 0, "float32")
    for name in ("a", "b"):
        save_checkpoint(
            tmp_path / name,
            config.replace(architectures=["BeitForImageClassification"]),
            "image_classification",
            arrays,
        )
    return tmp_path, config, arrays


def test_equal_checkpoints_have_equal_bits(two):
    folder, _, arrays = two
    report = compare_weights(folder / "a", folder / "b")
    assert report.ok
    assert len(report.pairs) == len(arrays)
    assert "equal, bit for bit" in describe(report)


def test_differences_are_named_and_explained(two):
    folder, config, arrays = two
    changed = dict(arrays)
    query, key = "beit.encoder.0.attention.query.weight", "beit.encoder.0.attention.key.weight"
    changed[query] = np.ascontiguousarray(arrays[query].T)
    changed[key] = arrays[key].astype(np.float16).astype(np.float32)
    changed["classifier.bias"] = arrays["classifier.bias"] + np.float32(0.5)
    config = config.replace(architectures=["BeitForImageClassification"], layer_norm_eps=1e-6)
    save_checkpoint(folder / "b", config, "image_classification", changed)
    report = compare_weights(folder / "a", folder / "b")
    assert not report.ok
    by_name = {pair.name: pair for pair in report.pairs if pair.status != "equal bits"}
    assert set(by_name) == {query, key, "classifier.bias"}
    assert by_name[query].note == "one is the transpose of the other"
    assert by_name[key].note == "B is rounded to float16"
    assert by_name["classifier.bias"].max_abs == pytest.approx(0.5)
    text = describe(report)
    assert "layer_norm_eps: 1e-12 in A, 1e-06 in B" in text
    assert f"3 of {len(arrays)} tensors differ" in text


def test_dialects_do_not_matter(two):
    from minibeit.checkpoint.names import DIALECTS, Naming

    folder, config, arrays = two
    (folder / "plain").mkdir()
    naming = Naming(DIALECTS["transformers5"], "beit.")
    named = {naming.place(name).name: array for name, array in arrays.items()}
    write_safetensors(folder / "plain" / "model.safetensors", named)
    config.replace(architectures=["BeitForImageClassification"]).save_pretrained(folder / "plain")
    assert compare_weights(folder / "a", folder / "plain").ok


# Published outputs --------------------------------------------------------------------------------------------------


def test_published_outputs_of_a_stand_in(two, monkeypatch):
    folder, config, arrays = two
    model = BeitForImageClassification(config, arrays=arrays, backend="numpy")
    plain = np.full((1, 3, *config.image_shape), 0.5, np.float32)
    trace = Trace()
    logits = model(plain, trace=trace).logits
    case = {"image": published.PLAIN, "values": logits[0, :3].tolist(), "tolerance": 1e-4, "source": "a stand-in"}
    entry = {
        "task": "image_classification",
        "preprocessing": None,
        "expected": [
            {**case, "argmax": int(logits.argmax()), "shape": [1, 5]},
            {**case, "output": "sum of pooler_output", "values": float(trace["pooler"].sum())},
            {
                **case,
                "output": "sum of last_hidden_state",
                "values": float(trace["encoder.1.output"].sum()),
                "tolerance": None,
            },
            {**case, "image": "a picture that is not here"},
        ],
    }
    monkeypatch.setattr(published, "resolve", lambda id: folder / "a")
    monkeypatch.setattr(published.catalogue, "manifest", lambda: {"stand/in": entry})
    assert [o.status for o in check_published("stand/in", backend="numpy")] == ["ok", "ok", "ok", "skipped"]
    entry["expected"][0]["values"][1] += 0.01
    entry["expected"][1]["argmax"] = (int(logits.argmax()) + 1) % 5
    first, second, *_ = check_published("stand/in", backend="numpy")
    assert first.status == second.status == "differs"
    assert "tolerance 0.0001" in first.text
    assert "published" in second.text
    with pytest.raises(ValueError, match="not in the manifest"):
        check_published("no/where")


def test_published_outputs_that_need_a_picture(two, monkeypatch, rng):
    from minibeit import BeitImageProcessor

    folder, config, arrays = two
    image = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    settings = {"size": {"height": 12, "width": 8}, "do_center_crop": False}
    pixels = BeitImageProcessor(**settings)(image, return_tensors="np")["pixel_values"]
    logits = BeitForImageClassification(config, arrays=arrays, backend="numpy")(pixels).logits
    case = {"image": "a cat", "values": logits[0, :3].tolist(), "tolerance": 1e-4, "source": "me"}
    entry = {"task": "image_classification", "preprocessing": settings, "expected": [case]}
    monkeypatch.setattr(published, "resolve", lambda id: folder / "a")
    assert [o.status for o in check_published("stand/in", None, "numpy", entry)] == ["skipped"]
    assert [o.status for o in check_published("stand/in", image, "numpy", entry)] == ["ok"]
    assert [o.status for o in check_published("stand/in", image[::-1], "numpy", entry)] == ["differs"]


def test_what_only_one_checkpoint_has_is_a_difference(two):
    folder, config, arrays = two
    fewer = {name: array for name, array in arrays.items() if not name.startswith("classifier")}
    save_checkpoint(folder / "b", config.replace(architectures=["BeitModel"]), "image_classification", fewer)
    report = compare_weights(folder / "a", folder / "b")
    assert {pair.name: pair.status for pair in report.pairs if pair.status != "equal bits"} == {
        "classifier.weight": "only in A",
        "classifier.bias": "only in A",
    }
    assert not report.ok
    wider = {**arrays, "classifier.weight": np.zeros((7, 12), np.float32), "classifier.bias": np.zeros(7, np.float32)}
    save_checkpoint(folder / "b", config.replace(num_labels=7), "image_classification", wider)
    notes = {
        pair.name: pair.note for pair in compare_weights(folder / "a", folder / "b").pairs if pair.status == "shape"
    }
    assert notes == {"classifier.weight": "A has (5, 12), B has (7, 12)", "classifier.bias": "A has (5,), B has (7,)"}


# The page -----------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "verify.md").read_text(encoding="utf-8")


def test_the_trace_of_the_page_is_written_and_judged(tmp_path, monkeypatch, capsys):
    from minibeit.cli import main

    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in program.split("write_trace(\n")[0].splitlines() if line.strip()]) <= 30
    (tmp_path / "digits").symlink_to(weights_folder() / "digits")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "docs/verify.md", "exec"), {})
    assert main(["verify", "--against", "theirs.safetensors", "-q"]) == 0
    said = capsys.readouterr().out
    assert "2 arrays of a port in NumPy are within the error budget" in said
    assert "Nothing after embeddings was looked at" in said


def test_the_page_explains_every_name():
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    explained = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    made = {name for task in CLASSES for name in job(task).shapes()}
    kinds = {re.sub(r"^encoder\.\d+", "encoder.*", name) for name in made}
    kinds = {name if name == "fpn.0.hidden" else re.sub(r"\.\d+$", ".i", name) for name in kinds}
    assert len(kinds) > 25
    assert sorted(kinds - explained) == []
