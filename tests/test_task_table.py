"""The table of tasks says of every task what its class, its parameters and its files show."""

from __future__ import annotations

import inspect

import pytest
from conftest import tiny_config

import minibeit
from minibeit import params
from minibeit.params import param_shapes
from minibeit.task_table import BY_HEAD, OF_ARCHITECTURE, TASKS, checked_task, in_words
from minibeit.tasks import task_class

CONFIG = tiny_config(num_hidden_layers=4, out_indices=(1, 2, 3, 4), add_fpn=True, use_auxiliary_head=False)


def test_every_list_of_tasks_is_of_the_same():
    assert set(TASKS) == set(BY_HEAD) == set(params._SHAPES) == set(OF_ARCHITECTURE.values())
    assert {name for name in minibeit.__all__ if name.startswith(("BeitFor", "BeitModel", "BeitBackbone"))} == {
        *(task.class_name for task in TASKS.values()),
        "BeitModelOutputWithPooling",
    }


@pytest.mark.parametrize("task", TASKS)
def test_a_row_is_true(task):
    row = TASKS[task]
    model_class = task_class(task)
    assert model_class.__name__ == row.class_name and model_class.task == task
    assert row.masked == ("bool_masked_pos" in inspect.signature(model_class.forward).parameters)
    own = {name for name in param_shapes(CONFIG, task) if not name.startswith("beit.")}
    assert all(any(name.startswith(head + ".") for name in own) for head in row.heads)
    assert all(name.startswith((*row.heads, "norm.")) for name in own)
    assert row.shown_by in {*own, ""}


@pytest.mark.parametrize("task", TASKS)
def test_the_first_head_that_is_there_tells_the_task(task):
    names = param_shapes(CONFIG, task)
    assert next((each for each in BY_HEAD if TASKS[each].shown_by in names), "model") == task


def test_architectures_are_those_of_transformers():
    assert TASKS["model"].architecture("beit") == "BeitModel"
    assert TASKS["image_classification"].architecture("data2vec-vision") == "Data2VecVisionForImageClassification"
    assert OF_ARCHITECTURE["FlaxBeitForMaskedImageModeling"] == "masked_image_modeling"


def test_other_tasks_are_named():
    assert in_words("backbone") == "feature maps" and in_words("audio") == "audio"
    with pytest.raises(ValueError, match=r"task: expected one of model, .*, backbone, found 'audio'"):
        checked_task("audio")
    with pytest.raises(ValueError, match="found 'base'"):
        task_class("base")
