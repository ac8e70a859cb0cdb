"""Training on maps on the numba backend: forward and backward beside NumPy's in float64, on any number of threads."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")

from conftest import distance, make, tiny_config
from test_numba_backward import OPS, arrays, check, mapped, normal
from tolerances import BACKWARD32, EPS32, WINOGRAD_BACKWARD32

from minibeit import BeitForSemanticSegmentation
from minibeit.ops import backward, reference
from minibeit.ops.backward.maps import BatchStatistics, Moments
from minibeit.ops.numba_cpu import halves, pool
from minibeit.ops.numba_cpu.backward_maps import Kept
from minibeit.ops.numba_cpu.target import NR
from minibeit.params import BatchNorm, Conv, ConvBatchNorm, ConvTranspose, flatten
from minibeit.train.gradients import value_and_grad

SIZES = [(4, 4), (5, 7), (16, 9), (13, 30)]
# Of a single pixel only with running statistics: two values of a channel become 1 and -1, and nothing is left of dx.
SIZES_AND_BATCH = [(size, batch) for size in SIZES for batch in (False, True)] + [((1, 1), False)]


def last(x):
    """The same map with its channels last in memory, as most ops leave it."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def norm_of(C):
    return BatchNorm(1 + 0.3 * normal(1, C), normal(2, C), normal(3, C), 1 + np.abs(normal(4, C)))


def conv_of(out, C, window, seed=5):
    weight = normal(seed, out, C, window, window, scale=(C * window**2) ** -0.5)
    return ConvBatchNorm(Conv(weight, None), norm_of(out))


def on_threads(run):
    """The results of run() on 1, 2 and 5 threads, which must have the same bits."""
    results = []
    for threads in (1, 2, 5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pool, "usable_cpus", lambda threads=threads: threads)
            with OPS.num_threads(threads):
                results.append(mapped(run(), np.copy))
    for other in results[1:]:
        assert all(map(np.array_equal, arrays(results[0]), arrays(other)))
    return results[0]


def both_halves(name, batch, tolerance, g, *args):
    """Forward and backward with running statistics or those of the batch, beside float64."""
    before = mapped((g, args), np.copy)

    def run():
        made, saved = getattr(OPS, f"{name}_forward")(*args, **({"statistics": BatchStatistics()} if batch else {}))
        assert isinstance(saved[0] if isinstance(saved, tuple) else saved, Kept)
        return made, getattr(OPS, f"{name}_backward")(g, saved, *args)

    found = arrays(on_threads(run))
    wide_g, wide = mapped((g, args), np.float64)
    options = {"statistics": BatchStatistics()} if batch else {}
    made, saved = getattr(backward, f"{name}_forward")(*wide, **options)
    expected = arrays((made, getattr(backward, f"{name}_backward")(wide_g, saved, *wide)))
    assert len(found) == len(expected) > 3
    for i, (a, b) in enumerate(zip(found, expected)):
        assert a.shape == b.shape and a.dtype == np.float32
        if np.abs(b).max() < 1e-9:  # a bias before a batch norm of the batch's own: no gradient at all
            assert batch and np.abs(a).max() < 1e-4
        else:
            assert distance(a, b) <= tolerance * EPS32, (name, i)
    assert all(map(np.array_equal, arrays((g, args)), arrays(before)))


@pytest.mark.parametrize("size, batch", SIZES_AND_BATCH)
def test_a_3x3_convolution(size, batch):
    B, C, out = 2, NR, 2 * NR
    x, g = normal(1, B, C, *size), last(normal(2, B, out, *size))
    both_halves("conv_bn_relu", batch, WINOGRAD_BACKWARD32, g, last(x) if size[0] % 2 else x, conv_of(out, C, 3))


def test_a_3x3_convolution_of_more_tiles_than_are_in_work_at_a_time():
    both_halves("conv_bn_relu", True, WINOGRAD_BACKWARD32, normal(2, 1, NR, 99, 84), normal(1, 1, NR, 99, 84),
                conv_of(NR, NR, 3))  # fmt: skip


@pytest.mark.parametrize("size, batch", SIZES_AND_BATCH)
def test_a_1x1_convolution(size, batch):
    x, g = normal(1, 3, 23, *size), normal(2, 3, 48, *size)
    both_halves("conv_bn_relu", batch, 2 * BACKWARD32, g, x, conv_of(48, 23, 1))


@pytest.mark.parametrize("batch", [False, True])
def test_a_3x3_convolution_of_enlarged_maps(batch):
    size = (11, 14)
    maps = [normal(1, 2, NR, *size), last(normal(3, 2, NR, 5, 7)), normal(4, 2, NR, 1, 1), normal(6, 2, NR, 3, 4)]
    layer = conv_of(NR, 4 * NR, 3)
    for some in (maps, [maps[1], maps[0], *maps[2:]]):
        both_halves("conv_bn_relu_resized", batch, WINOGRAD_BACKWARD32, normal(2, 2, NR, *size), some, layer, size)


@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
@pytest.mark.parametrize("C, out", [(7, 5), (48, 64), (33, 16)])
def test_a_transposed_convolution(size, C, out):
    deconv = ConvTranspose(normal(1, C, out, 2, 2), normal(2, out))
    x, g = normal(3, 2, C, *size), normal(4, 2, out, 2 * size[0], 2 * size[1])
    check("conv_transpose", g, None, last(x), deconv)
    found = OPS.conv_transpose(x, deconv)
    assert distance(found, reference.conv_transpose(*mapped((x, deconv), np.float64))) <= BACKWARD32 * EPS32
    if out % 16 == 0:
        for batch in (False, True):
            both_halves("conv_transpose_bn_gelu", batch, 2 * BACKWARD32, g, x, deconv, norm_of(out))


