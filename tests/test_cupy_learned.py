"""The CuPy backend's own kernels of training, on the stand-in: half precision, sizes at the edges of blocks, memory."""

from __future__ import annotations

import dataclasses
from importlib import import_module

import numpy as np
import pytest
import test_backward as t
from conftest import distance
from cuda_on_cpu import kernels
from cuda_on_cpu.backend import cupy_backend
from test_cupy_backward import arrays, check, down, found, moved, truth, up
from tolerances import EPS32, EPS64, HALF_BACKWARD, HALF_BACKWARD_OF_ONE_TOKEN

from minibeit.ops import backward, get_ops
from minibeit.params import Attention, LayerNorm, Linear

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no g++ to compile CUDA C++ with")
STEP = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
HEAD = 64  # of the fused kernels
OF_TRANSFORMER = ("layer_norm", "linear", "linear_activation", "linear_residual", "project_qkv", "attention")


@pytest.fixture(scope="module")
def cupy(request):
    """With the threads of a block in their order, or in reverse where a test asks for it."""
    with cupy_backend(backwards=getattr(request, "param", False)) as module:
        yield module


both_orders = pytest.mark.parametrize("cupy", [False, True], ids=["forwards", "backwards"], indirect=True)


def norm(D):
    return LayerNorm(t.drawn(D, seed=21), t.drawn(D, seed=22))


def many(rows, columns):
    return t.drawn(rows, columns, seed=23)


