"""The tables of names: every parameter of every task has exactly one place, and the place can be found again."""

from __future__ import annotations

import pytest
from conftest import tiny_config

from minibeit.checkpoint.names import ALIASES, DIALECTS, Naming, Place, hub_names, recognise
from minibeit.params import param_shapes
from minibeit.task_table import TASKS

CONFIG = tiny_config(
    use_mask_token=True,
    use_absolute_position_embeddings=True,
    use_relative_position_bias=True,
    use_shared_relative_position_bias=True,
    out_indices=[0, 1, 2],
    auxiliary_concat_input=True,
    auxiliary_num_convs=2,
)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_parameter_has_a_place_of_its_own(dialect, task):
    if dialect == "flax" and task in ("semantic_segmentation",):
        pytest.skip("Flax has no segmentation")
    for encoder in DIALECTS[dialect].encoders:
        naming = Naming(DIALECTS[dialect], encoder)
        places = [naming.place(name) for name in param_shapes(CONFIG, task)]
        assert len(set(places)) == len(places)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_file_shows_its_dialect_and_prefix(dialect):
    for encoder in DIALECTS[dialect].encoders:
        for outer in ("", "module."):
            naming = Naming(DIALECTS[dialect], encoder, outer)
            task = "semantic_segmentation" if dialect == "data2vec5" else "model"
            names = {naming.place(name).name for name in param_shapes(CONFIG, task)}
            assert recognise(names) == naming
            assert recognise(names, dialect) == naming


def test_aliases_exist():
    assert set(ALIASES.values()) <= set(DIALECTS)


@pytest.mark.parametrize(
    "how, ours, stored",
    [
        ("same", (2, 3), (2, 3)),
        ("transpose", (2, 3), (3, 2)),
        ("hwio", (6, 3, 4, 5), (4, 5, 3, 6)),
        ("1/3", (2, 3), (6, 3)),
    ],
)
def test_shapes_in_the_file(how, ours, stored):
    assert Place("x", how).stored_shape(ours) == stored


def test_unknown_names_are_errors():
    with pytest.raises(KeyError):
        hub_names(["beit.encoder.0.attention.key.scale.offset"])


@pytest.mark.live
@pytest.mark.parametrize("task", TASKS)
def test_transformers_own_names(task):
    """Names in memory and in files are those of the installed transformers, no more and no fewer."""
    pytest.importorskip("transformers")
    import parity

    settings = dict(
        hidden_size=12, num_hidden_layers=4, num_attention_heads=3, intermediate_size=20, image_size=8, patch_size=4,
        use_mask_token=True, use_absolute_position_embeddings=True, use_relative_position_bias=True,
        out_indices=[1, 2, 3, 4], add_fpn=task == "backbone",
    )  # fmt: skip
    model = parity.hf_model(task, settings, 0)
    for state, dialect in ((model.state_dict(), "transformers5"), (parity.hf_arrays(model), "hub")):
        naming = recognise(state)
        assert naming.dialect.name == dialect
        names = {naming.place(name).name for name in param_shapes(parity.our_config(model), task)}
        assert names == {name for name in state if not name.endswith("num_batches_tracked")}
