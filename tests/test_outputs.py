"""Outputs are dataclasses, mappings and tuples of what is there, with the names of the originals."""

from __future__ import annotations

from dataclasses import fields

import pytest

from minibeit import outputs

FIELDS = {
    "BeitModelOutputWithPooling": ["last_hidden_state", "pooler_output", "hidden_states", "attentions"],
    "MaskedLMOutput": ["loss", "logits", "hidden_states", "attentions"],
    "ImageClassifierOutput": ["loss", "logits", "hidden_states", "attentions"],
    "SemanticSegmenterOutput": ["loss", "logits", "hidden_states", "attentions", "auxiliary_logits"],
    "BackboneOutput": ["feature_maps", "hidden_states", "attentions"],
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_are_those_of_the_originals(name):
    made = getattr(outputs, name)()
    assert [f.name for f in fields(made)] == FIELDS[name]
    assert made.keys() == []
    assert made.to_tuple() == ()
    assert len(made) == 0


def test_absent_fields_are_left_out():
    out = outputs.ImageClassifierOutput(logits=1, attentions=(2, 3))
    assert out.keys() == ["logits", "attentions"]
    assert out.values() == [1, (2, 3)]
    assert out.items() == [("logits", 1), ("attentions", (2, 3))]
    assert out.to_tuple() == (1, (2, 3))
    assert dict(out) == {"logits": 1, "attentions": (2, 3)}
    assert list(out) == ["logits", "attentions"]
    assert "logits" in out
    assert "loss" not in out


def test_by_name_and_by_position():
    out = outputs.ImageClassifierOutput(logits=1, attentions=2)
    assert out["logits"] == out[0] == 1
    assert out[1] == out[-1] == 2
    assert out[:2] == (1, 2)
    assert out.get("loss") is None
    assert out.get("loss", 5) == 5
    assert out.get("logits") == 1


def test_a_missing_key_names_what_is_there():
    with pytest.raises(KeyError, match="ImageClassifierOutput has logits, not 'loss'"):
        outputs.ImageClassifierOutput(logits=1)["loss"]
    with pytest.raises(IndexError):
        outputs.ImageClassifierOutput(logits=1)[1]
