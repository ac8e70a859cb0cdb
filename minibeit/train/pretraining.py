"""Pre-training as in the paper: blocks of patches are masked, and the model predicts their visual tokens.

Source: BEiT section 2; datasets.py, engine_for_pretraining.py and modeling_pretrain.py in microsoft/unilm beit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..config import BeitConfig
from ..image_processor import BeitImageProcessor
from ..masking import nonempty_block_mask
from ..model.masked_modeling import IGNORE_INDEX
from ..ops import host_dtype
from ..params import param_shapes
from ..tasks.masked_image_modeling import BeitForMaskedImageModeling
from .augment import BICUBIC, Random, random_view
from .batches import normalised, read_image
from .examples import Example, Examples
from .metrics import perplexity
from .objective import Batch, Loss, Objective, Sample, Score
from .recipes import PRETRAINING_PRESETS, PretrainingRecipe
from .start import config_of, given
from .state import digest

LANCZOS = Image.Resampling.LANCZOS
DIGITS = 8  # of an image's digest, which seed the mask that it is judged by


class MaskedModeling(Objective):
    """The visual tokens of masked patches, from `tokenizer`, which is not trained.

    Each patch has one token: the tokenizer sees the image at the size that gives as many tokens as there are patches.
    Raises ValueError where the model predicts another number of tokens than the tokenizer has.
    """

    best = ("loss", -1)

    def __init__(
        self,
        examples: Examples,
        processor: BeitImageProcessor,
        recipe: PretrainingRecipe,
        config: BeitConfig,
        tokenizer: Any,
    ) -> None:
        if tokenizer.config.vocab_size != config.vocab_size:
            raise ValueError(
                f"tokenizer: expected {config.vocab_size} visual tokens, which the model predicts, found "
                f"{tokenizer.config.vocab_size}; set vocab_size in the config"
            )
        self.processor, self.recipe, self.tokenizer = processor, recipe, tokenizer
        self.train, self.held_out, self.fingerprint = examples.train, examples.held_out, examples.fingerprint
        self.identity = {"weights of --tokenizer": digest(dict(tokenizer.arrays))}
        self.grid, self.shape = config.grid, config.image_shape
        self.token_shape = (self.grid[0] * tokenizer.pooling, self.grid[1] * tokenizer.pooling)
        self.count = max(1, round(recipe.masked * self.grid[0] * self.grid[1]))

    def read(self, example: Example, key: Sequence[int]) -> Sample:
        rng = np.random.default_rng(list(key))
        image = read_image(example.path, self.processor)
        return self._sample(*two_views(image, self.shape, self.token_shape, self.recipe, rng), rng)

    def read_judged(self, example: Example, content: bytes | None = None) -> Sample:
        image = read_image(example.path, self.processor, content)
        views = image.resize(self.shape[::-1], BICUBIC), image.resize(self.token_shape[::-1], LANCZOS)
        return self._sample(*views, np.random.default_rng(int(example.digest[:DIGITS], 16)))

    def _sample(self, for_patches: Image.Image, for_tokens: Image.Image, rng: Random) -> Sample:
        mask = nonempty_block_mask(self.grid, self.count, rng)
        return normalised(np.asarray(for_patches), self.processor), self._for_tokens(for_tokens), mask.reshape(-1)

    def _for_tokens(self, image: Image.Image) -> np.ndarray:  # -> (C, height, width)
        return self.tokenizer.preprocess(image, self.token_shape)[0]

    def batch(self, samples: Sequence[Sample]) -> Batch:
        pixels, for_tokens, masks = (np.stack(arrays) for arrays in zip(*samples))
        tokens = self.tokenizer.encode(for_tokens)  # (B, gh, gw)
        return Batch(pixels, tokens.reshape(len(tokens), -1), masks)

    def loss(self, batch: Batch) -> Loss:
        labels = _labels(batch)
        return lambda ops, output: ops.cross_entropy(output.logits, labels, IGNORE_INDEX)

    def terms(self, batch: Batch) -> int:
        return len(_labels(batch))

    def said(self, output: Any) -> Any:  # -> (n,)
        return output.logits.argmax(1)

    def right(self, said: Any, batch: Batch) -> tuple[float, int]:
        labels = _labels(batch)
        return float((said == labels).sum()), len(labels)

    def score(self) -> Score:
        return _MaskedTokens(self.tokenizer.config.vocab_size)


def _labels(batch: Batch) -> np.ndarray:  # -> (n,)
    """The visual tokens of the masked patches, image by image."""
    assert batch.mask is not None
    return batch.targets[batch.mask]


def token_losses(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # (n, V), (n,) -> (n,), (n,)
    """The cross-entropy of each masked patch, in nats, and whether its token has the largest logit."""
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    own = x[np.arange(len(labels)), labels]
    return np.log(np.exp(x).sum(1)) - own, x.argmax(1) == labels


class _MaskedTokens(Score):
    sums = ("loss", "right", "masked", "counts")

    def __init__(self, vocab_size: int) -> None:
        self.loss, self.right, self.masked = 0.0, 0, 0
        self.counts = np.zeros(vocab_size, np.int64)

    def add(self, output: Any, batch: Batch) -> None:
        losses, right = token_losses(output.logits, _labels(batch))
        self.loss += float(losses.sum())
        self.right += int(right.sum())
        self.masked += len(losses)
        self.counts += np.bincount(batch.targets.reshape(-1), minlength=len(self.counts))

    def metrics(self) -> dict[str, float]:
        return {
            "loss": self.loss / self.masked,
            "accuracy": self.right / self.masked,
            "token_perplexity": perplexity(self.counts),
        }


def two_views(
    image: Image.Image, shape: tuple[int, int], token_shape: tuple[int, int], recipe: PretrainingRecipe, rng: Random
) -> tuple[Image.Image, Image.Image]:
    """One random crop of an image, as the model sees it (bicubic, `shape`) and as the tokenizer does (Lanczos)."""
    image, box = random_view(image, recipe, rng)
    return image.resize(shape[::-1], BICUBIC, box=box), image.resize(token_shape[::-1], LANCZOS, box=box)


# The model at its beginning -------------------------------------------------------------------------------------------


def new_model(
    source: str,
    tokenizer: Any,
    *,
    drop_path: float | None = None,
    seed: int = 0,
    backend: str | None = None,
    image_size: int | None = None,
    num_threads: int | None = None,
    dtype: str = "float32",
    device: int | None = None,
) -> BeitForMaskedImageModeling:
    """A model to be pre-trained, with the original's random weights: a preset's name, or a `config.json`.

    It predicts the tokens of `tokenizer`.  Raises FileNotFoundError, and ValueError for a config without mask token.
    """
    config = config_of(source, PRETRAINING_PRESETS)
    if not config.use_mask_token:
        raise ValueError(f"{source}: pre-training needs a mask token; set use_mask_token to true")
    changes = given(drop_path_rate=drop_path, image_size=image_size)
    config = config.replace(vocab_size=tokenizer.config.vocab_size, **changes)
    arrays = initial_arrays(config, seed, host_dtype(dtype))
    return BeitForMaskedImageModeling(
        config, arrays=arrays, dtype=dtype, backend=backend, num_threads=num_threads, device=device
    )


def initial_arrays(config: BeitConfig, seed: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Random weights as the original begins pre-training, by canonical name.

    Matrices, the patch convolution and the CLS, mask and position tokens: normal of deviation `initializer_range`, cut
    off at one deviation on both sides.  Then the attention's output and the second matrix of the MLP in block l
    (from 1) are divided by sqrt(2 l).  Norms 1 and 0, layer scales as the config says, everything else 0.
    Source: modeling_pretrain.py in microsoft/unilm beit.
    """
    rng = np.random.default_rng(seed)
    shapes = param_shapes(config, BeitForMaskedImageModeling.task)
    return {name: _initial(name, shape, config, rng).astype(dtype) for name, shape in shapes.items()}