@pytest.mark.parametrize("old, new", [((3, 4), (9, 7)), ((1, 1), (4, 4)), ((5, 6), (5, 6)), ((9, 8), (4, 3))])
@pytest.mark.parametrize("C", [16, 7, 150])
def test_resizing(old, new, C):
    x, g = normal(1, 2, C, *old), normal(2, 2, C, *new)
    check("resize_bilinear", g, None, last(x), new)
    found = OPS.resize_bilinear(x, new)
    assert distance(found, reference.resize_bilinear(x.astype(np.float64), new)) <= BACKWARD32 * EPS32


def test_a_classifier_of_pixels():
    check("conv2d", normal(1, 2, 7, 5, 6), None, normal(2, 2, 48, 5, 6), Conv(normal(3, 7, 48, 1, 1), normal(4, 7)))
    check("conv2d", normal(1, 1, 7, 5, 6), None, normal(2, 1, 4, 5, 6), Conv(normal(3, 7, 4, 3, 3), normal(4, 7)))


def test_statistics_of_channels_far_from_zero():
    x, layer = normal(1, 2, NR, 8, 8), conv_of(NR, NR, 1)
    layer = ConvBatchNorm(Conv(np.eye(NR, dtype=np.float32)[:, :, None, None], None), layer.bn)
    x += 1000 * normal(2, NR)[:, None, None]
    seen = []
    statistics = BatchStatistics(reduce=lambda sums: seen.append(sums) or sums)
    _, kept = OPS.conv_bn_relu_forward(x, layer, statistics=statistics)
    truth = np.array(kept.y, np.float64)
    assert distance(kept.moments.mean, truth.mean((0, 1, 2))) < EPS32 and len(seen) == 2
    assert distance(kept.moments.var, truth.var((0, 1, 2))) < 2 * EPS32
    running = statistics.running({"m": layer.bn.running_mean, "v": layer.bn.running_var})
    assert set(running) == {"m", "v"} and isinstance(kept.moments, Moments)


def test_what_the_kernels_do_not_serve_is_numpys():
    x, g = normal(1, 1, 5, 6, 6), normal(2, 1, 7, 6, 6)
    layer = conv_of(7, 5, 3)
    made, saved = OPS.conv_bn_relu_forward(x, layer)
    plain, _ = backward.conv_bn_relu_forward(x, layer)
    assert np.array_equal(made, plain) and not isinstance(saved, Kept)
    found, truth = OPS.conv_bn_relu_backward(g, saved, x, layer), backward.conv_bn_relu_backward(g, saved, x, layer)
    assert all(map(np.array_equal, arrays(found), arrays(truth)))
    assert OPS.conv_bn_relu_backward is halves.conv_bn_relu_backward


@pytest.mark.parametrize("n, K", [(1, 2), (70, 16), (129, 150), (300, 7)])
def test_the_loss_of_many_rows(n, K):
    logits, labels = 4 * normal(1, n, K + 3)[:, :K], np.random.default_rng(2).integers(0, K, n)
    labels[n // 2] = 255 if n > 1 else 0
    logits[:, 0] += 200 if n > 1 else 0  # exponentials that would overflow
    loss, saved = on_threads(lambda: OPS.cross_entropy_forward(logits, labels, 255))
    truth, wide = backward.cross_entropy_forward(logits.astype(np.float64), labels, 255)
    assert distance(saved, wide) < EPS32 and abs(loss - truth) <= BACKWARD32 * EPS32 * abs(truth)
    g = np.array(0.5, np.float32)
    check("cross_entropy", g, wide, logits, labels, 255, tolerance=2 * BACKWARD32)
    assert not OPS.cross_entropy_backward(g, saved, logits, labels, 255)[0][labels == 255].any()
    with pytest.raises(ValueError, match="expected class numbers 0 to"):
        OPS.cross_entropy_forward(logits, labels + K, 255)


@pytest.mark.parametrize("batch", [False, True])
def test_gradients_of_a_segmentation_model(batch):
    width = max(NR, 64)
    config = tiny_config(
        num_hidden_layers=4, out_indices=(1, 2, 3, 4), image_size=48, patch_size=8, hidden_size=width,
        num_attention_heads=4, pool_scales=(1, 2), auxiliary_channels=NR,
    )  # fmt: skip
    x, labels = normal(1, 2, 3, 48, 48), np.random.default_rng(2).integers(0, config.num_labels, (2, 48, 48))
    results = {}
    for backend, dtype in (("numba", "float32"), ("numpy", "float32"), ("numpy", "float64")):
        model = make(BeitForSemanticSegmentation, config, dtype=dtype, backend=backend)
        results[backend, dtype] = value_and_grad(model, x.astype(dtype), labels=labels, batch_statistics=batch)
    truth = flatten(results["numpy", "float64"].grads)
    ours, theirs = (flatten(results[backend, "float32"].grads) for backend in ("numba", "numpy"))
    largest = max(np.sqrt(np.square(g).mean()) for g in truth.values())
    for name, g in truth.items():
        error, numpys = (np.sqrt(np.square(found[name] - g).mean()) for found in (ours, theirs))
        assert error < 6 * numpys + 1e-6 * largest, (name, error / numpys)
    running = [results[key].running for key in results]
    assert bool(running[0]) == batch and all(distance(running[0][name], running[2][name]) < 1e-5 for name in running[0])
