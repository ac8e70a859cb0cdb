"""Every op of the seam on arrays that bring out its edges, each call beside plain loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import naive
import numpy as np

from minibeit.ops import PositionBias
from minibeit.params import (
    Attention,
    BatchNorm,
    Conv,
    ConvBatchNorm,
    ConvTranspose,
    LayerNorm,
    Linear,
    ReluConv,
    table_rows,
)


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
        return listed(self.run(ops, self.given(dtype)))

    def truths(self) -> list[np.ndarray]:
        return listed(self.truth(self.given("float64")))


def listed(result: Any) -> list[np.ndarray]:
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


def linear_residual_kept(shape, out) -> Case:
    case = linear_residual(shape, out, True)
    case.arrays["k"] = np.where(np.random.default_rng(1).random((shape[0], 1, 1)) < 0.5, np.float32(2), np.float32(0))
    return Case(
        "linear_residual",
        case.arrays,
        lambda ops, a: ops.linear_residual(a.x, ops.prepare(Linear(a.w, a.b)), a.s, a.r, a.k),
        lambda a: a.r + a.k * a.s * naive.linear(a.x, a.w, a.b),
    )


def mask_tokens(B, P, D) -> Case:
    arrays = draw({"x": (B, P, D), "t": (1, 1, D)})
    arrays["m"] = np.random.default_rng(1).random((B, P)) < 0.4
    return Case(
        "mask_tokens",
        arrays,
        lambda ops, a: ops.mask_tokens(a.x, a.m, a.t),
        lambda a: naive.mask_tokens(a.x, a.m, a.t),
    )


def elementwise(op, shape, other, function) -> Case:
    return Case(
        op, draw({"x": shape, "y": other}), lambda ops, a: getattr(ops, op)(a.x, a.y), lambda a: function(a.x, a.y)
    )


def mean_patches(B, N, D) -> Case:
    return Case(
        "mean_patches", draw({"x": (B, N, D)}), lambda ops, a: ops.mean_patches(a.x), lambda a: naive.mean_patches(a.x)
    )


def tokens_to_map(B, grid, D) -> Case:
    return Case(
        "tokens_to_map",
        draw({"x": (B, 1 + grid[0] * grid[1], D)}),
        lambda ops, a: ops.tokens_to_map(a.x, grid),
        lambda a: naive.tokens_to_map(a.x, grid),
    )


def masked_patches(B, P, D) -> Case:
    arrays = {**draw({"x": (B, P, D)}), "m": np.random.default_rng(1).random((B, P)) < 0.4}
    return Case(
        "masked_patches",
        arrays,
        lambda ops, a: ops.masked_patches(a.x, a.m),
        lambda a: np.stack([a.x[b, p] for b in range(B) for p in range(P) if a.m[b, p]]),
    )


def soft_cross_entropy(n, K) -> Case:
    arrays = draw({"x": (n, K)})
    target = np.random.default_rng(2).random((n, K)).astype(np.float32)
    arrays["y"] = target / target.sum(1, keepdims=True)
    return Case(
        "soft_cross_entropy",
        arrays,
        lambda ops, a: ops.soft_cross_entropy(a.x, a.y),
        lambda a: naive.soft_cross_entropy(a.x, a.y),
    )


def gumbel_softmax(B, V, h, w, temperature) -> Case:
    return Case(
        "gumbel_softmax",
        draw({"x": (B, V, h, w), "y": (B, V, h, w)}),
        lambda ops, a: ops.gumbel_softmax(a.x, a.y, temperature),
        lambda a: naive.gumbel_softmax(a.x, a.y, temperature),
    )


def divergence_from_uniform(B, V, h, w) -> Case:
    return Case(
        "divergence_from_uniform",
        draw({"x": (B, V, h, w)}),
        lambda ops, a: ops.divergence_from_uniform(a.x),
        lambda a: naive.divergence_from_uniform(a.x),
    )


def logit_laplace_loss(B, C, h, w) -> Case:
    arrays = draw({"x": (B, 2 * C, h, w)})
    arrays["y"] = np.random.default_rng(2).uniform(0.1, 0.9, (B, C, h, w)).astype(np.float32)
    return Case(
        "logit_laplace_loss",
        arrays,
        lambda ops, a: ops.logit_laplace_loss(a.x, a.y),
        lambda a: naive.logit_laplace_loss(a.x, a.y),
    )


def weighted_sum() -> Case:
    return Case(
        "weighted_sum",
        draw({"x": (), "y": ()}),
        lambda ops, a: ops.weighted_sum([a.x, a.y], (1.0, 0.5)),
        lambda a: a.x + 0.5 * a.y,
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
        p = PositionBias(a.t, grid) if bias else None
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


def relu_conv2d(shape, out, kernel) -> Case:
    return Case(
        "relu_conv2d",
        unit_arrays(shape, out, kernel),
        lambda ops, a: ops.relu_conv2d(a.x, ops.prepare(ReluConv(a.w, a.c))),
        lambda a: naive.conv2d(naive.activation(a.x, "relu"), a.w, a.c),
    )


def relu_conv2d_residual(shape, out, kernel, gain) -> Case:
    arrays = {**unit_arrays(shape, out, kernel), **draw({"r": (shape[0], out, *shape[2:])}, 1)}
    return Case(
        "relu_conv2d_residual",
        arrays,
        lambda ops, a: ops.relu_conv2d_residual(a.x, ops.prepare(ReluConv(a.w, a.c)), gain, a.r),
        lambda a: a.r + gain * naive.conv2d(naive.activation(a.x, "relu"), a.w, a.c),
    )


def conv2d_one_hot(B, h, w, V, out, bias=True) -> Case:
    arrays = draw({"w": (out, V, 1, 1), "b": (out,)})
    arrays["ids"] = np.random.default_rng(1).integers(0, V, (B, h, w))
    return Case(
        "conv2d_one_hot",
        arrays,
        lambda ops, a: ops.conv2d_one_hot(ops.asarray(a.ids, "int64"), ops.prepare(Conv(a.w, a.b if bias else None))),
        lambda a: naive.conv2d(naive.one_hot(a.ids, V), a.w, a.b if bias else None),
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
    "conv2d 7x7 small": conv2d((2, 1, 4, 5), 3, 7),
    "relu_conv2d 1x1": relu_conv2d((2, 5, 3, 4), 6, 1),
    "relu_conv2d 3x3": relu_conv2d((2, 3, 5, 4), 5, 3),
    "relu_conv2d one pixel": relu_conv2d((1, 3, 1, 1), 4, 3),
    "relu_conv2d_residual 1x1": relu_conv2d_residual((2, 5, 3, 4), 6, 1, 0.25),
    "relu_conv2d_residual 3x3": relu_conv2d_residual((1, 3, 5, 4), 5, 3, 1 / 9),
    "conv2d_one_hot": conv2d_one_hot(2, 3, 2, 7, 5),
    "conv2d_one_hot no bias": conv2d_one_hot(1, 1, 1, 1, 3, bias=False),
    "upsample2x2": on_map("upsample2x2", (2, 3, 2, 3)),
    "upsample2x2 one pixel": on_map("upsample2x2", (1, 1, 1, 1)),
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
    "linear_residual kept": linear_residual_kept((3, 4, 12), 9),
    "mask_tokens": mask_tokens(2, 5, 3),
    "add": elementwise("add", (2, 3, 4), (2, 3, 4), lambda x, y: x + y),
    "add broadcast": elementwise("add", (2, 3, 4), (1, 3, 4), lambda x, y: x + y),
    "dropout": elementwise("dropout", (2, 3, 4), (2, 1, 1), lambda x, y: x * y),
    "mean_patches": mean_patches(2, 6, 5),
    "mean_patches one patch": mean_patches(1, 2, 3),
    "tokens_to_map": tokens_to_map(2, (3, 2), 4),
    "masked_patches": masked_patches(2, 5, 3),
    "weighted_sum": weighted_sum(),
    "cross_entropy": cross_entropy(11, 5),
    "cross_entropy ignored": cross_entropy(6, 3, ignored=[1, 4]),
    "cross_entropy huge logits": cross_entropy(9, 4, scale=1e4),
    "cross_entropy one row": cross_entropy(1, 2),
    "soft_cross_entropy": soft_cross_entropy(7, 5),
    "gumbel_softmax": gumbel_softmax(2, 5, 3, 2, 0.7),
    "gumbel_softmax of one token": gumbel_softmax(1, 1, 2, 1, 1.0),
    "divergence_from_uniform": divergence_from_uniform(2, 5, 3, 2),
    "logit_laplace_loss": logit_laplace_loss(2, 3, 3, 2),
    "mse_loss": loss("mse_loss", (4, 3)),
    "bce_with_logits": loss("bce_with_logits", (4, 3)),
    "bce_with_logits huge": loss("bce_with_logits", (4, 3), scale=1e4),
}
