"""Arrays of other libraries, wherever a caller may give one: taken like NumPy's own."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

from minibeit import (
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitImageProcessor,
)
from minibeit.errors import ImageError
from minibeit.foreign import as_numpy

CONFIG = tiny_config(image_size=8, num_labels=5, use_mask_token=True)


class Dlpack:
    """Speaks DLPack and nothing else."""

    def __init__(self, array):
        self.array = array.astype(np.uint8) if array.dtype == bool else array  # DLPack had no booleans until 1.0

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Tensor:
    """Refuses NumPy as long as it is attached, as torch's do."""

    def __init__(self, array, attached=True):
        self.array, self.attached, self.dtype = array, attached, f"torch.{array.dtype}"

    def detach(self):
        return Tensor(self.array, attached=False)

    def cpu(self):
        return self

    def __array__(self, dtype=None, copy=None):
        if self.attached:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        return self.array


def holders():
    """(name, what makes of a NumPy array one of a library)."""
    found = [
        ("list", lambda a: a.tolist()),
        ("dlpack", Dlpack),
        ("tensor", Tensor),
        ("list of tensors", lambda a: [Tensor(np.asarray(x)) for x in a]),
    ]
    return [pytest.param(make, id=name) for name, make in found]


def torch_holders():
    def graph(a):
        t = __import__("torch").tensor(a)
        return (t.requires_grad_() * 1) if t.is_floating_point() else t

    return [
        pytest.param(lambda a: __import__("torch").tensor(a), id="torch"),
        pytest.param(graph, id="in a graph"),
        pytest.param(lambda a: [__import__("torch").tensor(x) for x in a], id="list of torch"),
        pytest.param(lambda a: __import__("torch").tensor(a.repeat(2, 0))[::2], id="strided"),
    ]


def check_all(make, rng):
    x = rng.integers(-3, 4, (2, 3, 8, 8)).astype(np.float32)
    labels, maps = np.array([3, 0]), rng.integers(0, 5, (2, 8, 8))
    mask = rng.integers(0, 2, (2, CONFIG.grid[0] * CONFIG.grid[1])).astype(bool)
    classify = BeitForImageClassification(CONFIG, backend="numpy")
    one, two = classify(x, labels=labels), classify(make(x), labels=make(labels))
    np.testing.assert_array_equal(one.logits, two.logits)
    assert one.loss == two.loss
    mim = BeitForMaskedImageModeling(CONFIG, backend="numpy")
    np.testing.assert_array_equal(mim(x, bool_masked_pos=mask).logits, mim(make(x), bool_masked_pos=make(mask)).logits)
    config = CONFIG.replace(num_hidden_layers=4, out_indices=[1, 2, 3, 4], pool_scales=[1, 2])
    segment = BeitForSemanticSegmentation(config, backend="numpy")
    assert segment(x, labels=maps).loss == segment(make(x), labels=make(maps)).loss


@pytest.mark.parametrize("make", holders())
def test_inputs_of_models(make, rng):
    check_all(make, rng)


@pytest.mark.live
@pytest.mark.parametrize("make", torch_holders())
def test_inputs_of_models_of_torch(make, rng):
    pytest.importorskip("torch")
    check_all(make, rng)


@pytest.mark.live
def test_bfloat16_of_torch(rng):
    torch = pytest.importorskip("torch")
    x = torch.tensor(rng.standard_normal((1, 3, 8, 8)), dtype=torch.bfloat16)
    model = BeitForImageClassification(CONFIG, backend="numpy")
    np.testing.assert_array_equal(model(x).logits, model(x.float().numpy()).logits)


def test_bfloat16_of_jax():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.arange(3).astype(ml_dtypes.bfloat16)
    assert as_numpy(array).dtype == np.float32 and as_numpy([array]).shape == (1, 3)


@pytest.mark.parametrize("labels", [[3, 0], (3, 0), np.array([3, 0], np.uint8), Tensor(np.array([3, 0]))])
def test_integers_are_classes_whoever_holds_them(labels, rng):
    x = rng.standard_normal((2, 3, 8, 8))
    model = BeitForImageClassification(CONFIG, backend="numpy")
    assert model(x, labels=labels).loss == model(x, labels=np.array([3, 0])).loss


@pytest.mark.parametrize("make", holders()[1:3])
def test_pictures_and_maps(make, rng):
    picture, labels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), rng.integers(0, 5, (20, 30))
    processor = BeitImageProcessor(size=8)
    one, two = processor(picture, labels), processor(make(picture), make(labels))
    np.testing.assert_array_equal(one.pixel_values, two.pixel_values)
    np.testing.assert_array_equal(one.labels, two.labels)


def test_label_maps_with_an_axis_of_channels(rng):
    pictures = [rng.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in "ab"]
    maps = rng.integers(0, 5, (2, 20, 30))
    processor = BeitImageProcessor(size=8)
    expected = processor(pictures, list(maps)).labels
    for given in (list(maps[..., None]), maps[..., None], maps):
        np.testing.assert_array_equal(processor(pictures, given).labels, expected)
    np.testing.assert_array_equal(processor(pictures[0], maps[0][..., None]).labels, expected[:1])


@pytest.mark.parametrize("channels", [2, 5, 12])
def test_any_number_of_channels(rng, channels):
    """Each channel as it would come out alone."""
    mean, std = rng.uniform(0.2, 0.8, (2, channels))
    picture = rng.integers(0, 256, (20, 30, channels), dtype=np.uint8)
    processor = BeitImageProcessor(size=8, image_mean=list(mean), image_std=list(std))
    found = processor(picture).pixel_values
    assert found.shape == (1, channels, 8, 8)
    for i in range(channels):
        alone = BeitImageProcessor(size=8, image_mean=[mean[i]], image_std=[std[i]])(picture[..., i]).pixel_values
        np.testing.assert_array_equal(found[:, i], alone[:, 0])
    np.testing.assert_array_equal(processor(np.moveaxis(picture, -1, 0)).pixel_values, found)
    with pytest.raises(ImageError, match=f"expected {channels}"):
        processor(Image.fromarray(picture[..., :2].repeat(2, -1)[..., :3]))
    with pytest.raises(ImageError, match=f"1, 3, 4 or {channels} channels"):
        processor(picture[..., :1].repeat(7, -1))


def test_twelve_bits_in_a_sixteen_bit_file(tmp_path, rng):
    values = rng.integers(0, 4096, (10, 12)).astype(np.uint16)
    values[0, 0] = 4095
    Image.fromarray(values).save(tmp_path / "x.png")
    with pytest.warns(UserWarning, match=r"largest value is 4095 of 65535 .*nearly black; .*pass value_range=4095"):
        dark = BeitImageProcessor(size=(10, 12)).preprocess(tmp_path / "x.png").pixel_values
    assert dark.max() < -0.8
    processor = BeitImageProcessor(size=(10, 12), value_range=4095)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = processor(tmp_path / "x.png").pixel_values
    expected = np.rint(values * (255 / 4095)) / 255 * 2 - 1
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(processor(values[..., None].repeat(3, -1)).pixel_values, found)
    with pytest.raises(ImageError, match=r"expected values within 0\.\.255, found 0|expected values within 0\.\.255"):
        processor(tmp_path / "x.png", value_range=255)
    processor.save_pretrained(tmp_path)
    assert BeitImageProcessor.from_pretrained(tmp_path).value_range == 4095
    with pytest.raises(ValueError, match="value_range: expected a number above 0"):
        BeitImageProcessor(value_range=0)
