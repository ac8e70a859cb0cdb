"""How one file names its tensors: its dialect, its prefixes, and the place of each parameter."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass

from ..errors import CheckpointError
from .dialects import ALIASES, DIALECTS, Dialect, Place

# Buffers without learned values: index tables that follow from the grid, a counter of training steps, and timm's zeros
# beside the biases of query and value (softmax would cancel a bias of the keys).
IGNORED = re.compile(r".*(relative_position_index|num_batches_tracked|attn\.k_bias)$")
EMA = re.compile(r"(^|[._/])ema([._/]|$)", re.IGNORECASE)
# torch.compile, (Distributed)DataParallel, FSDP, activation checkpointing, Lightning Fabric.
WRAPPER_WORDS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}


@dataclass(frozen=True)
class Naming:
    """A dialect plus the prefixes found in one file: `encoder` of the encoder's names, `outer` of all names."""

    dialect: Dialect
    encoder: str
    outer: str = ""

    def place(self, name: str) -> Place:
        """The place of the parameter with a canonical name.  Raises KeyError if the dialect has no name for it."""
        found = translate(name, self.dialect.rules, self.encoder)
        return Place(self.outer + found.name, found.how)

    def known(self, names: Iterable[str]) -> dict[str, Place]:
        """The places of those of `names` that the dialect has a name for, in their order."""
        found = {}
        for name in names:
            with suppress(KeyError):
                found[name] = self.place(name)
        return found

    def places(self, names: Iterable[str], present: Collection[str]) -> dict[str, Place | None]:
        """The place of each of `names` in a file with the tensors `present`; None if the dialect has no name for it.

        `norm` (of masked image modeling) and `beit.norm` share one name in files of unilm and in files without the
        prefix of the encoder.  In the latter it is the encoder's, unless the masked image modeling head is present.
        """
        names = list(names)
        places: dict[str, Place | None] = {**dict.fromkeys(names), **self.known(names)}
        head = self.place("lm_head.weight").name in present
        for leaf in ("weight", "bias"):
            ours, encoders = f"norm.{leaf}", f"beit.norm.{leaf}"
            if self.place(ours) == self.place(encoders):
                places.update({loser: None for loser in [encoders if head else ours] if loser in places})
        taken = {place.name for place in places.values() if place}
        for name, place in places.items():
            if place and name.startswith("beit.") and place.name not in present:
                places[name] = self._elsewhere(name, present, taken) or place
        return places

    def _elsewhere(self, name: str, present: Collection[str], taken: Collection[str]) -> Place | None:
        """The place of an encoder parameter under another of the dialect's prefixes, if it is there.

        transformers 5 saves a backbone's shared table and final norm with a prefix that its other tensors lack.
        """
        for encoder in self.dialect.encoders:
            other = Naming(self.dialect, encoder, self.outer).place(name)
            if other.name in present and other.name not in taken:
                return other
        return None

    def within(self, names: Iterable[str], heads: Iterable[str] = ()) -> list[str]:
        """Those of a file's `names` that belong to the encoder, or to one of the `heads` (canonical names).

        Only names whose first word after the prefix is a known part of the encoder count, so that the other tensors of
        a larger model are left out.
        """
        parts = {self._part(rule) for rule in self.dialect.rules if rule.startswith("beit.")}
        parts |= {self._part(rule) for rule in self.dialect.rules if rule.startswith(tuple(f"{h}." for h in heads))}
        return [name for name in names if any(name == part or name.startswith(part + self._joint) for part in parts)]

    @property
    def _joint(self) -> str:
        return "/" if self.dialect.name == "flax" else "."

    def _part(self, rule: str) -> str:
        found = self.dialect.rules[rule]
        template = found.name if isinstance(found, Place) else found
        prefix, _, rest = template.rpartition("{e}")
        first = rest.split(self._joint)[0]
        return self.outer + (self.encoder if "{e}" in template else "") + prefix + first


def translate(name: str, rules: dict[str, str | Place], encoder: str) -> Place:
    """The place of `name` according to `rules`.  Raises KeyError for a name that no rule matches."""
    words = name.split(".")
    number = next((word for word in words if word.isdigit()), "")
    key = ".".join("{i}" if word.isdigit() else word for word in words)
    rule = rules[key] if key in rules else rules[key.rpartition(".")[0] + ".{leaf}"]
    place = rule if isinstance(rule, Place) else Place(rule)
    return Place(place.name.format(e=encoder, i=number, leaf=words[-1]), place.how)


