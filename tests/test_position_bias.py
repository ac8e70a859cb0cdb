"""The relative position bias: its index, its table, other grids, shared and per block."""

from __future__ import annotations

from types import SimpleNamespace

import naive
import numpy as np
import pytest
from conftest import distance
from tolerances import NAIVE_OP

from minibeit import BeitConfig
from minibeit.model.position_bias import position_biases, resize_table
from minibeit.ops import get_ops
from minibeit.params import table_rows

OPS = get_ops("numpy")
GRIDS = [(1, 1), (1, 4), (4, 1), (2, 2), (2, 3), (5, 3)]


def table(grid, heads=2, seed=0):
    return np.random.default_rng(seed).standard_normal((table_rows(grid), heads))


def test_index_of_two_by_two_patches():
    expected = [[11, 9, 9, 9, 9], [10, 4, 3, 1, 0], [10, 5, 4, 2, 1], [10, 7, 6, 4, 3], [10, 8, 7, 5, 4]]
    index = OPS.relative_position_index((2, 2))
    assert index.tolist() == expected
    assert index.dtype == np.int32


def test_index_of_two_by_three_patches():
    assert OPS.relative_position_index((2, 3))[1].tolist() == [16, 7, 6, 5, 2, 1, 0]


@pytest.mark.parametrize("grid", GRIDS)
def test_bias_equals_its_definition(grid):
    values = table(grid)
    index = OPS.relative_position_index(grid)
    assert np.array_equal(values[index].transpose(2, 0, 1), naive.position_bias(values, grid))


@pytest.mark.parametrize("grid", GRIDS)
def test_index_uses_every_row_of_the_table(grid):
    used = set(OPS.relative_position_index(grid).ravel().tolist())
    assert used == set(range(table_rows(grid)))


@pytest.mark.parametrize("old", GRIDS)
@pytest.mark.parametrize("new", [(2, 2), (3, 5), (1, 6)])
def test_resized_table_equals_loops(old, new):
    values = table(old, 3)
    resized = resize_table(OPS, values, old, new)
    assert resized.shape == (table_rows(new), 3)
    assert distance(resized, naive.resize_table(values, old, new)) <= NAIVE_OP
    assert np.array_equal(resized[-3:], values[-3:])


def test_same_grid_gives_the_table_itself():
    values = table((3, 2))
    assert resize_table(OPS, values, (3, 2), (3, 2)) is values


def test_a_constant_table_stays_constant():
    values = np.full((table_rows((3, 4)), 1), 7.0)
    assert np.allclose(resize_table(OPS, values, (3, 4), (6, 5)), 7, rtol=1e-15, atol=0)


CONFIG = BeitConfig(image_size=32, patch_size=16)  # a grid of 2x2


def biases(shared, own, grid):
    encoder = [SimpleNamespace(bias_table=values) for values in own]
    return position_biases(OPS, SimpleNamespace(shared_bias_table=shared, encoder=encoder), CONFIG, grid)


def test_shared_and_own_tables_add_up():
    shared, own = table((2, 2), seed=1), [table((2, 2), seed=2), None]
    first, second = biases(shared, own, (2, 2))
    assert np.array_equal(first.table, shared + own[0])
    assert np.array_equal(second.table, shared)
    assert first.grid == (2, 2)


def test_no_table_no_bias():
    assert biases(None, [None, None], (3, 3)) == [None, None]


def test_table_is_not_changed():
    shared, own = table((2, 2), seed=1), table((2, 2), seed=2)
    before = shared.copy(), own.copy()
    for array in (shared, own):
        array.setflags(write=False)
    biases(shared, [own], (4, 3))
    assert np.array_equal(shared, before[0])
    assert np.array_equal(own, before[1])
