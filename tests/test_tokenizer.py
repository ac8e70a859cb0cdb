"""The tokenizer: its network beside plain loops, its class, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import naive
import naive_gradients
import numpy as np
import pytest
from colour_tokenizer import colour_tokenizer, colours
from conftest import distance
from PIL import Image
from tolerances import DIFFERENCES, EPS32, NAIVE_MODEL, TOKENIZER32, TOKENIZER_GRADIENT32

from minibeit import CheckpointError, DalleTokenizer, DalleTokenizerConfig, Trace
from minibeit.ops import get_ops
from minibeit.params import flatten, unflatten
from minibeit.tape import Tape
from minibeit.tokenizer import network
from minibeit.tokenizer.params import param_shapes, shapes
from minibeit.tokenizer.preprocess import likeliest_pixels, map_pixels, unmap_pixels

SMALL = DalleTokenizerConfig(
    num_groups=2, num_blocks_per_group=1, hidden_size=8, vocab_size=11, input_channels=2, n_init=5, image_size=6
)


def random_weights(config, dtype="float64", seed=0):
    """Exact in float32; biases that are no zeros."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * (np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.3))
        .astype(np.float32)
        .astype(dtype)
        for name, shape in param_shapes(config).items()
    }


def make(config=SMALL, dtype="float64", backend="numpy", **changes):
    return DalleTokenizer(config, arrays=random_weights(config, dtype), dtype=dtype, backend=backend, **changes)


def pixels(*shape, seed=1):
    return map_pixels(np.random.default_rng(seed).random(shape).astype(np.float32))


# Loops ----------------------------------------------------------------------------------------------------------------


def naive_block(a, at, x, gain):
    y = x
    for i in range(4):
        y = naive.conv2d(naive.activation(y, "relu"), a[f"{at}.path.{i}.weight"], a[f"{at}.path.{i}.bias"])
    name = f"{at}.identity.weight"
    return (naive.conv2d(x, a[name], a[f"{at}.identity.bias"]) if name in a else x) + gain * y


def naive_half(a, kind, x, config, between):
    x = naive.conv2d(x, a[f"{kind}.input.weight"], a[f"{kind}.input.bias"])
    blocks = config.num_groups * config.num_blocks_per_group
    for group in range(config.num_groups):
        for block in range(config.num_blocks_per_group):
            x = naive_block(a, f"{kind}.groups.{group}.blocks.{block}", x, 1 / blocks**2)
        if group < config.num_groups - 1:
            x = between(x)
    return naive.conv2d(naive.activation(x, "relu"), a[f"{kind}.output.weight"], a[f"{kind}.output.bias"])


@pytest.mark.parametrize("changes", [{}, {"num_groups": 1, "num_blocks_per_group": 2, "input_channels": 1}])
def test_the_network_is_what_the_loops_compute(changes):
    config = SMALL.replace(**changes)
    tokenizer, x = make(config), pixels(2, config.input_channels, 4, 6).astype(np.float64)
    logits = naive_half(tokenizer.arrays, "encoder", x, config, naive.max_pool2x2)
    assert distance(tokenizer.logits(x), logits) <= NAIVE_MODEL
    ids = logits.argmax(1)
    assert np.array_equal(tokenizer.encode(x), ids)
    statistics = naive_half(
        tokenizer.arrays, "decoder", naive.one_hot(ids, config.vocab_size), config, naive.upsample2x2
    )
    image = 1 / (1 + np.exp(-statistics[:, : config.input_channels]))
    assert distance(tokenizer.decode(ids), np.clip((image - 0.1) / 0.8, 0, 1)) <= NAIVE_MODEL


@pytest.mark.parametrize("hidden", [8, 64])
def test_backends_agree(hidden):
    pytest.importorskip("numba")
    config = SMALL.replace(hidden_size=hidden, num_groups=3, input_channels=3)
    x = pixels(3, 3, 13, 18)
    truth, slow, fast = (
        make(config, d, b) for d, b in (("float64", "numpy"), ("float32", "numpy"), ("float32", "numba"))
    )
    logits = truth.logits(x)
    assert distance(slow.logits(x), logits) < TOKENIZER32 * EPS32
    assert distance(fast.logits(x), logits) < TOKENIZER32 * EPS32
    ids = truth.encode(x)
    assert ids.shape == (3, 3, 4)
    assert np.array_equal(fast.encode(x), ids)
    assert distance(fast.decode(ids), truth.decode(ids)) < TOKENIZER32 * EPS32


