"""Self-attention with its bias, and the properties any attention has."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from conftest import distance, random_weights, tiny_config
from tolerances import NAIVE_OP

from minibeit import Trace
from minibeit.model.attention import attention_heads
from minibeit.ops import PositionBias, get_ops
from minibeit.params import shapes, unflatten
from minibeit.trace import Scope

OPS = get_ops("numpy")
CONFIG = tiny_config(use_relative_position_bias=True)
ARRAYS = random_weights(CONFIG, "model")
BLOCK = unflatten(shapes(CONFIG, "model"), ARRAYS).beit.encoder[0]
BIAS = PositionBias(BLOCK.bias_table, (3, 2))
X = np.random.default_rng(5).standard_normal((2, 7, 12))


@pytest.mark.parametrize("bias", [None, BIAS])
def test_equals_loops(bias):
    trace = Trace()
    found = attention_heads(OPS, BLOCK.attention, X, bias, CONFIG, trace=Scope((trace,)))
    p = BLOCK.attention
    q, k, v = (naive.split_heads(naive.linear(X, x.weight, x.bias), 3) for x in (p.query, p.key, p.value))
    table = None if bias is None else naive.position_bias(BLOCK.bias_table, (3, 2))
    context, probs = naive.attention(q, k, v, table)
    truth = {"probs": probs, "query": q, "key": k, "value": v, "context": context}
    if bias is not None:
        truth["bias_table"] = BLOCK.bias_table
    assert set(trace) == set(truth)
    for name, array in truth.items():
        assert distance(trace[name], array) <= NAIVE_OP, name
    assert np.array_equal(trace["context"], found)


def test_probabilities_add_up_to_one():
    trace = Trace("probs")
    attention_heads(OPS, BLOCK.attention, X, BIAS, CONFIG, trace=Scope((trace,)))
    assert np.allclose(trace["probs"].sum(-1), 1, rtol=1e-14, atol=0)
    assert (trace["probs"] >= 0).all()


def test_without_bias_the_order_of_keys_does_not_matter():
    order = [0, 3, 1, 6, 2, 5, 4]
    straight = attention_heads(OPS, BLOCK.attention, X, None, CONFIG)
    shuffled = attention_heads(OPS, BLOCK.attention, X[:, order], None, CONFIG)
    assert distance(shuffled, straight[:, order]) <= NAIVE_OP
    biased = attention_heads(OPS, BLOCK.attention, X[:, order], BIAS, CONFIG)
    assert distance(biased, attention_heads(OPS, BLOCK.attention, X, BIAS, CONFIG)[:, order]) > 1e-3


def test_images_of_a_batch_do_not_mix():
    together = attention_heads(OPS, BLOCK.attention, X, BIAS, CONFIG)
    alone = attention_heads(OPS, BLOCK.attention, X[1:], BIAS, CONFIG)
    assert distance(alone, together[1:]) <= NAIVE_OP


def test_tracing_changes_nothing():
    silent = attention_heads(OPS, BLOCK.attention, X, BIAS, CONFIG)
    traced = attention_heads(OPS, BLOCK.attention, X, BIAS, CONFIG, trace=Scope((Trace(),)))
    assert np.array_equal(silent, traced)
