"""What the caller's NumPy settings and values may not change: no error from the depths, no NaN in silence."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

import minibeit
from minibeit import BeitImageProcessor
from minibeit.ops import reference

CLASSES = {
    "BeitModel": {},
    "BeitForMaskedImageModeling": {},
    "BeitForImageClassification": {"labels": np.array([1, 2])},
    "BeitForSemanticSegmentation": {"labels": np.zeros((2, 12, 8), int)},
    "BeitBackbone": {},
}
PIXELS = 30 * np.random.default_rng(0).standard_normal((2, 3, 12, 8)).astype(np.float32)


def made(name, backend="numpy", dtype="float32"):
    pytest.importorskip(backend)
    config = tiny_config(  # weights so large that softmax rounds to zero
        num_hidden_layers=4, out_indices=[1, 2, 3, 4], add_fpn=name == "BeitBackbone", initializer_range=3.0,
        use_mask_token=True,
    )  # fmt: skip
    return getattr(minibeit, name)(config, backend=backend, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_strict_errstate_changes_nothing(name, backend, dtype):
    model = made(name, backend, dtype)
    expected = first(model(PIXELS, **CLASSES[name]))
    with np.errstate(all="raise"):
        assert np.array_equal(first(model(PIXELS, **CLASSES[name])), expected)
        if name != "BeitBackbone":
            model(PIXELS, output_attentions=True)


def first(output):
    return output.to_tuple()[-1][-1] if "feature_maps" in output else output.to_tuple()[0]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_saving_and_loading_under_a_strict_errstate(dtype, tmp_path):
    model = made("BeitForImageClassification")
    arrays = {name: array * np.float32(1e-7) for name, array in model.arrays.items()}  # float16 rounds these to zero
    small = type(model)(model.config, backend="numpy", arrays=arrays)
    with np.errstate(all="raise"):
        small.save_pretrained(tmp_path, dtype=dtype)
        again = type(model).from_pretrained(tmp_path, backend="numpy")
    tolerance = {"float32": 0, "float16": 2.0**-24, "bfloat16": 1e-8}[dtype]
    assert all(np.abs(again.arrays[name] - array).max() <= tolerance for name, array in arrays.items())


def test_processing_under_a_strict_errstate():
    picture = np.random.default_rng(0).random((30, 40, 3)) * 1e-30
    outputs = minibeit.outputs.SemanticSegmenterOutput(
        logits=np.full((1, 3, 8, 8), 1e-38, np.float32) * PIXELS[0, 0, 0]
    )
    with np.errstate(all="raise"):
        batch = BeitImageProcessor(do_rescale=False)([picture, Image.new("LA", (40, 30))])
        (labels,) = BeitImageProcessor().post_process_semantic_segmentation(outputs, [(30, 20)])
    assert np.isfinite(batch.pixel_values).all() and labels.shape == (30, 20)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pixels_that_no_image_has_are_named(backend, dtype):
    model = made("BeitForImageClassification", backend, dtype)
    for value, message in ((1e38, "values beyond 1e.12"), (-1e13, "values beyond 1e.12"), (np.inf, "NaN or infinite")):
        pixels = PIXELS.copy()
        pixels[1, 2, 3, 4] = value
        with pytest.raises(ValueError, match=f"^pixel_values: found {message}"):
            model(pixels)
    pixels[1, 2, 3, 4] = 1e12
    assert np.isfinite(model(pixels).logits).all()


@pytest.mark.filterwarnings("error")
def test_complex_pixels_are_refused():
    for pixels in (PIXELS.astype(complex), PIXELS.astype(np.complex64), [[[[1j]]]]):
        with pytest.raises(ValueError, match=r"^pixel_values: expected"):
            made("BeitModel")(pixels)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 11.0, -11.0])
def test_the_bound_of_the_check_holds_everywhere(value):
    for at in (0, 17, 998):
        x = np.zeros(999, np.float32)
        x[at] = value
        assert not reference.all_finite(x, 10.0)
        assert reference.all_finite(x) == np.isfinite(value)
    assert reference.all_finite(np.full(5, -10.0), 10.0) and reference.all_finite(np.empty(0), 10.0)