def test_soft_tokens_that_are_one_hot_are_tokens():
    tokenizer = make()
    ids = np.random.default_rng(0).integers(0, 11, (2, 3, 2))
    soft = naive.one_hot(ids, 11)
    hard = network.decode(tokenizer.ops, tokenizer.params.decoder, ids, tokenizer.config)
    assert (
        distance(network.decode_relaxed(tokenizer.ops, tokenizer.params.decoder, soft, tokenizer.config), hard) < 1e-15
    )


def test_gradients_of_both_halves():
    """The tape through encoder, a softmax in place of the choice, and decoder, beside differences of the whole."""
    config = SMALL.replace(hidden_size=4, vocab_size=3, input_channels=1, n_init=2)
    arrays, ops, x = random_weights(config), get_ops("numpy"), pixels(1, 1, 4, 4).astype(np.float64)
    g = np.random.default_rng(5).standard_normal((1, 2, 4, 4))

    def run(ops, params):
        logits = network.encode(ops, params.encoder, x, config)
        return network.decode_relaxed(ops, params.decoder, logits * 0.3, config)

    tape = Tape(ops)
    watched = tape.watch(unflatten(shapes(config), arrays))
    tape.backward(run(tape.ops, watched), g)
    nodes = flatten(watched)
    assert nodes.keys() == arrays.keys()
    for name in (
        "encoder.groups.1.blocks.0.identity.weight",
        "encoder.groups.1.blocks.0.path.1.bias",
        "decoder.groups.0.blocks.0.path.0.weight",
        "decoder.output.weight",
    ):
        truth = naive_gradients.differences(
            lambda: float((run(ops, unflatten(shapes(config), arrays)) * g).sum()), arrays[name], 1e-5
        )
        assert np.abs(nodes[name].gradient - truth).max() <= DIFFERENCES * max(1, np.abs(truth).max()), name


@pytest.mark.parametrize("hidden", [8, 64])
def test_gradients_on_the_fast_backend(hidden):
    """Every gradient of both halves in float32 beside float64: tiles of Winograd, windows and products."""
    pytest.importorskip("numba")
    config = SMALL.replace(hidden_size=hidden, num_groups=3, input_channels=3)
    x, g = pixels(3, 3, 12, 16), np.random.default_rng(5).standard_normal((3, 6, 12, 16)).astype(np.float32)
    found = {}
    for backend, dtype in (("numpy", "float64"), ("numba", "float32")):
        tape = Tape(get_ops(backend))
        watched = tape.watch(unflatten(shapes(config), random_weights(config, dtype)))
        logits = network.encode(tape.ops, watched.encoder, x.astype(dtype), config)
        soft = logits * np.dtype(dtype).type(0.3)
        tape.backward(network.decode_relaxed(tape.ops, watched.decoder, soft, config), g.astype(dtype))
        found[dtype] = {name: node.gradient for name, node in flatten(watched).items()}
    assert found["float32"].keys() == found["float64"].keys()
    for name, truth in found["float64"].items():
        assert found["float32"][name].dtype == np.float32
        assert distance(found["float32"][name], truth) <= TOKENIZER_GRADIENT32 * EPS32, name


# The class ------------------------------------------------------------------------------------------------------------


def test_sizes():
    config = DalleTokenizerConfig()
    count = sum(int(np.prod(shape)) for name, shape in param_shapes(config).items() if name.startswith("encoder."))
    assert count == 53_786_240
    assert sum(name.startswith("encoder.") for name in param_shapes(config)) == 74
    assert (config.pooling, config.gain) == (8, 1 / 64)
    assert make().num_parameters() == sum(a.size for a in make().arrays.values())


def test_random_weights_are_those_dalle_begins_with():
    tokenizer = DalleTokenizer(
        DalleTokenizerConfig(num_groups=2, hidden_size=64, vocab_size=600), seed=3, backend="numpy"
    )
    arrays = tokenizer.arrays
    assert not arrays["encoder.input.bias"].any()
    for name in ("encoder.output.weight", "decoder.groups.0.blocks.0.path.1.weight"):
        spread = arrays[name].std() * np.prod(arrays[name].shape[1:]) ** 0.5
        assert abs(spread - 1) < 0.02, name
    again = DalleTokenizer(tokenizer.config, seed=3, backend="numpy")
    assert all(np.array_equal(again.arrays[name], array) for name, array in arrays.items())


