"""DalleTokenizerConfig: the sizes of a tokenizer, checked on construction."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..strict_json import brief

MODEL_TYPE = "dalle_tokenizer"
# The most that a field may say: far above every real tokenizer, and low enough that wrong products stay small.
MOST = {
    "num_groups": 12,
    "num_blocks_per_group": 64,
    "hidden_size": 1 << 14,
    "vocab_size": 1 << 18,
    "input_channels": 1 << 10,
    "n_init": 1 << 16,
    "image_size": 1 << 14,
}


@dataclass(frozen=True)
class DalleTokenizerConfig:
    """The sizes of a tokenizer; the defaults are DALL-E's.

    The encoder has `num_groups` groups of `num_blocks_per_group` blocks, of width `hidden_size`, twice, four times, ...
    that, and halves the map after every group but the last.  The decoder has the same widths in reverse and begins with
    `n_init` channels; None says that there is no decoder.  `vocab_size` is the number V of visual tokens,
    `input_channels` that of an image.  `image_size` (pixels) is the side to which `preprocess` brings images unless
    told otherwise: 112 in BEiT's pre-training, for 14 x 14 tokens.
    Raises ValueError, one sentence, for a value that no tokenizer can have.
    """

    num_groups: int = 4
    num_blocks_per_group: int = 2
    hidden_size: int = 256
    vocab_size: int = 8192
    input_channels: int = 3
    n_init: int | None = 128
    image_size: int = 112

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            value = getattr(self, name)
            if value is None and name == "n_init":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ValueError(f"config: {name} must be an integer from 1 to {most}, found {brief(value)}")
        if self.hidden_size % 4:
            raise ValueError(
                f"config: hidden_size must be a multiple of 4, since inner layers have a quarter of it, "
                f"found {self.hidden_size}"
            )

    @property
    def pooling(self) -> int:
        """Pixels per token along each axis: 2^(groups - 1)."""
        return 1 << (self.num_groups - 1)

    @property
    def gain(self) -> float:
        """The factor of every block's residual path: 1 / (number of blocks)^2."""
        return 1 / (self.num_groups * self.num_blocks_per_group) ** 2

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of each group of the encoder."""
        return tuple(self.hidden_size << i for i in range(self.num_groups))

    def replace(self, **changes: Any) -> DalleTokenizerConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that is written to `config.json`."""
        return {"model_type": MODEL_TYPE, **dataclasses.asdict(self)}

    def to_json_string(self) -> str:
        """`to_dict()` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DalleTokenizerConfig:
        """The config of a dictionary; keys that are no fields, such as those of other programs, are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})