def recognise(names: Collection[str], dialect: str | None = None, weights: str | None = None) -> Naming:
    """The naming of a file with the tensors `names`; `dialect` (a key of DIALECTS or ALIASES) overrides detection.

    If there are several encoders, as in files with an average of the weights, `weights` chooses one: "model" (the
    default: one that is no average), "ema", or a prefix.
    Raises CheckpointError if the tensors are not a BEiT's, ValueError for an unknown dialect.
    """
    found = namings(names, dialect)
    meant = [naming for naming in found if weights is not None and means(weights, naming.outer + naming.encoder)]
    if found and weights not in (None, "model") and not meant:
        prefixes = ", ".join(repr(naming.outer + naming.encoder) for naming in found)
        raise CheckpointError(f"has no weights {weights!r}; those there have the prefix {prefixes}")
    if found:
        return min(meant or found, key=lambda naming: is_average(naming.outer))
    if any(".lora_" in name for name in names):
        raise CheckpointError(
            "is a LoRA adapter, not a model; give its folder, whose adapter_config.json says how to merge it"
        )
    some = ", ".join(list(names)[:3])
    speech = "of any known dialect" if dialect is None else f"of dialect {dialect!r}"
    raise CheckpointError(
        f"no patch embedding and first block {speech} among its {len(names)} tensors ({some}, ...); "
        "known are files of transformers, unilm, timm, OpenMMLab and Flax"
    )


def namings(names: Collection[str], dialect: str | None = None) -> list[Naming]:
    """Every encoder among `names`, in the first dialect that has any: one for each prefix."""
    for candidate in _candidates(dialect):
        patch = translate("beit.embeddings.patch.weight", candidate.rules, "").name
        block = translate("beit.encoder.0.norm1.weight", candidate.rules, "").name
        found = []
        for name in names:
            prefix = name.removesuffix(patch)
            if prefix == name or prefix + block not in names:
                continue
            encoder = max((e for e in candidate.encoders if prefix.endswith(e)), key=len)
            outer = prefix.removesuffix(encoder)
            if not candidate.mark or outer + candidate.mark in names:
                found.append(Naming(candidate, encoder, outer))
        if found:
            return found
    return []


def names_encoder(names: Collection[str]) -> bool:
    """Whether tensors of these names include an encoder."""
    return bool(namings(set(names)))


def is_average(key: str) -> bool:
    """Whether a key or prefix denotes an exponential moving average of weights."""
    return EMA.search(key) is not None


def means(weights: str, key: str) -> bool:
    """Whether `weights` ("model", "ema", a key or the end of one) selects the state dict under `key`."""
    key = key.strip("./")
    if weights in ("model", "ema") and key != weights:
        return is_average(key) == (weights == "ema")
    return key == weights.strip("./") or key.endswith((f".{weights}", f"/{weights}"))


def unwrapped_names(names: Collection[str]) -> dict[str, str]:
    """{name: name without the parts that compilers and module wrappers insert}; {} if nothing changes.

    Names that would become equal are left unchanged.
    """
    changed = {name: ".".join(word for word in name.split(".") if word not in WRAPPER_WORDS) for name in names}
    if all(name == plain for name, plain in changed.items()) or len(set(changed.values())) < len(changed):
        return {}
    return changed


def _candidates(dialect: str | None) -> list[Dialect]:
    if dialect is None:
        return list(DIALECTS.values())
    name = ALIASES.get(dialect, dialect)
    if name not in DIALECTS:
        raise ValueError(f"dialect: expected one of {', '.join([*DIALECTS, *ALIASES])}, found {dialect!r}")
    return [DIALECTS[name]]


def hub_naming(model_type: str = "beit", bare: bool = False) -> Naming:
    """The names that transformers gives a model's tensors in files; `bare` for the encoder alone and for backbones."""
    dialect = DIALECTS["data2vec5" if model_type == "data2vec-vision" else "hub"]  # differ in segmentation heads only
    return Naming(dialect, "" if bare else model_type.replace("-", "_") + ".")


def hub_names(names: Iterable[str], model_type: str = "beit", bare: bool = False) -> dict[str, str]:
    """{canonical name: name in a Hub file}.

    Names in `bare` files (the encoder alone, backbones) have no `beit.` prefix; that of Data2Vec-Vision is
    `data2vec_vision.`.
    """
    naming = hub_naming(model_type, bare)
    return {name: naming.place(name).name for name in names}