def test_a_folder_gives_back_what_was_saved(tmp_path):
    tokenizer = make(dtype="float32")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = DalleTokenizer.from_pretrained(tmp_path / "tokenizer", backend="numpy")
    assert again.config == tokenizer.config
    assert again.arrays.keys() == tokenizer.arrays.keys()
    assert all(np.array_equal(again.arrays[name], array) for name, array in tokenizer.arrays.items())
    assert DalleTokenizer.from_pretrained(tmp_path / "tokenizer", backend="numpy", image_size=9).config.image_size == 9


def test_without_a_decoder(tmp_path):
    tokenizer = make(SMALL.replace(n_init=None))
    assert not tokenizer.has_decoder
    assert "without a decoder" in repr(tokenizer)
    ids = tokenizer.encode(pixels(1, 2, 4, 4))
    with pytest.raises(ValueError, match=r"decode: this tokenizer was loaded without a decoder; load it from a folder"):
        tokenizer.decode(ids)
    tokenizer.save_pretrained(tmp_path)
    assert DalleTokenizer.from_pretrained(tmp_path, backend="numpy").config == tokenizer.config


def test_many_images_go_in_several_passes(monkeypatch):
    tokenizer, x = make(), pixels(5, 2, 6, 4)
    logits, ids = tokenizer.logits(x), tokenizer.encode(x)
    image = tokenizer.decode(ids)
    monkeypatch.setattr("minibeit.tokenizer.tokenizer.MAP_BYTES", 2 * 3 * 4 * 8 * 6 * 4)
    assert [s.indices(5)[:2] for s in tokenizer._passes(x.shape)] == [(0, 2), (2, 4), (4, 5)]
    assert np.array_equal(tokenizer.logits(x), logits)
    assert np.array_equal(tokenizer.encode(x), ids)
    assert np.array_equal(tokenizer.decode(ids), image)


def test_a_trace_keeps_every_block():
    trace = Trace()
    logits = make().logits(pixels(1, 2, 4, 4), trace=trace)
    block, wide = ["path.0", "path.1", "path.2", "output"], "encoder.groups.1.blocks.0."
    assert list(trace) == [
        "encoder.input",
        *(f"encoder.groups.0.blocks.0.{name}" for name in block),
        "encoder.groups.0.pooled",
        *(wide + name for name in ["identity", *block]),
        "encoder.logits",
    ]
    assert np.array_equal(trace["encoder.logits"], logits)


def test_the_whole_way_is_that_of_its_halves():
    tokenizer, trace = make(), Trace()
    x = pixels(2, 2, 6, 4)
    out = tokenizer(x, trace=trace)
    assert np.array_equal(out.logits, tokenizer.logits(x))
    assert np.array_equal(out.tokens, tokenizer.encode(x))
    assert np.array_equal(out.tokens, trace["tokens"])
    assert np.array_equal(trace["decoder.statistics"], out.statistics)
    assert np.array_equal(likeliest_pixels(out.statistics), tokenizer.decode(out.tokens))
    assert DalleTokenizer(SMALL.replace(n_init=None), backend="numpy")(x).statistics is None


def test_damaged_weights_are_told():
    for name in ("encoder.groups.0.blocks.0.path.1.bias", "decoder.input.weight"):
        arrays = random_weights(SMALL)
        arrays[name].reshape(-1)[0] = np.nan
        tokenizer = DalleTokenizer(SMALL, arrays=arrays, dtype="float64", backend="numpy")
        with pytest.raises(CheckpointError, match="computes NaN or infinite values, so its weights must be damaged"):
            tokenizer.decode(np.zeros((1, 2, 2), int)) if "decoder" in name else tokenizer.encode(pixels(1, 2, 4, 4))