def _initial(name: str, shape: tuple[int, ...], config: BeitConfig, rng: Random) -> np.ndarray:
    last = name.rpartition(".")[2]
    if last.startswith("lambda"):
        return np.full(shape, config.layer_scale_init_value)
    if last == "weight" and len(shape) == 1:
        return np.ones(shape)
    if not (last == "weight" or last in ("cls_token", "mask_token", "position_embeddings")):
        return np.zeros(shape)
    drawn = config.initializer_range * _truncated_normal(shape, rng)
    if name.endswith(("attention.output.weight", "fc2.weight")):
        drawn /= math.sqrt(2 * (int(name.split(".")[2]) + 1))
    return drawn


def _truncated_normal(shape: tuple[int, ...], rng: Random) -> np.ndarray:
    """Standard normal numbers between -1 and 1; those outside are drawn again."""
    drawn = rng.standard_normal(shape)
    while (outside := np.abs(drawn) > 1).any():
        drawn[outside] = rng.standard_normal(int(outside.sum()))
    return drawn


def processor_for(config: BeitConfig, recipe: PretrainingRecipe) -> BeitImageProcessor:
    """The image processor of a model that is pre-trained: straight to its size, with the recipe's mean and deviation.

    Images of other than three channels get the means of the three.
    """
    height, width = config.image_shape
    mean, std = (
        list(v) if config.num_channels == len(v) else [float(np.mean(v))] * config.num_channels
        for v in recipe.normalisation
    )
    return BeitImageProcessor(size={"height": height, "width": width}, image_mean=mean, image_std=std)
