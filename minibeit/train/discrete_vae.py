"""Training a tokenizer: a discrete VAE learns a vocabulary of image squares from images without labels.

The encoder says how likely each visual token is at each place.  A token is drawn, relaxed so that gradients pass, and
the decoder must draw the image from it.  Two terms are minimised: how unlikely the decoder finds the image, and how far
the encoder's distribution is from using all tokens alike.
Source: Ramesh et al. 2021, section 2.1 and appendix A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..image_processor import BeitImageProcessor
from ..noise import Noise, as_noise
from ..ops.reference import logit_laplace_loss
from ..outputs import ModelOutput
from ..params import unflatten
from ..tokenizer.config import DalleTokenizerConfig
from ..tokenizer.files import write_tokenizer
from ..tokenizer.network import decode, decode_relaxed, encode
from ..tokenizer.params import shapes
from ..tokenizer.preprocess import likeliest_pixels, map_pixels
from ..tokenizer.tokenizer import DalleTokenizer
from ..trace import SILENT, Scope, Trace
from .augment import random_view
from .batches import normalised, read_image
from .examples import Examples
from .metrics import perplexity
from .objective import Batch, Loss, Objective, Sample, Score
from .recipes import TokenizerRecipe

Array = Any
LANCZOS = Image.Resampling.LANCZOS
TINY = np.finfo(np.float32).tiny  # keeps log(0) out of the Gumbel noise


@dataclass
class DiscreteVaeOutput(ModelOutput):
    """What a tokenizer computes while it is trained."""

    loss: Array | None = None  # ()
    logits: Array | None = None  # (B, V, h, w)
    statistics: Array | None = None  # (B, 2 C, height, width): see `reference.logit_laplace_loss`


class DiscreteVae:
    """A tokenizer with a decoder, in training: its parameters are plain arrays, `forward` has a loss.

    Raises ValueError for a tokenizer without a decoder.
    """

    def __init__(self, tokenizer: DalleTokenizer) -> None:
        if not tokenizer.has_decoder:
            raise ValueError("tokenizer: expected one with a decoder, which training needs, found an encoder alone")
        self.config: DalleTokenizerConfig = tokenizer.config
        self.ops, self.dtype, self.num_threads = tokenizer.ops, tokenizer.dtype, tokenizer.num_threads
        self._arrays: Mapping[str, np.ndarray] = tokenizer.arrays
        self.params = self.plain_params

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """The parameters by canonical name."""
        return self._arrays

    @property
    def plain_params(self) -> Any:
        """The tree of parameters."""
        return unflatten(shapes(self.config), self._arrays)

    def __call__(self, pixel_values: Any, **inputs: Any) -> DiscreteVaeOutput:
        """The output of `forward`."""
        with self.ops.num_threads(self.num_threads):
            return self.forward(pixel_values, **inputs)

    def forward(
        self,
        pixel_values: Any,
        temperature: float = 1.0,
        divergence_weight: float = 0.0,
        rng: np.random.Generator | Noise | None = None,
        noise: Array | None = None,
        trace: Trace | None = None,
    ) -> DiscreteVaeOutput:  # (B, C, height, width) -> see DiscreteVaeOutput
        """The loss of mapped pixels, their tokens' logits and the decoder's statistics.

        With `rng`, or with Gumbel `noise` (B, V, h, w) that was drawn before, tokens are drawn and relaxed at
        `temperature`; without either each place has its likeliest token.  The loss is the mean of -log p(pixel), plus
        `divergence_weight` times the divergence from uniform tokens.
        """
        ops, scope = self.ops, SILENT if trace is None else Scope((trace,))
        x = ops.asarray(pixel_values, self.dtype)
        logits = encode(ops, self.params.encoder, x, self.config, scope.at("encoder"))
        if rng is not None:
            noise = gumbel_noise(as_noise(rng), logits.shape)
        if noise is None:
            tokens = ops.argmax_channels(logits)
            statistics = decode(ops, self.params.decoder, tokens, self.config, scope.at("decoder"))
        else:
            relaxed = ops.gumbel_softmax(logits, ops.asarray(noise, self.dtype), temperature)
            relaxed = scope.record("relaxed", relaxed)
            statistics = decode_relaxed(ops, self.params.decoder, relaxed, self.config, scope.at("decoder"))
        losses = [ops.logit_laplace_loss(statistics, x), ops.divergence_from_uniform(logits)]
        loss = ops.weighted_sum(losses, (1.0, divergence_weight))
        return DiscreteVaeOutput(ops.to_host(loss), ops.to_host(logits), ops.to_host(statistics))

    def save_pretrained(self, folder: Any) -> None:
        """Writes a folder that `DalleTokenizer.from_pretrained` loads."""
        write_tokenizer(folder, self.config, self._arrays)


def gumbel_noise(noise: Noise, shape: tuple[int, ...]) -> np.ndarray:  # -> shape
    """Numbers from the Gumbel distribution, -log(-log u)."""
    u = np.maximum(noise.random(shape), TINY)
    return -np.log(-np.log(u))


class ImageReconstruction(Objective):
    """Images, by way of visual tokens.  `shape` is the size that images are cropped and resized to."""

    best = ("loss", -1)

    def __init__(
        self, examples: Examples, recipe: TokenizerRecipe, config: DalleTokenizerConfig, shape: tuple[int, int]
    ) -> None:
        if shape[0] % config.pooling or shape[1] % config.pooling:
            raise ValueError(
                f"image size: expected multiples of {config.pooling}, the side of a token in pixels, found "
                f"{shape[0]}x{shape[1]}"
            )
        C = config.input_channels
        self.processor = BeitImageProcessor(image_mean=[0.0] * C, image_std=[1.0] * C)  # says how files are read
        self.recipe, self.config, self.shape = recipe, config, shape
        self.train, self.held_out, self.fingerprint = examples.train, examples.held_out, examples.fingerprint

    def read(self, example: Any, key: Sequence[int]) -> Sample:
        image = read_image(example.path, self.processor)
        image, box = random_view(image, self.recipe, np.random.default_rng(list(key)))
        return self._sample(image.resize(self.shape[::-1], LANCZOS, box=box))

    def read_judged(self, example: Any) -> Sample:
        return self._sample(read_image(example.path, self.processor).resize(self.shape[::-1], LANCZOS))

    def _sample(self, image: Image.Image) -> Sample:
        return (map_pixels(normalised(np.asarray(image), self.processor)),)

    def batch(self, samples: Sequence[Sample]) -> Batch:
        pixels = np.stack([sample[0] for sample in samples])
        return Batch(pixels, pixels)

    def for_step(self, batch: Batch, done: float, key: Sequence[int]) -> Batch:
        weight = self.recipe.divergence_at(done) / (self.config.input_channels * self.config.pooling**2)
        settings = {"temperature": self.recipe.temperature_at(done), "divergence_weight": weight}
        return Batch(batch.pixels, batch.targets, settings=settings)

    def loss(self, batch: Batch) -> Loss:
        return lambda ops, output: output.loss

    def score(self) -> Score:
        return _Reconstructions(self.config.vocab_size)

    def save(self, model: DiscreteVae, folder: Path) -> None:
        model.save_pretrained(folder)


class _Reconstructions(Score):
    """Of images from their likeliest tokens."""

    sums = ("images", "loss", "error", "counts")

    def __init__(self, vocab_size: int) -> None:
        self.images, self.loss, self.error = 0, 0.0, 0.0
        self.counts = np.zeros(vocab_size, np.int64)

    def add(self, output: Any, batch: Batch) -> None:
        n, statistics = len(batch), output.statistics.astype(np.float64)
        self.images += n
        self.loss += n * float(logit_laplace_loss(statistics, batch.pixels))
        self.error += n * float(np.abs(map_pixels(likeliest_pixels(statistics)) - batch.pixels).mean())
        self.counts += np.bincount(output.logits.argmax(1).reshape(-1), minlength=len(self.counts))

    def metrics(self) -> dict[str, float]:
        return {
            "loss": self.loss / self.images,
            "pixel_error": self.error / self.images,
            "token_perplexity": perplexity(self.counts),
            "tokens_used": float((self.counts > 0).mean()),
        }