def test_copies_and_pickles():
    tokenizer, x = make(dtype="float32"), pixels(1, 2, 4, 4)
    for again in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert again.config == tokenizer.config
        assert np.array_equal(again.logits(x), tokenizer.logits(x))


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (np.zeros((2, 4, 4)), r"pixels: expected shape \(B, 2, height, width\), both at least 2, found \(2, 4, 4\)"),
        (np.zeros((1, 3, 4, 4)), r"found \(1, 3, 4, 4\); preprocess makes such arrays"),
        (np.zeros((0, 2, 4, 4)), "found"),
        (np.zeros((1, 2, 4, 1)), "both at least 2"),
        (np.full((1, 2, 4, 4), np.nan), "NaN, infinite or huge"),
        (np.full((1, 2, 4, 4), 1e6), "NaN, infinite or huge"),
        ("image.png", "pixels: expected numbers"),
    ],
)
def test_pixels_that_are_refused(x, match):
    with pytest.raises(ValueError, match=match):
        make().encode(x)


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (np.zeros((2, 3), int), r"ids: expected integers of shape \(B, h, w\), found int64 of shape \(2, 3\)"),
        (np.zeros((1, 2, 3)), "found float64"),
        (np.zeros((0, 2, 3), int), "expected integers"),
        (np.full((1, 2, 3), 11), r"ids: expected visual tokens 0 to 10, found 11 to 11"),
        (np.full((1, 2, 3), -1), "found -1 to -1"),
    ],
)
def test_ids_that_are_refused(ids, match):
    with pytest.raises(ValueError, match=match):
        make().decode(ids)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_groups": 0}, "num_groups must be an integer from 1 to 12, found 0"),
        ({"num_groups": 13}, "found 13"),
        ({"vocab_size": True}, "vocab_size must be an integer"),
        ({"hidden_size": 6}, "hidden_size must be a multiple of 4"),
        ({"n_init": 0}, "n_init"),
        ({"image_size": 1.5}, "image_size"),
    ],
)
def test_configs_that_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        SMALL.replace(**changes)
    with pytest.raises(TypeError, match="expected a DalleTokenizerConfig, found dict"):
        DalleTokenizer(SMALL.to_dict())


# Pixels ---------------------------------------------------------------------------------------------------------------


def test_mapping_is_undone():
    x = np.linspace(0, 1, 9)
    assert map_pixels(x)[0] == 0.1
    assert np.allclose(map_pixels(x)[-1], 0.9)
    assert np.abs(unmap_pixels(map_pixels(x)) - x).max() < 1e-15
    assert unmap_pixels(np.array([-1.0, 0.05, 0.95, 3.0])).tolist() == [0, 0, 1, 1]


def test_preprocessing():
    levels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)
    image = Image.fromarray(levels)
    tokenizer = DalleTokenizer(DalleTokenizerConfig(num_groups=1, hidden_size=4, image_size=12), backend="numpy")
    x = tokenizer.preprocess(image)
    assert (x.shape, x.dtype) == ((1, 3, 12, 12), np.float32)
    squashed = np.asarray(image.resize((12, 12), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.allclose(x[0], 0.8 * squashed / 255 + 0.1, atol=1e-7)
    both = tokenizer.preprocess([image, levels], size=(8, 16))
    assert both.shape == (2, 3, 8, 16)
    assert np.array_equal(both[0], both[1])
    cropped = tokenizer.preprocess(image, size=10, center_crop=True)
    middle = np.asarray(image.resize((10, 15), Image.Resampling.LANCZOS))[2:12].transpose(2, 0, 1)
    assert np.allclose(cropped[0], 0.8 * middle / 255 + 0.1, atol=1e-7)


def test_gray_images_for_a_tokenizer_of_one_channel():
    tokenizer = make(SMALL.replace(input_channels=1), dtype="float32")
    x = tokenizer.preprocess(np.full((5, 7, 3), 255, np.uint8))
    assert x.shape == (1, 1, 6, 6)
    assert np.allclose(x, 0.9)
    assert tokenizer.encode(x).shape == (1, 3, 3)


def test_a_tokenizer_of_colours_gives_back_what_it_was_given():
    """Weights made by hand: squares of one colour become that colour's token, and are drawn in it again."""
    tokenizer = colour_tokenizer(num_groups=3)
    ids = np.random.default_rng(0).integers(0, 64, (2, 3, 5))
    x = colours()[ids].transpose(0, 3, 1, 2).repeat(4, 2).repeat(4, 3).astype(np.float32)
    assert np.array_equal(tokenizer.encode(x), ids)
    assert np.abs(tokenizer.decode(ids) - unmap_pixels(x)).max() < 1e-5
