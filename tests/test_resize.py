"""Tables and position embeddings for other grids: golden numbers, and PyTorch and SciPy where they are installed."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import random_weights, tiny_config

from minibeit.checkpoint import resize


def wave(size=27):
    i, j = np.mgrid[:size, :size]
    return np.sin(0.37 * i) * np.cos(0.21 * j) + 0.01 * i * j


def resized_wave(grid, method):
    table = np.concatenate([wave().reshape(-1, 1), [[1.0], [2.0], [3.0]]])
    new = resize.resize_stored_table(table, (14, 14), (grid, grid), method)
    assert new[-3:].tolist() == [[1.0], [2.0], [3.0]]
    side = 2 * grid - 1
    return new[:-3].reshape(side, side)


# From SciPy's RectBivariateSpline and RegularGridInterpolator on unilm's positions, and PyTorch's bilinear.
GOLDEN = {
    (24, 10, 17): (0.214173, 0.214319, 0.161981),
    (24, 46, 5): (0.297460, 0.299622, 0.527807),
    (24, 30, 40): (4.594750, 4.586398, 3.876047),
    (24, 23, 23): (2.602122, 2.602122, 2.602122),
    (40, 10, 17): (0.500907, 0.498104, 0.535943),
    (40, 60, 70): (6.015736, 5.999794, 4.979706),
}


@pytest.mark.parametrize("method", resize.RESIZE_METHODS)
@pytest.mark.parametrize("grid", [24, 40])
def test_tables_meet_the_golden_numbers(grid, method):
    new = resized_wave(grid, method)
    for (at, i, j), values in GOLDEN.items():
        if at == grid:
            assert new[i, j] == pytest.approx(values[resize.RESIZE_METHODS.index(method)], abs=6e-7)


@pytest.mark.parametrize(
    "source, target, end",
    [(27, 47, 22.999934), (27, 63, 31.000182), (27, 79, 39.000083), (27, 23, 13.81)],
)
def test_geometric_positions_end_where_unilms_do(source, target, end):
    x = resize.geometric_positions(source, target)
    assert len(x) == source
    assert x[-1] == pytest.approx(end, abs=5e-3 if target == 23 else 1e-6)
    np.testing.assert_array_equal(x, -x[::-1])


@pytest.mark.parametrize("q, source, target", [(1.09030745, 27, 47), (1.16850363, 27, 79), (1.02614336, 47, 63)])
def test_ratio_of_the_geometric_sequence(q, source, target):
    x = resize.geometric_positions(source, target)[source // 2 :]
    assert (x[2] - x[1]) == pytest.approx(q, abs=1e-8)


def test_spline_reproduces_cubics_exactly(rng):
    """Not-a-knot is exact for polynomials of degree 3; natural or clamped splines are not."""
    x, t = np.sort(rng.uniform(-5, 5, 9)), np.linspace(-4, 4, 30)
    t = np.clip(t, x[0], x[-1])
    for power in range(4):
        np.testing.assert_allclose(resize.not_a_knot_matrix(x, t) @ x**power, t**power, atol=1e-9)


@pytest.mark.parametrize("method", resize.RESIZE_METHODS)
def test_constants_stay_constant(method):
    table = np.full((732, 2), 0.25, np.float32)
    np.testing.assert_allclose(resize.resize_stored_table(table, (14, 14), (20, 20), method), 0.25, rtol=1e-6)
    positions = np.full((1, 197, 4), -1.5, np.float32)
    np.testing.assert_allclose(resize.resize_stored_positions(positions, (14, 14), (9, 20), method), -1.5, rtol=1e-6)


def test_same_grid_is_the_same_array(rng):
    table = rng.standard_normal((732, 3))
    assert resize.resize_stored_table(table, (14, 14), (14, 14)) is table


def test_mistakes_are_named(rng):
    table = np.zeros((3 * 5 + 3, 2))
    with pytest.raises(ValueError, match="square grids"):
        resize.resize_stored_table(table, (2, 3), (4, 4), "unilm")
    with pytest.raises(ValueError, match="expected one of unilm"):
        resize.resize_stored_table(table, (2, 3), (4, 4), "nearest")
    with pytest.raises(ValueError, match="3x3"):
        resize.resize_stored_table(np.zeros((12, 1)), (2, 2), (4, 4), "unilm")


def test_arrays_of_a_model(rng):
    config = tiny_config(
        image_size=16, use_relative_position_bias=True, use_absolute_position_embeddings=True, num_hidden_layers=2
    )
    arrays = random_weights(config, "image_classification", dtype="float32")
    before = {name: array.copy() for name, array in arrays.items()}
    changed, new = resize.resize_arrays(arrays, config, (24, 20), "timm")
    assert changed.grid == (6, 5) and changed.hidden_size == config.hidden_size
    from minibeit.params import param_shapes

    assert {name: array.shape for name, array in new.items()} == param_shapes(changed, "image_classification")
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name])


def test_shared_table_goes_to_every_block():
    config = tiny_config(use_shared_relative_position_bias=True)
    arrays = random_weights(config, "model")
    changed, new = resize.share_to_blocks(arrays, config)
    assert changed.use_relative_position_bias and not changed.use_shared_relative_position_bias
    assert "beit.shared_bias_table" not in new
    for i in range(config.num_hidden_layers):
        np.testing.assert_array_equal(new[f"beit.encoder.{i}.bias_table"], arrays["beit.shared_bias_table"])


@pytest.mark.live
@pytest.mark.parametrize("source, target", [(27, 47), (27, 79), (47, 63), (27, 23), (5, 9)])
def test_spline_equals_scipy(rng, source, target):
    interpolate = pytest.importorskip("scipy.interpolate")
    z = rng.standard_normal((source, source))
    x, t = resize.geometric_positions(source, target), np.arange(target) - target // 2
    truth = interpolate.RectBivariateSpline(x, x, z, kx=3, ky=3, s=0)(t, t)
    matrix = resize.spline_matrix(source, target)
    np.testing.assert_allclose(matrix @ z @ matrix.T, truth, atol=1e-11)


@pytest.mark.live
@pytest.mark.parametrize("old, new", [((14, 14), (24, 30)), ((14, 14), (9, 7)), ((3, 5), (14, 4))])
@pytest.mark.parametrize("mode, antialias", [("bilinear", False), ("bicubic", False), ("bicubic", True)])
def test_kernels_equal_pytorch(rng, old, new, mode, antialias):
    torch = pytest.importorskip("torch")
    maps = rng.standard_normal((1, 3, *old))
    truth = torch.nn.functional.interpolate(
        torch.from_numpy(maps), size=new, mode=mode, align_corners=False, antialias=antialias
    ).numpy()
    name = {"bilinear": "bilinear_matrix", "bicubic": "bicubic_matrix"}[mode]
    maker = getattr(resize, "antialiased_" + name if antialias else name)
    rows, columns = maker(old[0], new[0]), maker(old[1], new[1])
    np.testing.assert_allclose(rows @ maps @ columns.T, truth, atol=1e-12)