ROWS = {
    **{f"layer_norm {D}": ("layer_norm", [many(3, D), norm(D), 1e-6]) for D in (1, 3, 31, 128, 132, 1028)},
    **{f"layer_norm rows {n}": ("layer_norm", [many(n, 4), norm(4), 1e-12]) for n in (1, 7, 9, 128, 129, 300)},
    **{f"linear rows {n}": ("linear", [many(n, 3), t.linear_layer(5, 3)]) for n in (1, 8, 129, 257)},
    **{f"linear {out}": ("linear", [many(3, 2), t.linear_layer(out, 2)]) for out in (1, 33, 127, 260)},
    "activation 260": ("linear_activation", [many(130, 4), t.linear_layer(260, 4), "gelu"]),
    "activation far below": (
        "linear_activation",
        [np.full((2, 1), -90.0), Linear(np.ones((1, 1)), None), "sqrtsoftplus"],
    ),
    "activation no bias": ("linear_activation", [many(3, 4), t.linear_layer(6, 4, bias=False), "gelu"]),
    "residual 260": ("linear_residual", [many(130, 3), t.linear_layer(260, 3), t.drawn(260), many(130, 260), None]),
    "residual images": (
        "linear_residual",
        [t.drawn(3, 50, 2), t.linear_layer(4, 2, bias=False), t.drawn(4), t.drawn(3, 50, 4), t.keep(3, 1, 1)],
    ),
    "residual images, no scale": (
        "linear_residual",
        [t.drawn(3, 5, 2), t.linear_layer(4, 2), None, t.drawn(3, 5, 4), t.keep(3, 1, 1)],
    ),
    "project_qkv 3 images": (
        "project_qkv",
        [t.drawn(3, 5, 6), Attention(*(t.linear_layer(6, 6, bias=i != 1) for i in range(4))), 3],
    ),
    "attention 33 tokens": ("attention", [*t.attention((4, 8), 3, 5), t.bias((4, 8), 3)]),
    "cross_entropy 300": ("cross_entropy", [many(3, 300), np.array([299, -100, 0]), -100]),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", ROWS)
def test_sizes_at_the_edges_of_blocks(cupy, case, dtype):
    name, args = ROWS[case]
    made, g, expected = truth(name, args, {})
    there, g = t.in_dtype((args, arrays(g)), dtype)
    check(down(cupy, found(cupy, name, there, {}, g)), (arrays(made), expected), EPS32 if dtype == "float32" else EPS64)


def test_vectors_may_have_strides(cupy):
    ops, x, g = get_ops("cupy"), cupy.asarray(np.float32(many(5, 8))), cupy.ones((5, 8), "float32")
    spread = [cupy.asarray(np.float32(t.drawn(16, seed=seed)))[::2] for seed in (1, 2)]
    dense = [cupy.asarray(part.get()) for part in spread]
    made = [ops.layer_norm_forward(x, LayerNorm(*part), 1e-6)[0].get() for part in (spread, dense)]
    back = [ops.layer_norm_backward(g, None, x, LayerNorm(*part), 1e-6)[0].get() for part in (spread, dense)]
    assert np.array_equal(*made)
    assert np.array_equal(*back)
    layer = Linear(cupy.asarray(np.float32(many(8, 8))), None)
    y = [ops.linear_residual_forward(x, layer, scale, x)[0].get() for scale in (spread[0], dense[0])]
    found_ = [ops.linear_residual_backward(g, None, x, layer, scale, x) for scale in (spread[0], dense[0])]
    assert np.array_equal(*y)
    assert all(np.array_equal(found_[0][i].get(), found_[1][i].get()) for i in (0, 2))


def test_a_product_of_no_terms_is_zero(cupy):
    gemm, y = import_module("minibeit.ops.cupy_gpu.gemm"), cupy.ones((2, 3, 4), "float32")
    gemm.batched_product(cupy.empty((2, 0, 3), "float32"), cupy.empty((2, 0, 4), "float32"), y, 1.0, False, True)
    assert not y.get().any()


# Half precision -------------------------------------------------------------------------------------------------------


def rounded(x, dtype):
    """`x` with every array rounded to half precision, so that what is measured is not the rounding of arguments."""
    if isinstance(x, np.ndarray):
        if x.dtype.kind != "f":
            return x
        if dtype == "float16":
            return x.astype(dtype).astype(np.float64)
        return (np.float32(x).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
    if isinstance(x, (list, tuple)):
        return type(x)(rounded(part, dtype) for part in x)
    if dataclasses.is_dataclass(x):
        return dataclasses.replace(x, **{f.name: rounded(getattr(x, f.name), dtype) for f in dataclasses.fields(x)})
    return x


def heads(B, H, grid, biased=True):
    """Attention whose heads the fused kernels take."""
    N = grid[0] * grid[1] + 1
    q, k, v = (t.drawn(B, H, N, HEAD, seed=seed) for seed in (30, 31, 32))
    return "attention", [q, k, v, t.bias(grid, H) if biased else None], {}


FUSED = {
    "1 patch": heads(1, 2, (1, 1)),
    "64 tokens": heads(2, 1, (7, 9)),
    "65 tokens": heads(1, 2, (8, 8), biased=False),
    "136 tokens": heads(3, 1, (9, 15)),
    "3 images": heads(3, 2, (3, 5)),
}
ACTIVATIONS = ("linear_activation gelu", "linear_activation relu", "linear_activation tanh")  # all others: in float32
HALVES = {
    **{case: made for case, made in t.CASES.items() if made[0] in OF_TRANSFORMER and "activation" not in case},
    **{case: t.CASES[case] for case in ACTIVATIONS},
    **{case: (*made, {}) for case, made in ROWS.items() if made[0] in OF_TRANSFORMER and "far" not in case},
    **FUSED,
}


def in_half(cupy, case, dtype):
    """(forward and gradients on the device, the same in float64) of rounded arguments."""
    name, args, options = HALVES[case]
    args, options = rounded(args, dtype), {key: rounded(value, dtype) for key, value in options.items()}
    g = rounded(arrays(t.cotangents(truth(name, args, options)[0])), dtype)
    forward = getattr(backward, f"{name}_forward", None)
    made, saved = forward(*args, **options) if forward else t.forward(name, args, options)
    expected = made, getattr(backward, f"{name}_backward")(g, saved, *args, **options)
    args, options, g = t.in_dtype((args, options, g), "float32")
    result = found(cupy, name, args, options, g, dtype=dtype)
    to_host = get_ops("cupy", dtype=dtype).to_host
    return moved(result, lambda x: to_host(x) if isinstance(x, cupy.ndarray) else x), expected


@both_orders
@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize("case", HALVES)
def test_half_precision_is_as_near_as_its_steps(cupy, case, dtype):
    result, expected = in_half(cupy, case, dtype)
    result, expected = t.arrays_of(result), t.arrays_of(expected)
    assert set(result) == set(expected)
    allowed = HALF_BACKWARD_OF_ONE_TOKEN if case == "1 patch" else HALF_BACKWARD
    for path, array in expected.items():
        assert distance(result[path], array) <= allowed * STEP[dtype], path


@pytest.mark.parametrize("dtype", STEP)
def test_heads_are_read_where_the_projection_leaves_them(cupy, dtype):
    """Nothing is copied on the way to attention or back; results are those of copies."""
    B, N, H = 2, 7, 2
    ops, D = get_ops("cupy", dtype=dtype), H * HEAD
    p = up(cupy, t.in_dtype(Attention(*(t.linear_layer(D, D) for _ in range(4))), "float32"))
    x, g = (cupy.asarray(np.float32(t.drawn(B, N, D, seed=seed))) for seed in (1, 2))
    heads_, _ = ops.project_qkv_forward(x, p, H)
    assert not heads_[0].flags.c_contiguous and heads_[0].itemsize == 2
    table = up(cupy, t.in_dtype(t.bias((2, 3), H), "float32"))
    context, saved = ops.attention_forward(*heads_, table)
    *grads, _ = ops.attention_backward(g, saved, *heads_, table)
    side_by_side = import_module("minibeit.ops.cupy_gpu.learned_attention")._side_by_side
    assert side_by_side(tuple(grads)).data.ptr == grads[0].data.ptr
    first = [part.get() for part in ops.project_qkv_backward(tuple(grads), None, x, p, H)[:1]]
    copied = [np.ascontiguousarray(part.get()) for part in heads_]
    other, saved = ops.attention_forward(*map(cupy.asarray, copied), table)
    *again, _ = ops.attention_backward(g, saved, *map(cupy.asarray, copied), table)
    assert np.array_equal(context.get(), other.get())
    assert all(np.array_equal(a.get(), b.get()) for a, b in zip(grads, again))
    apart = tuple(cupy.asarray(np.ascontiguousarray(part.get())) for part in again)
    assert np.array_equal(first[0], ops.project_qkv_backward(apart, None, x, p, H)[0].get())


@pytest.mark.parametrize("dtype", ["float32", *STEP])
@pytest.mark.parametrize("case", ["attention", "attention probs keep"])
def test_scores_that_do_not_fit_go_head_by_head(cupy, case, dtype, monkeypatch):
    name, args, options = t.CASES[case]
    args, options = t.in_dtype(args, "float32"), {key: t.in_dtype(value, "float32") for key, value in options.items()}
    g = t.in_dtype(t.cotangents(truth(name, args, options)[0]), "float32")
    _, whole = found(cupy, name, args, options, g, dtype=dtype)
    monkeypatch.setattr(import_module("minibeit.ops.cupy_gpu.learned_attention"), "SCORES_BYTES", 1)
    _, pieces = found(cupy, name, args, options, g, dtype=dtype)
    whole, pieces = (t.arrays_of(down(cupy, grads)) for grads in (whole, pieces))
    assert all(distance(pieces[path], array) <= STEP.get(dtype, EPS32) for path, array in whole.items())


@both_orders
@pytest.mark.parametrize("dtype", STEP)
def test_fused_attention_holds_no_scores_and_gives_the_same_bits_twice(cupy, dtype, monkeypatch):
    B, H, grid = 4, 1, (8, 8)
    N = grid[0] * grid[1] + 1
    ops, pool, found_ = get_ops("cupy", dtype=dtype), cupy.get_default_memory_pool(), []
    name, args, _ = heads(B, H, grid)
    *parts, table = up(cupy, t.in_dtype(args, "float32"))
    plain = LayerNorm(cupy.ones(HEAD, "float32"), cupy.zeros(HEAD, "float32"))
    q, k, v = (ops.layer_norm_forward(part, plain, 1e-6)[0] for part in parts)  # in half precision
    _, saved = ops.attention_forward(q, k, v, table)
    g = cupy.asarray(np.float32(t.drawn(B, N, H * HEAD, seed=9)))
    in_parts = t.arrays_of(down(cupy, ops.attention_backward(g, saved, q, k, v, table)))
    monkeypatch.setattr(import_module("minibeit.ops.cupy_gpu.learned_attention"), "BLOCKS", 1)  # of images: one part
    for _ in range(2):
        pool.free_all_blocks()
        before = pool.total_bytes()
        found_.append(t.arrays_of(down(cupy, ops.attention_backward(g, saved, q, k, v, table))))
        taken = pool.total_bytes() - before
    own = B * N * H * HEAD * (2 + 3 * 4)  # g as an operand, and three gradients
    scores = H * N * N * 4
    assert own < taken < own + 2.5 * scores  # the bias of all pairs and its gradient: two, not the eight of four images
    assert all(np.array_equal(found_[0][path], found_[1][path]) for path in found_[0])
    assert all(distance(in_parts[path], found_[0][path]) <= EPS32 for path in in_parts)
