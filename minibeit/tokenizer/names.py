"""What files call the weights of a tokenizer, and what their shapes say about its sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.formats import Tensors
from ..errors import CheckpointError
from .config import MOST, DalleTokenizerConfig
from .params import param_shapes

SHARED = ("num_groups", "num_blocks_per_group", "hidden_size", "vocab_size", "input_channels")


@dataclass(frozen=True)
class Naming:
    """One way of naming the tensors of an encoder or decoder; numbers of groups, blocks and convolutions begin at 1."""

    software: str
    block: str
    conv: str
    leaves: tuple[str, str]  # of weight and bias

    def translate(self, name: str) -> str:
        """The name in a file of the canonical name of an array, without what stands before its half."""
        *place, leaf = name.split(".")
        leaf = self.leaves[("weight", "bias").index(leaf)]
        if place[0] != "groups":
            return f"blocks.{place[0]}.{leaf}" if place[0] == "input" else f"blocks.output.conv.{leaf}"
        block = self.block.format(group=int(place[1]) + 1, block=int(place[3]) + 1)
        inner = "id_path" if place[4] == "identity" else self.conv.format(conv=int(place[5]) + 1)
        return f"blocks.{block}.{inner}.{leaf}"


DALL_E = Naming("dall_e", "group_{group}.block_{block}", "res_path.conv_{conv}", ("w", "b"))
FLAVA = Naming("transformers", "group_{group}.group.block_{block}", "res_path.path.conv_{conv}", ("weight", "bias"))
_FIRST = re.compile(r"((?:.*\.)?)blocks\.input\.(w|weight)")


@dataclass(frozen=True)
class Half:
    """An encoder or a decoder in a file: `prefix` stands before its names, `sizes` are what its shapes say."""

    kind: str  # "encoder" or "decoder"
    prefix: str
    naming: Naming
    sizes: Mapping[str, int]

    def places(self, config: DalleTokenizerConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
        """{canonical name: (name in the file, shape)} of this half."""
        start = f"{self.kind}."
        return {
            name: (self.prefix + self.naming.translate(name[len(start) :]), shape)
            for name, shape in param_shapes(config).items()
            if name.startswith(start)
        }


def find_halves(tensors: Tensors) -> list[Half]:
    """Every encoder and decoder among the tensors.  Raises CheckpointError for one of no possible sizes."""
    found = []
    for name in tensors:
        first = _FIRST.fullmatch(name)
        if first:
            found.append(_half(tensors, first[1], DALL_E if first[2] == "w" else FLAVA))
    return found


def joined_config(halves: Iterable[Half]) -> DalleTokenizerConfig:
    """The config of an encoder and, if there is one, its decoder.

    Raises CheckpointError unless there is one encoder and at most one decoder, of the same sizes.
    """
    by_kind: dict[str, Half] = {}
    for half in halves:
        if half.kind in by_kind:
            raise CheckpointError(
                f"has two {half.kind}s, under {by_kind[half.kind].prefix!r} and {half.prefix!r}; "
                "save the one that is meant in a file of its own"
            )
        by_kind[half.kind] = half
    if "encoder" not in by_kind:
        has = "a decoder but no encoder" if by_kind else "no tokenizer: no tensor blocks.input.w or blocks.input.weight"
        raise CheckpointError(f"has {has}; give a file of DALL-E's or Flava's encoder, or a folder that holds it")
    sizes = dict(by_kind["encoder"].sizes)
    if "decoder" in by_kind:
        other = by_kind["decoder"].sizes
        for name in SHARED:
            if other[name] != sizes[name]:
                raise CheckpointError(f"has an encoder with {name} {sizes[name]} and a decoder with {other[name]}")
    n_init = by_kind["decoder"].sizes["n_init"] if "decoder" in by_kind else None
    try:
        return DalleTokenizerConfig(**sizes, n_init=n_init)
    except ValueError as error:
        raise CheckpointError(f"has tensors of impossible sizes ({error})") from None


def check_half(tensors: Tensors, half: Half, config: DalleTokenizerConfig) -> dict[str, str]:
    """{canonical name: name in the file}, every tensor being there, of its shape, and no other beside them.

    Raises CheckpointError that names the first that is missing, of another shape, or unknown.
    """
    places = half.places(config)
    for name, shape in places.values():
        if name not in tensors:
            raise CheckpointError(f"lacks the tensor {name}, shape {list(shape)}, of its {half.kind}")
        found = tensors.info(name).shape
        if found != shape:
            raise CheckpointError(f"tensor {name}: expected shape {list(shape)}, found {list(found)}")
    known = {name for name, _ in places.values()}
    start = f"{half.prefix}blocks."
    unknown = sorted(name for name in tensors if name.startswith(start) and name not in known)
    if unknown:
        raise CheckpointError(
            f"has {len(unknown)} tensors that no {half.kind} of these sizes has, such as {unknown[0]}"
        )
    return {canonical: name for canonical, (name, _) in places.items()}


def _half(tensors: Tensors, prefix: str, naming: Naming) -> Half:
    def shape(name: str) -> tuple[int, ...]:
        place = prefix + naming.translate(name)
        if place not in tensors:
            raise CheckpointError(f"lacks the tensor {place}, which every tokenizer has")
        found = tensors.info(place).shape
        if len(found) != 4:
            raise CheckpointError(f"tensor {place}: expected four axes, found shape {list(found)}")
        return found

    def there(group: int, block: int) -> bool:
        return prefix + naming.translate(f"groups.{group}.blocks.{block}.path.0.weight") in tensors

    first, last = shape("input.weight"), shape("output.weight")
    sizes: dict[str, Any] = {
        "num_groups": sum(1 for _ in _while(lambda i: there(i, 0), MOST["num_groups"])),
        "num_blocks_per_group": sum(1 for _ in _while(lambda i: there(0, i), MOST["num_blocks_per_group"])),
    }
    if first[2:] == (1, 1):
        sizes |= {"n_init": first[0], "vocab_size": first[1], "hidden_size": last[1], "input_channels": last[0] // 2}
        return Half("decoder", prefix, naming, sizes)
    sizes |= {"hidden_size": first[0], "input_channels": first[1], "vocab_size": last[0]}
    return Half("encoder", prefix, naming, sizes)


def _while(holds: Any, most: int) -> Iterable[int]:
    """0, 1, ... as long as `holds`, at most `most` of them."""
    for i in range(most):
        if not holds(i):
            return
        yield i
