"""The Flax calling convention, against goldens from the real Flax classes of transformers 4."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import minibeit

GOLDEN = Path(__file__).parent / "data" / "golden_flax.safetensors"
# JAX float32's own distance from our float64 run, as RMS relative to the RMS of the tensor, is at most 2.2e-7 here
# (ours: 2.3e-7); two such runs may lie the sum of both apart.
TOLERANCE = 4.5e-7

with safe_open(GOLDEN, "np") as _file:
    TENSORS = {name: _file.get_tensor(name) for name in _file.keys()}  # noqa: SIM118 (it is no dict)
    META = _file.metadata()
VARIANTS = json.loads(META["variants"])


def nested(prefix: str) -> dict:
    tree: dict = {}
    for name, array in TENSORS.items():
        if name.startswith(prefix):
            *path, last = name[len(prefix) :].split("/")
            node = tree
            for word in path:
                node = node.setdefault(word, {})
            node[last] = array
    return tree


def adapter(variant: str, dtype: str = "float32", **options):
    class_name, changes = VARIANTS[variant]
    config = minibeit.BeitConfig.from_dict({**json.loads(META["settings"]), **changes})
    return getattr(minibeit, class_name)(config, dtype=dtype, backend="numpy", **options)


def run(variant: str, dtype: str = "float32", **options):
    mask = {"bool_masked_pos": TENSORS["bool_masked_pos"]} if variant in ("model", "mim") else {}
    return adapter(variant, dtype, _do_init=False)(
        TENSORS["pixel_values"], params=nested(f"{variant}/params/"), **mask, **options
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_equal_those_of_flax(variant, dtype):
    out = run(variant, dtype, output_hidden_states=True, output_attentions=True)
    compared = 0
    for name, expected in TENSORS.items():
        if name.startswith(f"{variant}/out/"):
            key, index = name.rsplit("/", 1)[1].split(".")
            value = out[key][int(index)] if isinstance(out[key], tuple) else out[key]
            distance = np.sqrt(np.mean(np.square(value - expected, dtype=float)) / np.mean(np.square(expected)))
            assert distance < TOLERANCE, (name, distance)
            compared += 1
    assert compared == len(out["hidden_states"]) + len(out["attentions"]) + len(out) - 2


def test_output_classes_have_flax_names_and_no_loss():
    assert type(run("model")).__name__ == "FlaxBeitModelOutputWithPooling"
    assert run("mim").keys() == ["logits"]
    assert type(run("classifier")).__name__ == "FlaxSequenceClassifierOutput"


def test_a_tuple_leaves_hidden_states_and_attentions_out():
    out = run("model", return_dict=False, output_hidden_states=True, output_attentions=True)
    assert [array.shape for array in out] == [(2, 10, 16), (2, 16)]
    assert len(run("classifier", return_dict=False)) == 1


def test_own_params_are_used_without_params_and_are_in_flax_layout():
    model = adapter("classifier")
    assert model.params["beit"]["embeddings"]["patch_embeddings"]["projection"]["kernel"].shape == (4, 4, 3, 16)
    assert model.params["classifier"]["kernel"].shape == (16, 5)
    x = TENSORS["pixel_values"]
    np.testing.assert_array_equal(model(x).logits, model(x, params=model.params).logits)
    other = nested("classifier/params/")
    model.params = other
    np.testing.assert_array_equal(model(x).logits, run("classifier").logits)


def test_round_trip_through_a_folder(tmp_path):
    model = adapter("mim")
    model.save_pretrained(tmp_path)
    again = minibeit.FlaxBeitForMaskedImageModeling.from_pretrained(tmp_path, backend="numpy")
    x = TENSORS["pixel_values"]
    np.testing.assert_array_equal(model(x).logits, again(x).logits)


def test_training_needs_a_generator_and_repeats_with_the_same_one():
    model = adapter("classifier")
    assert model.config.drop_path_rate == 0.1
    x = TENSORS["pixel_values"]
    with pytest.raises(ValueError, match="dropout_rng"):
        model(x, train=True)
    first, second = (model(x, train=True, dropout_rng=np.array([0, 7], np.uint32)).logits for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_mask_of_a_classifier_is_ignored():
    model = adapter("classifier")
    x = TENSORS["pixel_values"]
    np.testing.assert_array_equal(model(x, TENSORS["bool_masked_pos"]).logits, model(x).logits)


def test_wrong_params_are_named():
    params = nested("classifier/params/")
    del params["classifier"]["kernel"]
    params["lm_head"] = {"bias": np.zeros(3)}
    with pytest.raises(ValueError, match=r"1 are missing \(classifier/kernel\), and 1 have no place \(lm_head/bias\)"):
        adapter("classifier")(TENSORS["pixel_values"], params=params)
    params = nested("classifier/params/")
    params["classifier"]["kernel"] = params["classifier"]["kernel"].T
    with pytest.raises(ValueError, match=r"classifier/kernel should have shape \(16, 5\), found \(5, 16\)"):
        adapter("classifier")(TENSORS["pixel_values"], params=params)
    with pytest.raises(ValueError, match="_do_init=False"):
        adapter("classifier", _do_init=False)(TENSORS["pixel_values"])
    with pytest.raises(ValueError, match="expected a nested dictionary"):
        adapter("classifier")(TENSORS["pixel_values"], params=[1])
