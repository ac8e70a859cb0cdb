"""Every op of the seam: NumPy in float64 beside plain loops, then every backend in float32 beside the same loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import naive
import numpy as np
import pytest
from conftest import distance
from tolerances import EPS32, FACTOR, FEW, FEW_FLOOR, FLOOR, NAIVE_OP, OP32, OP32_CASES

from minibeit.model.position_bias import PositionBias, relative_position_index
from minibeit.ops import BACKENDS, NO_ARITHMETIC, activations, get_ops, reference
from minibeit.params import Attention, BatchNorm, Conv, ConvBatchNorm, ConvTranspose, LayerNorm, Linear, table_rows

REFERENCE = get_ops("numpy")


@dataclass
class Case:
    """One call of one op: `run(ops, arrays)` beside `truth(arrays in float64)`, on arrays exact in float32."""

    op: str
    arrays: dict[str, np.ndarray]
    run: Callable[[Any, Any], Any]
    truth: Callable[[Any], Any]

    def given(self, dtype: str) -> SimpleNamespace:
        return SimpleNamespace(
            **{k: a.astype(dtype) if a.dtype.kind == "f" else a.copy() for k, a in self.arrays.items()}
        )

    def results(self, ops: Any, dtype: str) -> list[np.ndarray]:
        return _listed(self.run(ops, self.given(dtype)))

    def truths(self) -> list[np.ndarray]:
        return _listed(self.truth(self.given("float64")))


def _listed(result: Any) -> list[np.ndarray]:
    return [np.asarray(part) for part in (result if isinstance(result, tuple) else (result,))]


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def layer_norm(shape, eps=1e-12, change=None) -> Case:
    arrays = draw({"x": shape, "w": shape[-1:], "b": shape[-1:]})
    if change is not None:
        arrays["x"] = change(arrays["x"]).astype(np.float32)
    return Case(
        "layer_norm",
        arrays,
        lambda ops, a: ops.layer_norm(a.x, ops.prepare(LayerNorm(a.w, a.b)), eps),
        lambda a: naive.layer_norm(a.x, a.w, a.b, eps),
    )


def linear(shape, out, bias=True, weight_shape=None) -> Case:
    arrays = draw({"x": shape, "w": weight_shape or (out, shape[-1]), "b": (out,)})
    leaf = Conv if weight_shape else Linear
    return Case(
        "linear",
        arrays,
        lambda ops, a: ops.linear(a.x, ops.prepare(leaf(a.w, a.b if bias else None))),
        lambda a: naive.linear(a.x, a.w, a.b if bias else None),
    )


def linear_activation(name, shape=(2, 3, 12), out=9, scale=1.0) -> Case:
    arrays = draw({"x": shape, "w": (out, shape[-1]), "b": (out,)}, scale=scale)
    return Case(
        "linear_activation",
        arrays,
        lambda ops, a: ops.linear_activation(a.x, ops.prepare(Linear(a.w, a.b)), name),
        lambda a: naive.activation(naive.linear(a.x, a.w, a.b), name),
    )


def linear_residual(shape, out, scaled) -> Case:
    arrays = draw({"x": shape, "w": (out, shape[-1]), "b": (out,), "s": (out,), "r": (*shape[:-1], out)})
    return Case(
        "linear_residual",
        arrays,
        lambda ops, a: ops.linear_residual(a.x, ops.prepare(Linear(a.w, a.b)), a.s if scaled else None, a.r),
        lambda a: a.r + (a.s if scaled else 1) * naive.linear(a.x, a.w, a.b),
    )


def project_qkv(B, N, D, H) -> Case:
    arrays = draw({"x": (B, N, D), "q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "bq": (D,), "bv": (D,)})

    def run(ops, a):
        p = Attention(Linear(a.q, a.bq), Linear(a.k, None), Linear(a.v, a.bv), Linear(a.o, a.bq))
        return ops.project_qkv(a.x, ops.prepare(p), H)

    def truth(a):
        parts = (naive.linear(a.x, w, b) for w, b in ((a.q, a.bq), (a.k, None), (a.v, a.bv)))
        return tuple(naive.split_heads(part, H) for part in parts)

    return Case("project_qkv", arrays, run, truth)


def attention(B, H, grid, d, bias=True, scale=1.0, probs=False, keep=False, equal=False) -> Case:
    N = 1 + grid[0] * grid[1]
    arrays = draw({"q": (B, H, N, d), "k": (B, H, N, d), "v": (B, H, N, d), "t": (table_rows(grid), H)}, scale=scale)
    arrays["keep"] = np.where(np.random.default_rng(1).random((B, H, N, N)) < 0.7, np.float32(1.25), np.float32(0))
    if equal:
        arrays["q"] = np.zeros_like(arrays["q"])

    def run(ops, a):
        p = PositionBias(a.t, relative_position_index(ops, grid), grid) if bias else None
        return ops.attention(a.q, a.k, a.v, p, return_probs=probs, keep=a.keep if keep else None)

    def truth(a):
        b = naive.position_bias(a.t, grid) if bias else None
        context, maps = naive.attention(a.q, a.k, a.v, b, a.keep if keep else None)
        return (context, maps) if probs else context

    return Case("attention", arrays, run, truth)


def batch_norm_of(a) -> BatchNorm:
    return BatchNorm(a.g, a.b, a.m, np.abs(a.v) + 0.5)


def unit_arrays(shape, out, kernel, seed=0) -> dict[str, np.ndarray]:
    channels = {name: (out,) for name in "gbmv"}
    return draw({"x": shape, "w": (out, shape[1], kernel, kernel), "c": (out,), **channels}, seed)


def naive_unit(x, a) -> np.ndarray:
    y = naive.batch_norm(naive.conv2d(x, a.w, None), a.g, a.b, a.m, np.abs(a.v) + 0.5)
    return naive.activation(y, "relu")


def conv2d(shape, out, kernel, bias=True) -> Case:
    return Case(
        "conv2d",
        unit_arrays(shape, out, kernel),
        lambda ops, a: ops.conv2d(a.x, ops.prepare(Conv(a.w, a.c if bias else None))),
        lambda a: naive.conv2d(a.x, a.w, a.c if bias else None),
    )


def conv_bn_relu(shape, out, kernel) -> Case:
    return Case(
        "conv_bn_relu",
        unit_arrays(shape, out, kernel),
        lambda ops, a: ops.conv_bn_relu(a.x, ops.prepare(ConvBatchNorm(Conv(a.w, None), batch_norm_of(a)))),
        lambda a: naive_unit(a.x, a),
    )


def conv_bn_relu_resized(shapes, out, size) -> Case:
    channels = sum(shape[1] for shape in shapes)
    arrays = unit_arrays((1, channels, 1, 1), out, 3)
    arrays.update(draw({f"x{i}": shape for i, shape in enumerate(shapes)}, seed=1))

    def maps(a):
        return [getattr(a, f"x{i}") for i in range(len(shapes))]

    return Case(
        "conv_bn_relu_resized",
        arrays,
        lambda ops, a: ops.conv_bn_relu_resized(
            maps(a), ops.prepare(ConvBatchNorm(Conv(a.w, None), batch_norm_of(a))), size
        ),
        lambda a: naive_unit(np.concatenate([naive.resize_bilinear(x, size) for x in maps(a)], 1), a),
    )


def conv_transpose(shape, out) -> Case:
    return Case(
        "conv_transpose",
        draw({"x": shape, "w": (shape[1], out, 2, 2), "b": (out,)}),
        lambda ops, a: ops.conv_transpose(a.x, ops.prepare(ConvTranspose(a.w, a.b))),
        lambda a: naive.conv_transpose(a.x, a.w, a.b),
    )


def conv_transpose_bn_gelu(shape, out) -> Case:
    arrays = {**draw({n: (out,) for n in "gbmv"}, 1), **draw({"x": shape, "w": (shape[1], out, 2, 2), "c": (out,)})}

    def run(ops, a):
        deconv, bn = ops.prepare(ConvTranspose(a.w, a.c)), ops.prepare(batch_norm_of(a))
        return ops.conv_transpose_bn_gelu(a.x, deconv, bn)

    def truth(a):
        y = naive.conv_transpose(a.x, a.w, a.c)
        return naive.activation(naive.batch_norm(y, a.g, a.b, a.m, np.abs(a.v) + 0.5), "gelu")

    return Case("conv_transpose_bn_gelu", arrays, run, truth)


def on_map(op, shape, *args) -> Case:
    """An op on one map without weights; the loops have a function of the same name."""
    return Case(
        op, draw({"x": shape}), lambda ops, a: getattr(ops, op)(a.x, *args), lambda a: getattr(naive, op)(a.x, *args)
    )


def concatenate() -> Case:  # the shorter batch is repeated, as a CLS token is
    return Case(
        "concatenate",
        draw({"x": (1, 1, 4), "y": (3, 2, 4)}),
        lambda ops, a: ops.concatenate([a.x, a.y], 1),
        lambda a: np.stack([np.stack([a.x[0, 0], a.y[b, 0], a.y[b, 1]]) for b in range(3)]),
    )


def concatenate_first_axis() -> Case:
    return Case(
        "concatenate",
        draw({"x": (1, 4), "y": (3, 4)}),
        lambda ops, a: ops.concatenate([a.x, a.y], 0),
        lambda a: np.stack([a.x[0], *a.y]),
    )


def cross_entropy(n, K, ignored=(), scale=1.0) -> Case:
    arrays = draw({"x": (n, K)}, scale=scale)
    arrays["y"] = np.random.default_rng(2).integers(0, K, n)
    arrays["y"][list(ignored)] = 255
    return Case(
        "cross_entropy",
        arrays,
        lambda ops, a: ops.cross_entropy(a.x, a.y, 255),
        lambda a: naive.cross_entropy(a.x, a.y, 255),
    )


def loss(op, shape, scale=1.0) -> Case:
    arrays = draw({"x": shape, "y": shape}, scale=scale)
    if op == "bce_with_logits":
        arrays["y"] = (arrays["y"] > 0).astype(np.float32)
    return Case(op, arrays, lambda ops, a: getattr(ops, op)(a.x, a.y), lambda a: getattr(naive, op)(a.x, a.y))


def kept(shape, keep_shape, scaled) -> Case:
    """`linear_residual` with the factors of dropout."""
    arrays = linear_residual(shape, 7, True).arrays
    arrays["keep"] = np.where(np.random.default_rng(1).random(keep_shape) < 0.7, np.float32(1.25), np.float32(0))
    return Case(
        "linear_residual",
        arrays,
        lambda ops, a: ops.linear_residual(a.x, ops.prepare(Linear(a.w, a.b)), a.s if scaled else None, a.r, a.keep),
        lambda a: a.r + a.keep * (a.s if scaled else 1) * naive.linear(a.x, a.w, a.b),
    )


def glue(op, shapes, truth, *more) -> Case:
    return Case(op, draw(shapes), lambda ops, a: getattr(ops, op)(*vars(a).values(), *more), truth)


def mask_tokens(B, P, D) -> Case:
    arrays = draw({"x": (B, P, D), "m": (B, P), "t": (1, 1, D)})
    arrays["m"] = arrays["m"] > 0
    return Case(
        "mask_tokens",
        arrays,
        lambda ops, a: ops.mask_tokens(a.x, a.m, a.t),
        lambda a: np.array([[a.t[0, 0] if m else x for x, m in zip(*pair)] for pair in zip(a.x, a.m)]),
    )


def soft_cross_entropy(n, K) -> Case:
    arrays = draw({"x": (n, K), "y": (n, K)})
    arrays["y"] = np.abs(arrays["y"])

    def truth(a):
        rows = [-naive.dot(y.tolist(), np.log(naive.softmax(x.tolist())).tolist()) for x, y in zip(a.x, a.y)]
        return np.mean(rows)

    return Case("soft_cross_entropy", arrays, lambda ops, a: ops.soft_cross_entropy(a.x, a.y), truth)


def smoothed(n, K, smoothing) -> Case:
    arrays = cross_entropy(n, K, ignored=[1]).arrays

    def truth(a):
        plain = naive.cross_entropy(a.x, a.y, 255)
        counted = a.x[a.y != 255]
        every = np.mean([naive.cross_entropy(counted, np.full(len(counted), k), 255) for k in range(K)])
        return (1 - smoothing) * plain + smoothing * every

    return Case("cross_entropy", arrays, lambda ops, a: ops.cross_entropy(a.x, a.y, 255, smoothing), truth)


CASES = {
    "layer_norm": layer_norm((2, 5, 12)),
    "layer_norm one row": layer_norm((1, 1, 7)),
    "layer_norm eps": layer_norm((3, 33), eps=1e-2),
    "layer_norm no leading axes": layer_norm((16,)),
    "layer_norm equal values": layer_norm((2, 3, 8), 1e-6, lambda x: np.full(x.shape, 0.5)),
    "layer_norm large mean": layer_norm((2, 3, 64), 1e-6, lambda x: np.float32(16) + x),
    "linear": linear((2, 5, 12), 7),
    "linear no bias": linear((1, 7, 12), 15, bias=False),
    "linear one number": linear((1, 1), 1),
    "linear wide": linear((3, 70), 130),
    "linear patch": linear((2, 3, 48), 5, weight_shape=(5, 3, 4, 4)),
    **{f"linear_activation {name}": linear_activation(name) for name in sorted(naive.ACTIVATIONS)},
    "linear_activation one row": linear_activation("gelu", (1, 5), 3),
    "linear_activation huge": linear_activation("gelu", scale=30.0),
    "linear_residual": linear_residual((2, 5, 12), 7, scaled=True),
    "linear_residual unscaled": linear_residual((1, 1, 3), 9, scaled=False),
    "linear_residual keep": kept((2, 5, 12), (2, 5, 7), scaled=True),
    "linear_residual keep samples": kept((2, 5, 12), (2, 1, 1), scaled=False),
    "add": glue("add", {"x": (2, 3, 4), "y": (1, 3, 4)}, lambda a: a.x + a.y),
    "dropout": glue("dropout", {"x": (2, 3, 4), "y": (2, 1, 1)}, lambda a: a.x * a.y),
    "mask_tokens": mask_tokens(2, 5, 3),
    "mean_patches": glue("mean_patches", {"x": (2, 7, 3)}, lambda a: a.x[:, 1:].sum(1) / 6),
    "first_token": glue("first_token", {"x": (2, 7, 3)}, lambda a: a.x[:, 0]),
    "tokens_to_map": glue(
        "tokens_to_map",
        {"x": (2, 7, 4)},
        lambda a: np.array(
            [[[[x[1 + 2 * i + j, d] for j in (0, 1)] for i in (0, 1, 2)] for d in range(4)] for x in a.x]
        ),
        (3, 2),
    ),
    "project_qkv": project_qkv(2, 5, 12, 3),
    "project_qkv one head": project_qkv(1, 1, 5, 1),
    "attention": attention(2, 3, (2, 2), 8),
    "attention odd grid": attention(1, 2, (3, 5), 4),
    "attention one patch": attention(3, 2, (1, 1), 4),
    "attention one head": attention(1, 1, (2, 3), 7),
    "attention head size 1": attention(1, 2, (2, 2), 1),
    "attention no bias": attention(2, 2, (4, 1), 4, bias=False),
    "attention huge logits": attention(1, 2, (3, 2), 8, scale=30.0),
    "attention equal rows": attention(1, 2, (3, 2), 8, bias=False, equal=True),
    "attention probs": attention(2, 2, (2, 3), 4, probs=True),
    "attention keep": attention(2, 2, (2, 3), 4, keep=True),
    "attention probs keep": attention(1, 2, (2, 3), 4, probs=True, keep=True),
    "conv2d 1x1": conv2d((2, 5, 3, 4), 6, 1),
    "conv2d 3x3": conv2d((2, 3, 5, 4), 4, 3),
    "conv2d one pixel": conv2d((1, 3, 1, 1), 4, 3, bias=False),
    "conv2d row": conv2d((1, 2, 1, 7), 1, 3),
    "conv_bn_relu 1x1": conv_bn_relu((2, 5, 3, 4), 6, 1),
    "conv_bn_relu 3x3": conv_bn_relu((1, 3, 4, 5), 4, 3),
    "conv_bn_relu_resized": conv_bn_relu_resized([(1, 2, 6, 4), (1, 3, 3, 2), (1, 1, 1, 1)], 4, (6, 4)),
    "conv_bn_relu_resized odd": conv_bn_relu_resized([(2, 2, 5, 3), (2, 2, 2, 1)], 3, (5, 3)),
    "conv_transpose": conv_transpose((2, 3, 2, 3), 4),
    "conv_transpose one pixel": conv_transpose((1, 1, 1, 1), 1),
    "conv_transpose_bn_gelu": conv_transpose_bn_gelu((2, 3, 2, 3), 4),
    "max_pool2x2": on_map("max_pool2x2", (2, 3, 4, 6)),
    "max_pool2x2 odd": on_map("max_pool2x2", (1, 2, 5, 3)),
    **{f"adaptive_avg_pool {size}": on_map("adaptive_avg_pool", (2, 2, 5, 3), size) for size in (1, 2, 3, 6)},
    "resize_bilinear up": on_map("resize_bilinear", (2, 2, 3, 5), (7, 9)),
    "resize_bilinear double": on_map("resize_bilinear", (1, 2, 3, 2), (6, 4)),
    "resize_bilinear down": on_map("resize_bilinear", (1, 2, 9, 7), (4, 2)),
    "resize_bilinear same": on_map("resize_bilinear", (1, 2, 3, 4), (3, 4)),
    "resize_bilinear one pixel": on_map("resize_bilinear", (1, 2, 1, 1), (3, 2)),
    "resize_bicubic up": on_map("resize_bicubic", (1, 2, 3, 5), (7, 9)),
    "resize_bicubic down": on_map("resize_bicubic", (2, 2, 9, 7), (4, 3)),
    "resize_bicubic one pixel": on_map("resize_bicubic", (1, 2, 1, 1), (3, 2)),
    "concatenate": concatenate(),
    "concatenate first axis": concatenate_first_axis(),
    "cross_entropy": cross_entropy(11, 5),
    "cross_entropy ignored": cross_entropy(6, 3, ignored=[1, 4]),
    "cross_entropy huge logits": cross_entropy(9, 4, scale=1e4),
    "cross_entropy one row": cross_entropy(1, 2),
    "cross_entropy smoothing": smoothed(6, 4, 0.1),
    "soft_cross_entropy": soft_cross_entropy(5, 4),
    "mse_loss": loss("mse_loss", (4, 3)),
    "bce_with_logits": loss("bce_with_logits", (4, 3)),
    "bce_with_logits huge": loss("bce_with_logits", (4, 3), scale=1e4),
}


def test_every_op_has_a_case():
    # The others are tested below, those for files in test_prepared.py.
    assert {case.op for case in CASES.values()} | NO_ARITHMETIC == set(reference.__all__)


@pytest.mark.parametrize("name", CASES)
def test_float64_equals_loops(name):
    case = CASES[name]
    for found, truth in zip(case.results(REFERENCE, "float64"), case.truths(), strict=True):
        assert found.dtype == np.float64
        assert distance(found, truth) <= NAIVE_OP


def errors(case: Case, ops: Any) -> list[tuple[float, float]]:
    """(distance from the loops in EPS32, the distance that is luck) of every result."""
    pairs = list(zip(case.results(ops, "float32"), case.truths(), strict=True))
    assert all(found.dtype == np.float32 for found, _ in pairs)
    return [(distance(found, truth) / EPS32, FLOOR if truth.size >= FEW else FEW_FLOOR) for found, truth in pairs]


@pytest.mark.parametrize("name", CASES)
def test_float32_beside_loops(name, ops):
    case = CASES[name]
    for (found, luck), (own, _) in zip(errors(case, ops), errors(case, REFERENCE), strict=True):
        limit = OP32_CASES.get(name, OP32) if ops.backend == "numpy" else FACTOR * max(own, luck)
        assert found <= limit, f"{found:.2f} EPS32 from the truth, NumPy {own:.2f}"


@pytest.mark.parametrize("name", CASES)
def test_arguments_stay_as_they_are(name, ops):
    case = CASES[name]
    given, before = case.given("float32"), case.given("float32")
    case.run(ops, given)
    for key, array in vars(before).items():
        assert np.array_equal(getattr(given, key), array), key


def test_nan_and_infinity_pass_through(ops):
    x = np.ones((2, 4), np.float32)
    x[1, 2] = np.nan
    layer = ops.prepare(Linear(np.ones((3, 4), np.float32), None))
    for y in (ops.linear(x, layer), ops.linear_activation(x, layer, "relu"), ops.linear_activation(x, layer, "gelu")):
        assert np.isfinite(y[0]).all()
        assert np.isnan(y[1]).all()


def test_cross_entropy_of_nothing_is_nan(ops):
    assert np.isnan(ops.cross_entropy(np.zeros((2, 3), np.float32), np.array([255, 255]), 255))


@pytest.mark.parametrize("wrong", [-1, 3, 254])
def test_cross_entropy_refuses_labels_out_of_range(ops, wrong):
    with pytest.raises(ValueError, match=rf"labels: expected class numbers 0 to 2 \(or 255 to ignore\), found {wrong}"):
        ops.cross_entropy(np.zeros((2, 3), np.float32), np.array([0, wrong]), 255)


def test_array_ops(ops):
    x = ops.asarray([[1, 2]], "float32")
    assert x.dtype == np.float32
    assert ops.asarray(x, "float32") is x
    assert ops.to_host(ops.asarray(ops.stage([[3, 4]], "float32"), "float32")).tolist() == [[3, 4]]
    assert ops.to_host(x).tolist() == [[1, 2]]
    assert ops.to_host(ops.arange(3)).tolist() == [0, 1, 2]
    assert ops.to_host(ops.zeros((2, 1), "int32")).tolist() == [[0], [0]]
    assert ops.all_finite(x)
    assert not ops.all_finite(ops.asarray([1, np.inf], "float32"))
    assert not ops.all_finite(ops.asarray([1, np.nan], "float64"))


def test_namespace():
    ops = get_ops("numpy")
    assert set(ops.origin) == set(reference.__all__)
    assert set(ops.origin.values()) == {"numpy"}
    assert "numpy" in BACKENDS
    with pytest.raises(ValueError, match=r"backend: expected one of numpy.*found 'tensor'"):
        get_ops("tensor")


def test_only_switches_single_ops_on():
    pytest.importorskip("numba")
    ops = get_ops("numba", only=["linear"])
    assert {name for name, origin in ops.origin.items() if origin == "numba"} == {"linear"}
    with pytest.raises(ValueError, match="only: backend numba has no op named lineer"):
        get_ops("numba", only=["lineer"])


def test_backend_from_the_environment(monkeypatch):
    monkeypatch.setenv("MINIBEIT_BACKEND", "numpy")
    assert get_ops().backend == "numpy"


def test_activation_names_are_those_of_the_loops():
    assert set(activations.ACTIVATIONS) == set(naive.ACTIVATIONS)
