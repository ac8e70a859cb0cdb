"""The tokenizer beside the classes it comes from: the package dall_e of its authors, and transformers' Flava."""

from __future__ import annotations

import os

import numpy as np
import pytest
from conftest import distance
from PIL import Image
from tolerances import FACTOR, LARGEST_MODEL64

from minibeit import DalleTokenizer

torch = pytest.importorskip("torch")
flava = pytest.importorskip("transformers.models.flava")
try:
    import dall_e
except ImportError:
    dall_e = None

pytestmark = pytest.mark.live
needs_dall_e = pytest.mark.skipif(dall_e is None, reason="the package of DALL-E's authors: pip install dall-e")
BACKEND = os.environ.get("MINIBEIT_PARITY_BACKEND", "numba")


def draw(module, seed, spread=1.2):
    """Weights and biases drawn anew: the classes begin with zero biases, and paths that hardly show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        scale = 0.1 if parameter.ndim == 1 else spread * parameter[0].numel() ** -0.5
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def image_pixels(*shape, seed=0):
    """Mapped pixels with structure: coarse colours and fine noise."""
    rng = np.random.default_rng(seed)
    B, C, h, w = shape
    coarse = rng.random((B, C, -(-h // 8), -(-w // 8))).repeat(8, 2).repeat(8, 3)[:, :, :h, :w]
    return (0.8 * np.clip(coarse + 0.1 * rng.standard_normal(shape), 0, 1) + 0.1).astype(np.float32)


def in_float64(module, x, monkeypatch):
    """What a class of dall_e computes in float64; as published it converts to float32 before every convolution."""
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(
            dall_e.utils.Conv2d,
            "forward",
            lambda c, x: torch.nn.functional.conv2d(x, c.w, c.b, padding=(c.kw - 1) // 2),
        )
        made = module.double().blocks(torch.as_tensor(x).double()).numpy()
    module.float()
    return made


def save(folder, encoder, decoder=None):
    torch.save(encoder, folder / "encoder.pkl")
    if decoder is not None:
        torch.save(decoder, folder / "decoder.pkl")
    return folder


def one_hot(ids, vocabulary):
    return torch.nn.functional.one_hot(torch.as_tensor(ids), vocabulary).permute(0, 3, 1, 2).float()


def check_tokens(found, logits, error):
    """Tokens are those of float64, except where the best two logits are no further apart than both may be off.

    `error` is the largest error of a logit.  Returns (places where tokens differ, places within the error).
    """
    best = np.sort(logits, axis=1)[:, -2:]
    close = best[:, 1] - best[:, 0] <= 2 * error
    differs = found != logits.argmax(1)
    assert not (differs & ~close).any()
    return int(differs.sum()), int(close.sum())


@needs_dall_e
@pytest.mark.parametrize("seed", range(6))
def test_small_modules(tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    sizes = dict(n_hid=int(rng.choice([64, 68])), vocab_size=512 + seed, n_blk_per_group=int(rng.integers(1, 4)))
    channels = int(rng.choice([1, 3]))
    encoder = draw(dall_e.Encoder(input_channels=channels, **sizes), seed)
    decoder = draw(dall_e.Decoder(output_channels=channels, n_init=16 + seed, **sizes), seed + 100)
    folder = save(tmp_path, encoder, decoder)
    x = image_pixels(2, channels, int(rng.integers(16, 41)), int(rng.integers(16, 41)), seed=seed)
    logits = in_float64(encoder, x, monkeypatch)
    ids = logits.argmax(1)
    statistics = in_float64(decoder, one_hot(ids, sizes["vocab_size"]), monkeypatch)

    exact = DalleTokenizer.from_pretrained(folder, backend="numpy", dtype="float64")
    assert distance(exact.logits(x), logits) <= LARGEST_MODEL64
    assert np.array_equal(exact.encode(x), ids)
    image = np.clip((1 / (1 + np.exp(-statistics[:, :channels])) - 0.1) / 0.8, 0, 1)
    assert distance(exact.decode(ids), image) <= LARGEST_MODEL64

    with torch.inference_mode():
        own = encoder(torch.from_numpy(x)).numpy()
        drawn = torch.sigmoid(decoder(one_hot(ids, sizes["vocab_size"]))[:, :channels])
        drawn = dall_e.unmap_pixels(drawn).numpy()
    for backend in {"numpy", BACKEND}:
        tokenizer = DalleTokenizer.from_pretrained(folder, backend=backend)
        found = tokenizer.logits(x)
        assert distance(found, logits) <= FACTOR * distance(own, logits)
        check_tokens(tokenizer.encode(x), logits, np.abs(found - logits).max())
        assert distance(tokenizer.decode(ids), image) <= FACTOR * distance(drawn, image)


@pytest.mark.parametrize("seed", range(3))
def test_flavas_codebook(tmp_path, seed):
    config = flava.FlavaImageCodebookConfig(
        hidden_size=(12, 32, 64)[seed], vocab_size=300, num_blocks_per_group=1 + seed
    )
    codebook = draw(flava.FlavaImageCodebook(config), seed)
    codebook.save_pretrained(tmp_path)
    x = image_pixels(2, 3, 24, 40, seed=seed)
    with torch.inference_mode():
        own = codebook(torch.from_numpy(x)).numpy()
        logits = codebook.double()(torch.from_numpy(x).double()).numpy()
    exact = DalleTokenizer.from_pretrained(tmp_path, backend="numpy", dtype="float64")
    assert distance(exact.logits(x), logits) <= LARGEST_MODEL64
    assert np.array_equal(exact.encode(x), codebook.get_codebook_indices(torch.from_numpy(x).double()).numpy())
    tokenizer = DalleTokenizer.from_pretrained(tmp_path, backend=BACKEND)
    assert distance(tokenizer.logits(x), logits) <= FACTOR * distance(own, logits)


@needs_dall_e
def test_full_size(tmp_path, monkeypatch, capsys):
    """DALL-E's own sizes on two images of 112x112: every logit in float64, every token in float32."""
    encoder, decoder, x = draw(dall_e.Encoder(), 0), draw(dall_e.Decoder(), 1), image_pixels(2, 3, 112, 112)
    with torch.inference_mode():  # all tokens are about as likely, so that many occur
        encoder.blocks.output.conv.b.sub_(encoder(torch.from_numpy(x)).mean((0, 2, 3)))
    folder = save(tmp_path, encoder, decoder)
    tokenizer = DalleTokenizer.from_pretrained(folder, backend=BACKEND)
    logits = in_float64(encoder, x, monkeypatch)
    with torch.inference_mode():
        own = encoder(torch.from_numpy(x)).numpy()
    found = tokenizer.logits(x)
    exact = DalleTokenizer.from_pretrained(folder, backend="numpy", dtype="float64")
    assert distance(exact.logits(x[:1]), logits[:1]) <= LARGEST_MODEL64
    assert distance(found, logits) <= FACTOR * distance(own, logits)
    differing, close = check_tokens(tokenizer.encode(x), logits, np.abs(found - logits).max())
    theirs, _ = check_tokens(own.argmax(1), logits, np.abs(own - logits).max())
    ids = logits.argmax(1)
    with torch.inference_mode():
        drawn = dall_e.unmap_pixels(torch.sigmoid(decoder(one_hot(ids, 8192))[:, :3])).numpy()
    assert np.abs(tokenizer.decode(ids) - drawn).max() < 1e-5
    with capsys.disabled():
        print(
            f"\n{len(np.unique(ids))} different tokens at {ids.size} places; {differing} differ from float64 with "
            f"{BACKEND}, {theirs} with PyTorch; {close} places have two best logits within the error; relative error "
            f"of the logits {distance(found, logits):.2g}, PyTorch's {distance(own, logits):.2g}"
        )


