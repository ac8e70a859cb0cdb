"""`minibeit features` and `minibeit inspect`: arrays in files, and what is in a checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cli_helpers import config, run, save, save_pictures
from safetensors import safe_open

from minibeit import BeitImageProcessor, BeitModel
from minibeit.checkpoint.formats import read_tensors, write_safetensors
from minibeit.cli.loading import shipped_checkpoint
from minibeit.params import count_parameters


def expected_states(checkpoint, paths):
    pixels = BeitImageProcessor.from_pretrained(checkpoint)([str(path) for path in paths]).pixel_values
    return BeitModel.from_pretrained(checkpoint, dtype="float64")(pixels, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("kind", ["bare", "classify", "segment", "mask"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("pool, layer", [("mean", -1), ("cls", 2), ("none", 0)])
@pytest.mark.filterwarnings("ignore:.*another task")  # of the BeitModel that says what is expected
def test_features_are_hidden_states(capsys, tmp_path, kind, suffix, pool, layer):
    folder = save(tmp_path / "model", kind)
    paths = save_pictures(tmp_path, "a.png", "b.png", "c.png")
    output = tmp_path / f"features{suffix}"
    words = ["--pool", pool, "--layer", layer, "-b", 2, "--dtype", "float64", "-o", output]
    code, out, err = run(capsys, "features", *paths, "-m", folder, *words)
    assert code == 0 and not err and str(output) in out
    states = expected_states(folder, paths)[layer]
    expected = {"mean": states[:, 1:].mean(axis=1), "cls": states[:, 0], "none": states}[pool]
    if suffix == ".npz":
        with np.load(output) as file:
            features, files, facts = file["features"], list(file["files"]), {k: str(file[k]) for k in ("layer", "pool")}
    else:
        with safe_open(output, "np") as file:
            features, facts = file.get_tensor("features"), file.metadata()
            files = json.loads(facts["files"])
    np.testing.assert_allclose(features, expected, rtol=1e-10, atol=1e-12)
    assert files == [str(path) for path in paths]
    assert facts["pool"] == pool and facts["layer"] == str(layer % 5)


def test_bad_pictures_have_no_row_and_an_empty_result_no_file(capsys, tmp_path):
    folder = save(tmp_path / "model", "bare")
    (good,) = save_pictures(tmp_path, "a.png")
    output = tmp_path / "f.npz"
    code, _, err = run(capsys, "features", tmp_path / "gone.png", "-m", folder, "-o", output)
    assert code == 1 and not output.exists() and "gone.png" in err
    code, _, err = run(capsys, "features", tmp_path / "gone.png", good, "-m", folder, "-o", output)
    with np.load(output) as file:
        assert code == 1 and file["features"].shape == (1, 16) and list(file["files"]) == [str(good)]


def test_features_of_different_shapes_do_not_share_a_file(capsys, tmp_path):
    folder = save(tmp_path / "model", "bare")
    BeitImageProcessor(do_resize=False).save_pretrained(folder)
    (a,), (b,) = save_pictures(tmp_path, "a.png", size=(16, 16)), save_pictures(tmp_path, "b.png", size=(8, 16))
    code, _, err = run(capsys, "features", a, b, "-m", folder, "-o", tmp_path / "f.npz", "--pool", "none")
    assert code == 1 and err.startswith(f"minibeit: {b}: its features have shape (9, 16)")
    assert run(capsys, "features", a, b, "-m", folder, "-o", tmp_path / "f.npz")[0] == 0


def test_wrong_options_of_features_are_exit_code_2(capsys, tmp_path):
    folder = save(tmp_path / "model", "bare")
    (path,) = save_pictures(tmp_path, "a.png")
    for words, part in (
        (["-o", tmp_path / "f.txt"], ".safetensors"),
        (["-o", tmp_path / "f.npz", "--layer", "5"], "0 to 4"),
        (["-o", tmp_path / "f.npz", "--layer", "-6"], "0 to 4"),
        (["-o", tmp_path / "none" / "f.npz"], "does not exist"),
    ):
        code, out, err = run(capsys, "features", path, "-m", folder, *words)
        assert code == 2 and not out and err.count("\n") == 1 and part in err
    assert not (tmp_path / "f.npz").exists()


@pytest.mark.parametrize(
    "kind, task",
    [
        ("bare", "model"),
        ("classify", "image_classification"),
        ("segment", "semantic_segmentation"),
        ("mask", "masked_image_modeling"),
    ],
)
def test_inspect_says_what_is_there(capsys, tmp_path, kind, task):
    folder = save(tmp_path / "model", kind)
    code, out, err = run(capsys, "inspect", folder, "--json")
    facts = json.loads(out)
    assert code == 0 and not err and facts["fits"] and facts["task"] == facts["made_for"] == task
    tensors = read_tensors(folder)
    assert {t["name"]: (tuple(t["shape"]), t["dtype"]) for t in facts["tensors"]} == {
        name: (tensors.info(name).shape, tensors.info(name).dtype) for name in tensors
    }
    assert facts["numbers"] == sum(array.size for array in tensors.values())
    assert facts["parameters"] == count_parameters(
        config(
            **(
                {"use_mask_token": True}
                if kind == "mask"
                else {"out_indices": [1, 2, 3, 4]}
                if kind == "segment"
                else {"use_relative_position_bias": kind == "classify"}
            )
        ),
        task,
    )
    assert facts["config"]["hidden_size"] == 16 and facts["format"] == "safetensors" and facts["dialect"] == "hub"
    code, out, _ = run(capsys, "inspect", folder)
    assert code == 0 and "everything fits" in out and all(name in out for name in tensors)
    code, brief, _ = run(capsys, "inspect", folder, "--summary")
    assert code == 0 and "everything fits" in brief and "layernorm_before" not in brief


def test_inspect_lists_what_does_not_fit(capsys, tmp_path):
    folder = save(tmp_path / "model", "classify")
    file = folder / "model.safetensors"
    tensors = {name: np.array(array) for name, array in read_tensors(file).items()}
    del tensors["classifier.bias"]
    tensors["classifier.weight"] = tensors["classifier.weight"].T
    tensors["stranger"] = np.zeros(3, np.float16)
    write_safetensors(file, tensors)
    code, out, err = run(capsys, "inspect", folder, "--json")
    facts = json.loads(out)
    assert code == 1 and not err and not facts["fits"]
    assert facts["missing"] == ["classifier.bias"] and facts["unexpected"] == ["stranger"]
    assert facts["mismatched"] == ["classifier.weight: expected shape (4, 16), found (16, 4)"]
    code, out, _ = run(capsys, "inspect", folder)
    assert code == 1 and "missing: 1" in out and "  stranger\n" in out and "float16" in out and "fits" not in out


def test_inspect_checks_for_another_task_when_asked(capsys, tmp_path):
    folder = save(tmp_path / "model", "mask")
    code, out, _ = run(capsys, "inspect", folder, "--task", "image_classification", "--json")
    facts = json.loads(out)
    assert code == 1 and facts["made_for"] == "masked_image_modeling" and "classifier.weight" in facts["missing"]


def test_inspect_shows_tensors_that_are_no_beit_or_have_a_broken_config(capsys, tmp_path):
    write_safetensors(tmp_path / "other.safetensors", {"conv.weight": np.zeros((2, 3))})
    code, out, _ = run(capsys, "inspect", tmp_path / "other.safetensors")
    assert code == 1 and "conv.weight" in out and "does not fit: " in out
    folder = save(tmp_path / "model", "classify")
    (folder / "config.json").write_text("{")
    code, out, _ = run(capsys, "inspect", folder)
    assert code == 1 and "classifier.weight" in out and "config.json" in out


def test_inspect_without_config_says_what_it_assumed(capsys, tmp_path):
    folder = save(tmp_path / "model", "classify")
    (folder / "config.json").unlink()
    code, out, err = run(capsys, "inspect", folder, "--summary")
    assert code == 0 and not err and "inferred from the tensors" in out and "image classification" in out


def test_inspect_refuses_what_is_no_checkpoint_in_one_line(capsys, tmp_path):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name in ("text", "empty", "gone"):
        code, out, err = run(capsys, "inspect", tmp_path / name)
        assert code == 1 and not out and err.count("\n") == 1 and name in err


def test_inspect_the_shipped_checkpoint(capsys):
    code, out, _ = run(capsys, "inspect", shipped_checkpoint())
    assert code == 0 and "image classification" in out and "everything fits" in out
