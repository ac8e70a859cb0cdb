"""DalleTokenizer: images to visual tokens and back."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..foreign import as_numpy
from ..loading_options import split_model_keywords
from ..ops import LOW_DTYPES, get_ops, host_dtype
from ..outputs import ModelOutput
from ..params import unflatten
from ..trace import SILENT, Scope, Trace
from .config import DalleTokenizerConfig
from .files import read_tokenizer, write_tokenizer
from .network import decode, encode
from .params import random_arrays, shapes
from .preprocess import likeliest_pixels, pixels_of

LARGEST_PIXEL = 1e3  # far beyond 0.1..0.9, which pixels are mapped to
MAP_BYTES = 512 << 20  # of the largest maps of a pass; more images than fit are computed in several


@dataclass
class TokenizerOutput(ModelOutput):
    """What a tokenizer makes of pixels on the whole way through it."""

    logits: np.ndarray | None = None  # (B, V, h, w)
    tokens: np.ndarray | None = None  # (B, h, w)
    statistics: np.ndarray | None = None  # (B, 2 C, height, width), of a tokenizer with a decoder


class DalleTokenizer:
    """The discrete VAE of DALL-E (Ramesh et al. 2021), of any size: squares of pixels to numbers and back.

    BEiT's pre-training takes its visual tokens from it: `encode` gives one of `config.vocab_size` numbers to each
    square of `pooling` pixels a side, and `decode` draws what numbers stand for.  Without `arrays` ({canonical name:
    array}) the weights are random, determined by `seed`.  `dtype`, `backend`, `num_threads`, `device` and `only` are as
    for models.
    """

    task = "tokenizer"  # as models have one

    def __init__(
        self,
        config: DalleTokenizerConfig,
        *,
        seed: int | None = 0,
        dtype: str = "float32",
        backend: str | None = None,
        num_threads: int | None = None,
        device: int | None = None,
        only: Collection[str] | None = None,
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        if not isinstance(config, DalleTokenizerConfig):
            raise TypeError(f"config: expected a DalleTokenizerConfig, found {type(config).__name__}")
        self.config = config
        self.dtype = dtype
        self.num_threads = num_threads
        self.device = device
        self.ops = get_ops(backend, only, dtype, device)
        if dtype in LOW_DTYPES and self.ops.backend != "cupy":
            raise ValueError(f"dtype: a tokenizer has no layers of low precision, expected float32, found {dtype}")
        self.arrays = random_arrays(config, seed, host_dtype(dtype)) if arrays is None else arrays
        self.params = self.ops.prepare(self.plain_params)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: str = "float32",
        backend: str | None = None,
        num_threads: int | None = None,
        device: int | None = None,
        **keywords: Any,
    ) -> DalleTokenizer:
        """The tokenizer of a file, a folder or an id on the Hub; see `files.read_tokenizer` for what may be there.

        `keywords` are those of `minibeit.loading_options.Loading` (`revision`, `token`, `subfolder`, ...) and
        `image_size`.  Raises FileNotFoundError or CheckpointError in one sentence, TypeError for other keywords.
        """
        loading, fields = split_model_keywords(keywords, ("image_size",))
        get_ops(backend, None, dtype, device)  # reports a missing backend before anything is read
        config, arrays = read_tokenizer(path, host_dtype(dtype), loading)
        options: dict[str, Any] = dict(dtype=dtype, backend=backend, num_threads=num_threads, device=device)
        return cls(config.replace(**fields), arrays=arrays, **options)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors` into `folder`, which is created if necessary."""
        write_tokenizer(folder, self.config, self.arrays)

    @property
    def pooling(self) -> int:
        """Pixels per visual token along each axis."""
        return self.config.pooling

    @property
    def has_decoder(self) -> bool:
        """Whether visual tokens can be turned into images."""
        return self.config.n_init is not None

    @property
    def plain_params(self) -> Any:
        """The tree of parameters in plain arrays, whatever the backend has packed: what training learns."""
        return unflatten(shapes(self.config), self.arrays)

    def num_parameters(self) -> int:
        """How many numbers were learned."""
        return sum(array.size for array in self.arrays.values())

    def preprocess(
        self, images: Any, size: int | tuple[int, int] | None = None, center_crop: bool = False
    ) -> np.ndarray:  # -> (B, C, height, width)
        """The pixels that `encode` takes, of one image or a list: resized by Lanczos' filter and mapped to 0.1..0.9.

        `size` is the side in pixels, or (height, width); by default `config.image_size`.  Both axes are resized, or
        with `center_crop` the shorter one, and the middle is cut out.  Raises ImageError for what is no image.
        """
        return pixels_of(images, size or self.config.image_size, self.config.input_channels, center_crop)

    def __call__(self, pixel_values: Any, *, trace: Trace | None = None) -> TokenizerOutput:
        """Pixels (B, C, height, width) to logits, to visual tokens, and to what the decoder makes of those.

        `pixel_values` are mapped (see `preprocess`); `trace` keeps the intermediates.  Raises ValueError for others.
        """
        pixels = self._checked_pixels(pixel_values)
        scope = SILENT if trace is None else Scope((trace,))
        with self._session(None):
            logits = self._logits(pixels, scope)
            tokens = scope.record("tokens", self.ops.argmax_channels(logits))
            statistics = self._statistics(tokens, scope) if self.has_decoder else None
            return TokenizerOutput(*(None if x is None else self.ops.to_host(x) for x in (logits, tokens, statistics)))

    def logits(
        self, pixels: Any, *, num_threads: int | None = None, trace: Trace | None = None
    ) -> np.ndarray:  # (B, C, height, width) -> (B, V, h, w)
        """Scores of all visual tokens; `pixels` are mapped (see `preprocess`).  Raises ValueError for others."""
        pixels = self._checked_pixels(pixels)
        scope = SILENT if trace is None else Scope((trace,))
        parts = [pixels] if trace is not None else [pixels[images] for images in self._passes(pixels.shape)]
        with self._session(num_threads):
            return np.concatenate([self.ops.to_host(self._logits(part, scope)) for part in parts])

    def encode(
        self, pixels: Any, *, num_threads: int | None = None
    ) -> np.ndarray:  # (B, C, height, width) -> (B, h, w) int64
        """The visual token of every square: the one of the largest score, the first of equal ones.

        `pixels` are mapped (see `preprocess`).  Raises ValueError for others.
        """
        pixels = self._checked_pixels(pixels)
        with self._session(num_threads):
            parts = [self._logits(pixels[images]) for images in self._passes(pixels.shape)]
            return np.concatenate([self.ops.to_host(self.ops.argmax_channels(part)) for part in parts])

    def decode(
        self, ids: Any, *, num_threads: int | None = None
    ) -> np.ndarray:  # (B, h, w) -> (B, C, height, width) in 0..1
        """The images that visual tokens stand for.

        Raises ValueError for a tokenizer without a decoder and for what are no visual tokens.
        """
        ids = self._checked_ids(ids)
        B, h, w = ids.shape
        pixels = (B, self.config.input_channels, h * self.pooling, w * self.pooling)
        with self._session(num_threads):
            return np.concatenate([self._decoded(ids[images]) for images in self._passes(pixels)])

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and other processes get the arrays and pack them again."""
        made = dict(dtype=self.dtype, backend=self.ops.backend, num_threads=self.num_threads, device=self.device)
        return _remade, (self.config, {**made, "arrays": dict(self.arrays)})

    def __repr__(self) -> str:
        c = self.config
        return (
            f"{type(self).__name__}({c.vocab_size} visual tokens of {self.pooling}x{self.pooling} pixels, width "
            f"{c.hidden_size}, {'with' if self.has_decoder else 'without'} a decoder, {self.num_parameters():,} "
            f"parameters, {self.dtype}, backend {self.ops.backend})"
        )

    def _logits(self, pixels: np.ndarray, scope: Scope = SILENT) -> Any:
        x = self.ops.asarray(pixels, self.dtype)
        return self._finite(encode(self.ops, self.params.encoder, x, self.config, scope.at("encoder")))

    def _decoded(self, ids: np.ndarray) -> np.ndarray:
        return likeliest_pixels(self.ops.to_host(self._statistics(self.ops.asarray(ids, "int64"))))

    def _statistics(self, tokens: Any, scope: Scope = SILENT) -> Any:
        return self._finite(decode(self.ops, self.params.decoder, tokens, self.config, scope.at("decoder")))

    def _finite(self, made: Any) -> Any:
        """What the network computed.  Raises CheckpointError for NaNs, since its input was checked before."""
        if not self.ops.all_finite(made):
            raise CheckpointError("the tokenizer computes NaN or infinite values, so its weights must be damaged")
        return made

    def _session(self, num_threads: int | None) -> Any:
        return self.ops.num_threads(self.num_threads if num_threads is None else num_threads)

    def _passes(self, shape: tuple[int, ...]) -> Iterator[slice]:
        """Slices of the batch whose maps fit MAP_BYTES; three maps of the first group's size are alive at a time."""
        B, _, height, width = shape
        count = max(1, MAP_BYTES // (3 * 4 * self.config.hidden_size * height * width))
        return (slice(first, first + count) for first in range(0, B, count))

    def _checked_pixels(self, pixels: Any) -> np.ndarray:
        C, least = self.config.input_channels, self.pooling
        try:
            x = self.ops.stage(pixels, host_dtype(self.dtype))
        except (TypeError, ValueError) as error:
            raise ValueError(f"pixels: expected numbers of shape (B, {C}, height, width): {error}") from None
        if x.ndim != 4 or x.shape[1] != C or not x.shape[0] or min(x.shape[2:]) < least:
            raise ValueError(
                f"pixels: expected shape (B, {C}, height, width), both at least {least}, found {tuple(x.shape)}; "
                "preprocess makes such arrays from images"
            )
        if not self.ops.all_finite(x, LARGEST_PIXEL):
            raise ValueError("pixels: found NaN, infinite or huge values; preprocess maps pixels to 0.1..0.9")
        return x

    def _checked_ids(self, ids: Any) -> np.ndarray:
        if not self.has_decoder:
            raise ValueError(
                "decode: this tokenizer was loaded without a decoder; load it from a folder that holds decoder.pkl "
                "beside encoder.pkl"
            )
        array, V = as_numpy(ids), self.config.vocab_size
        if array.ndim != 3 or array.dtype.kind not in "iu" or not array.size:
            raise ValueError(
                f"ids: expected integers of shape (B, h, w), found {array.dtype} of shape {tuple(array.shape)}"
            )
        if array.min() < 0 or array.max() >= V:
            raise ValueError(f"ids: expected visual tokens 0 to {V - 1}, found {array.min()} to {array.max()}")
        return array


def _remade(config: DalleTokenizerConfig, made: dict[str, Any]) -> DalleTokenizer:
    return DalleTokenizer(config, **made)
