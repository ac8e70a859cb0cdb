"""The one table of ops: what the model asks of a backend.

`Ops` is the signature of the seam: each of its methods is an op.  The decorator above a method gives the rest: the kind
of op, the shape of its result, its products, its error budget and the backends that have a fast version.  Everything
that needs a list of ops reads it from `TABLE`: `get_ops`, the backends, the verifier, the profile and the tests.  The
function of the same name in `reference/` defines what an op computes.

Letters: B batch, N tokens, P patches, D width, H heads, d head size, K classes, C channels, h x w map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

Array = Any
Shape = tuple[int, ...]
Function = TypeVar("Function", bound=Callable[..., Any])

ARITHMETIC = "arithmetic"  # computes new values
ARRAYS = "arrays"  # makes, moves, joins or checks arrays, without computing new values
CONTROL = "control"  # prepares or updates weights, or says how the other ops run


@dataclass(frozen=True)
class PositionBias:
    """bias[h, a, b] = table[index[a, b], h] for query token a and key token b.

    `index` is `relative_position_index(grid)`; a fast op computes its entries where it needs them.
    """

    table: Array  # (R, H)
    grid: tuple[int, int]  # (gh, gw)


@dataclass(frozen=True)
class Op:
    """The properties of an op beside its signature.

    `shape` computes the shape of the result (a list of shapes for several) from the arguments of a call, without
    reading elements; `products` the number of multiplications of the direct method, from the arguments and the result.
    `error_budget` is the op's allowed error as a multiple of that of other ops.  `backwards` are the
    backends with a `NAME_backward` of their own.
    """

    name: str
    kind: str = ARITHMETIC
    shape: Callable[..., Any] | None = None
    products: Callable[..., int] | None = None
    backends: tuple[str, ...] = ()
    error_budget: float = 1.0
    backwards: tuple[str, ...] = ()

    @property
    def is_arithmetic(self) -> bool:
        """Whether the op computes new values."""
        return self.kind == ARITHMETIC


TABLE: dict[str, Op] = {}


def op(**facts: Any) -> Callable[[Function], Function]:
    """Enters the method below into `TABLE`; `facts` are the fields of `Op`."""

    def enter(method: Function) -> Function:
        TABLE[method.__name__] = Op(method.__name__, **facts)
        return method

    return enter


def names_of(*kinds: str) -> set[str]:
    """The names of the ops of these kinds."""
    return {name for name, entry in TABLE.items() if entry.kind in kinds}


def fast_backwards(backend: str) -> tuple[str, ...]:
    """The names of the ops that `backend` has a backward of its own of."""
    return tuple(name for name, entry in TABLE.items() if backend in entry.backwards)


def served_by(backend: str) -> tuple[str, ...]:
    """The names of the ops of which `backend` has its own version."""
    return tuple(name for name, entry in TABLE.items() if backend in entry.backends)


# Shapes of results and products -------------------------------------------------------------------------------------

FAST = ("numba", "cupy")
GPU = ("cupy",)
CPU = ("numba",)
# Winograd's convolutions trade accuracy for speed: up to 5.5 times NumPy's error was measured, 10.1 times at the worst
# element.  A bug in a convolution causes thousands of times that error.
WINOGRAD = 3.0


def _same(x: Array, *_: Any, **__: Any) -> Shape:
    return tuple(x.shape)


def _scalar(*_: Any, **__: Any) -> Shape:
    return ()


def _broadcast(x: Array, y: Array) -> Shape:
    ndim = max(x.ndim, y.ndim)
    padded = [(1,) * (ndim - array.ndim) + tuple(array.shape) for array in (x, y)]
    return tuple(b if a == 1 else a for a, b in zip(*padded))


def _linear(x: Array, layer: Any, *_: Any, **__: Any) -> Shape:
    return (*x.shape[:-1], layer.weight.shape[0])


def _qkv(x: Array, p: Any, num_heads: int) -> list[Shape]:
    B, N, D = x.shape
    return [(B, num_heads, N, D // num_heads)] * 3


def _attention(
    q: Array, k: Array, v: Array, bias: Any, return_probs: bool = False, keep: Any = None
) -> Shape | list[Shape]:
    B, H, N, d = q.shape
    return [(B, N, H * d), (B, H, N, N)] if return_probs else (B, N, H * d)


def _joined(arrays: Sequence[Array], axis: int) -> Shape:
    first, *rest = max((tuple(array.shape) for array in arrays), key=lambda shape: shape[0])
    shape = [first, *rest]
    shape[axis] = sum(array.shape[axis] for array in arrays)
    return tuple(shape)


def _convolved(x: Array, conv: Any) -> Shape:
    return (x.shape[0], conv.weight.shape[0], *x.shape[2:])


def _conv_transposed(x: Array, deconv: Any, *_: Any) -> Shape:
    return (x.shape[0], deconv.weight.shape[1], 2 * x.shape[2], 2 * x.shape[3])


def _resized(x: Array, size: Sequence[int]) -> Shape:
    return (*x.shape[:2], *size)


def _linear_products(args: Sequence[Any], result: Array) -> int:
    return result.size * args[0].shape[-1]


def _attention_products(args: Sequence[Any], result: Any) -> int:
    q = args[0]  # (B, H, N, d)
    return 2 * q.size * q.shape[2]


def _conv_products(args: Sequence[Any], result: Array) -> int:
    return result.size * args[0].shape[1] * _taps(args[1])


def _taps(layer: Any) -> int:
    """Positions in the kernel window.

    Packed layers have a `kernel` (height, width), `taps` (one matrix each) or 3x3 `parts`, or are linear.
    """
    weight: Any = getattr(getattr(layer, "conv", layer), "weight", None)
    if len(getattr(weight, "shape", ())) == 4:
        return math.prod(weight.shape[2:])
    if hasattr(layer, "kernel"):
        return math.prod(layer.kernel)
    if hasattr(layer, "taps"):
        return len(layer.taps)
    return 9 if hasattr(layer, "parts") else 1


# The ops ------------------------------------------------------------------------------------------------------------


class Ops(Protocol):
    """The namespace that `get_ops` returns: all ops of one backend, each from the backend itself or from NumPy."""

    backend: str
    origin: Mapping[str, str]  # op -> the backend whose code serves it

    # How ops run

    @op(kind=CONTROL, backends=FAST)
    def prepare(self, params: Any) -> Any: ...

    @op(kind=CONTROL, backends=("numba",))
    def dump(self, params: Any) -> tuple[str, dict[str, Array]]: ...

    @op(kind=CONTROL, backends=("numba",))
    def restore(self, shapes: Any, layout: str, arrays: Mapping[str, Array]) -> Any: ...

    @op(kind=CONTROL, backends=FAST)
    def num_threads(self, count: int | None) -> AbstractContextManager[Any]: ...

    @op(kind=CONTROL, backends=("numba",))
    def queued(self, wanted: bool = True) -> AbstractContextManager[Any]: ...

    @op(kind=CONTROL)
    def recompute(self, function: Callable[..., Any], ops: Any, args: tuple[Any, ...]) -> Any: ...

    @op(kind=CONTROL, backends=CPU)
    def adamw(
        self,
        weights: Array,
        gradient: Array,
        mean: Array,
        square: Array,
        factors: tuple[float, float, tuple[float, float], float],
        step: int,
    ) -> None: ...

    # Arrays

    @op(kind=ARRAYS, backends=GPU)
    def stage(self, x: Any, dtype: str) -> Array: ...

    @op(kind=ARRAYS, backends=GPU)
    def asarray(self, x: Any, dtype: str) -> Array: ...

    @op(kind=ARRAYS, backends=GPU)
    def to_host(self, x: Array) -> Array: ...

    @op(kind=ARRAYS, backends=GPU, backwards=GPU, shape=_joined)
    def concatenate(self, arrays: Sequence[Array], axis: int) -> Array: ...

    @op(kind=ARRAYS, backends=GPU)
    def all_finite(self, x: Array, most: float | None = None) -> bool: ...

    @op(kind=ARRAYS, backends=GPU, backwards=GPU, shape=lambda x, grid: (x.shape[0], x.shape[2], *grid))
    def tokens_to_map(self, x: Array, grid: tuple[int, int]) -> Array: ...

    @op(kind=ARRAYS, backends=GPU, shape=lambda x: (x.shape[0], *x.shape[2:]))
    def argmax_channels(self, x: Array) -> Array: ...

    @op(kind=ARRAYS, backends=GPU, backwards=GPU)
    def masked_patches(self, x: Array, mask: Array) -> Array: ...

    @op(kind=ARRAYS, backends=GPU)
    def relative_position_index(self, grid: tuple[int, int]) -> Array: ...

    # The transformer

    @op(backends=GPU, backwards=GPU, shape=_same)
    def mask_tokens(self, x: Array, mask: Array, mask_token: Array) -> Array: ...

    @op(backends=GPU, backwards=GPU, shape=_broadcast)
    def add(self, x: Array, y: Array) -> Array: ...

    @op(backends=GPU, backwards=GPU, shape=_same)
    def dropout(self, x: Array, keep: Array) -> Array: ...

    @op(backends=FAST, backwards=FAST, shape=_same)
    def layer_norm(self, x: Array, norm: Any, eps: float) -> Array: ...

    @op(backends=FAST, backwards=FAST, shape=_linear, products=_linear_products)
    def linear(self, x: Array, layer: Any) -> Array: ...

    @op(backends=FAST, backwards=FAST, shape=_linear, products=_linear_products)
    def linear_activation(self, x: Array, layer: Any, activation: str) -> Array: ...

    @op(backends=FAST, backwards=FAST, shape=_linear, products=_linear_products)
    def linear_residual(
        self, x: Array, layer: Any, scale: Array | None, residual: Array, keep: Array | None = None
    ) -> Array: ...

    @op(
        backends=FAST,
        backwards=FAST,
        shape=_qkv,
        products=lambda args, result: sum(part.size for part in result) * args[0].shape[-1],
    )
    def project_qkv(self, x: Array, p: Any, num_heads: int) -> tuple[Array, Array, Array]: ...

    @op(backends=FAST, backwards=FAST, shape=_attention, products=_attention_products)
    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        bias: PositionBias | None,
        return_probs: bool = False,
        keep: Array | None = None,
    ) -> Any: ...

    @op(backends=GPU, backwards=GPU, shape=lambda x: (x.shape[0], x.shape[2]))
    def mean_patches(self, x: Array) -> Array: ...

    # Maps

    @op(backends=FAST, backwards=FAST, shape=_convolved, products=_conv_products)
    def conv2d(self, x: Array, conv: Any) -> Array: ...

    @op(backends=FAST, backwards=FAST, shape=_convolved, products=_conv_products, error_budget=WINOGRAD)
    def relu_conv2d(self, x: Array, conv: Any) -> Array: ...

    @op(
        backends=FAST,
        backwards=FAST,
        shape=lambda x, conv, *_: _convolved(x, conv),
        products=_conv_products,
        error_budget=WINOGRAD,
    )
    def relu_conv2d_residual(self, x: Array, conv: Any, gain: float, residual: Array) -> Array: ...

    @op(backends=FAST, shape=lambda ids, conv: (ids.shape[0], conv.weight.shape[0], *ids.shape[1:]))
    def conv2d_one_hot(self, ids: Array, conv: Any) -> Array: ...

    @op(
        backends=FAST,
        backwards=FAST,
        shape=lambda x, layer: _convolved(x, layer.conv),
        products=_conv_products,
        error_budget=WINOGRAD,
    )
    def conv_bn_relu(self, x: Array, layer: Any) -> Array: ...

    @op(
        backends=FAST,
        backwards=FAST,
        shape=lambda maps, layer, size: (maps[0].shape[0], layer.conv.weight.shape[0], *size),
        products=lambda args, result: result.size * sum(x.shape[1] for x in args[0]) * _taps(args[1]),
        error_budget=WINOGRAD,
    )
    def conv_bn_relu_resized(self, maps: Sequence[Array], layer: Any, size: tuple[int, int]) -> Array: ...

    @op(  # each pixel of the result is one product over the channels
        backends=FAST,
        backwards=FAST,
        shape=_conv_transposed,
        products=lambda args, result: result.size * args[0].shape[1],
    )
    def conv_transpose(self, x: Array, deconv: Any) -> Array: ...

    @op(
        backends=FAST,
        backwards=FAST,
        shape=_conv_transposed,
        products=lambda args, result: result.size * args[0].shape[1],
    )
    def conv_transpose_bn_gelu(self, x: Array, deconv: Any, bn: Any) -> Array: ...

    @op(backends=FAST, backwards=GPU, shape=lambda x: (*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2))
    def max_pool2x2(self, x: Array) -> Array: ...

    @op(backends=FAST, backwards=GPU, shape=lambda x: _resized(x, (2 * x.shape[2], 2 * x.shape[3])))
    def upsample2x2(self, x: Array) -> Array: ...

    @op(backends=FAST, backwards=GPU, shape=lambda x, size: _resized(x, (size, size)))
    def adaptive_avg_pool(self, x: Array, size: int) -> Array: ...

    @op(backends=FAST, backwards=FAST, shape=_resized)
    def resize_bilinear(self, x: Array, size: tuple[int, int]) -> Array: ...

    @op(backends=GPU, backwards=GPU, shape=_resized)
    def resize_bicubic(self, x: Array, size: tuple[int, int]) -> Array: ...

    # Training a tokenizer

    @op(backends=GPU, backwards=GPU, shape=_same)
    def gumbel_softmax(self, logits: Array, noise: Array, temperature: float) -> Array: ...

    @op(backends=GPU, backwards=GPU, shape=_scalar)
    def divergence_from_uniform(self, logits: Array) -> Array: ...

    @op(backends=GPU, backwards=GPU, shape=_scalar)
    def logit_laplace_loss(self, statistics: Array, pixels: Array) -> Array: ...

    # Losses

    @op(backends=FAST, backwards=FAST, shape=_scalar)
    def cross_entropy(self, logits: Array, labels: Array, ignore_index: int, smoothing: float = 0.0) -> Array: ...

    @op(backends=GPU, backwards=GPU, shape=_scalar)
    def soft_cross_entropy(self, logits: Array, target: Array) -> Array: ...

    @op(backends=GPU, backwards=GPU, shape=_scalar)
    def mse_loss(self, prediction: Array, target: Array) -> Array: ...

    @op(backends=GPU, backwards=GPU, shape=_scalar)
    def bce_with_logits(self, logits: Array, target: Array) -> Array: ...

    @op(backends=GPU, backwards=GPU, shape=_scalar)
    def weighted_sum(self, losses: Sequence[Array], weights: Sequence[float]) -> Array: ...