@needs_dall_e
def test_our_names_are_theirs(tmp_path):
    """A saved folder, with the prefix of the half cut off, is a state dict of the authors' classes."""
    from safetensors.torch import load_file

    encoder, decoder = (
        draw(dall_e.Encoder(n_hid=64, vocab_size=512), 0),
        draw(dall_e.Decoder(n_hid=64, vocab_size=512), 1),
    )
    tokenizer = DalleTokenizer.from_pretrained(save(tmp_path, encoder, decoder), backend="numpy")
    tokenizer.save_pretrained(tmp_path / "own")
    tensors = load_file(tmp_path / "own" / "model.safetensors")
    for kind, module in (("encoder", encoder), ("decoder", decoder)):
        state = {name[8:]: tensor for name, tensor in tensors.items() if name.startswith(kind)}
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        module.load_state_dict(draw(module, 2).state_dict() | state)
        assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("shape", [(150, 200), (112, 112), (60, 41)])
def test_preprocessing_is_flavas(shape):
    from transformers import FlavaImageProcessorPil

    levels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    image = Image.fromarray(levels)
    processor = FlavaImageProcessorPil(return_codebook_pixels=True)
    expected = processor(image, return_codebook_pixels=True, return_tensors="np")["codebook_pixel_values"]
    tokenizer = DalleTokenizer(config(), backend="numpy")
    found = tokenizer.preprocess(image)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-7


def config():
    from minibeit import DalleTokenizerConfig

    return DalleTokenizerConfig(num_groups=1, hidden_size=4, vocab_size=2)
