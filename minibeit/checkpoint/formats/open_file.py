"""Checkpoint files of every format, recognised by their first bytes: one call returns their named tensors.

No reader runs code from a file, or copies more of it than was asked for. Any fault of a file is a `CheckpointError`
that names it; a missing file is a FileNotFoundError.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...file_names import folder_files
from .file_bytes import Source, file_in_folder, open_source, parse_json, shown
from .lazy_tensors import Stored, Tensors, gather
from .safetensors_file import read_safetensors

MAX_SHARDS = 1000
ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".msgpack", ".npz")
SHOWN = 8
STRANGERS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the weights; fetch them with `git lfs pull`",
    b"<!DOCTYPE": "is a web page, not a checkpoint; download the file itself",
    b"<html": "is a web page, not a checkpoint; download the file itself",
    b"\x89HDF": "is a Keras/TensorFlow HDF5 file, which is not read; convert it to safetensors",
    b"\x93NUMPY": "is a single .npy array without a name; save the tensors with numpy.savez",
    b"\x89PNG": "is a PNG image, not a checkpoint",
    b"\xff\xd8\xff": "is a JPEG image, not a checkpoint",
    b"GIF8": "is a GIF image, not a checkpoint",
    b"RIFF": "is a WebP image or another media file, not a checkpoint",
    b"II*\x00": "is a TIFF image, not a checkpoint",
    b"MM\x00*": "is a TIFF image, not a checkpoint",
    b"%PDF": "is a PDF document, not a checkpoint",
    b"\x1f\x8b": "is compressed with gzip; unpack it first",
}


@dataclass(frozen=True)
class Loaded:
    """A checkpoint with the names and structure of its file.

    `tensors` are those of the state dict; `wrapper` is the key it was found under ("model", "module", "state_dict",
    "params", or several joined by dots; None at the top level). `extra` is everything else, as dicts, lists, strings
    and numbers (tensors in it are only described, by a TensorInfo). `metadata` holds the metadata of a safetensors
    header or of an index file; `files` are the paths that were read. `others` are the keys of further state dicts of a
    BEiT in the file, and `chosen` says whether `weights=` chose among them.
    """

    tensors: Tensors
    format: str
    metadata: dict[str, Any] = field(default_factory=dict)
    extra: dict[Any, Any] = field(default_factory=dict)
    wrapper: str | None = None
    files: tuple[Path, ...] = ()
    others: tuple[str, ...] = ()
    chosen: bool = False


def read_tensors(path: str | os.PathLike[str] | bytes) -> Tensors:
    """The named tensors of a checkpoint file, index file or folder, each read when asked for (see `load_file`)."""
    return load_file(path).tensors


def load_file(
    path: str | os.PathLike[str] | bytes,
    name: str | None = None,
    *,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    weights: str | None = None,
) -> Loaded:
    """Opens a checkpoint: a file of any format, the index file of a sharded one, or a folder that holds either.

    Bytes are taken as the content of a file, called `name` in errors. Formats: "safetensors", "torch", "torch-legacy",
    "flax", "npz". Only headers and pickles are read until a tensor is asked for; the file must not change while its
    tensors are in use. `variant` and `use_safetensors` choose among the files of a folder, `weights` among the state
    dicts of a file (see `loading_options.Loading`).
    Raises CheckpointError for a file that cannot be used and FileNotFoundError for a missing one.
    """
    if isinstance(path, (bytes, bytearray, memoryview)):
        return _load(open_source(path, name), weights)
    path = Path(path)
    if _is_folder(path):
        path = _choose(path, folder_files(variant, use_safetensors))
    source = open_source(path, name)
    loaded = _load_sharded(path, source) if source.data[:1] == b"{" else _load(source, weights)
    return replace(loaded, files=loaded.files or (path,))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown(str(path))}: cannot be opened ({error})") from None


def _choose(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if os.path.lexists(folder / name):
            return file_in_folder(folder, name, str(folder))
    found = sorted(file.name for file in folder.iterdir() if file.suffix in ENDINGS)[:SHOWN]
    there = f"; there are {', '.join(found)}" if found else ""
    raise FileNotFoundError(
        f"{folder}: the folder has no checkpoint; looked for {', '.join(names)}{there} (give another by its path"
        f"{', or variant= for model.VARIANT.safetensors' if found else ''})"
    )


def _load(source: Source, weights: str | None = None) -> Loaded:
    start = bytes(source.data[:32])
    for magic, message in STRANGERS.items():
        if start.startswith(magic):
            raise source.error(message)
    if start[:4] == b"PK\3\4":
        return _load_zip(source, weights)
    if start[8:9] == b"{":
        tensors, metadata = read_safetensors(source)
        return Loaded(tensors, "safetensors", metadata)
    if start[:1] == b"\x80":
        from .torch_file import read_torch_legacy  # readers come when a file needs them: most files are safetensors

        return _split(source, read_torch_legacy(source), "torch-legacy", ".", weights)
    if start[:1] and (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        from .msgpack_file import read_msgpack

        return _split(source, read_msgpack(source), "flax", "/", weights)
    raise source.error("is not a safetensors, torch, Flax or npz file, or its beginning is damaged")


def _load_zip(source: Source, weights: str | None) -> Loaded:
    from .npz_file import read_npz
    from .torch_file import pickle_entry, read_torch_zip
    from .zip_file import read_zip

    entries = read_zip(source)
    if pickle_entry(entries):
        return _split(source, read_torch_zip(source, entries), "torch", ".", weights)
    if any(name.endswith(".npy") for name in entries):
        return Loaded(gather(source, read_npz(source, entries)), "npz")
    raise source.error("is a zip archive, but neither torch.save (data.pkl) nor numpy.savez (*.npy) wrote it")


def _split(source: Source, root: Any, format: str, joint: str, weights: str | None) -> Loaded:
    from .state_dict import split

    parts = split(source, root, joint, weights)
    return Loaded(
        gather(source, parts.tensors), format, {}, parts.extra, parts.wrapper, others=parts.others, chosen=parts.chosen
    )


def _load_sharded(path: Path, index: Source) -> Loaded:
    """All shards that an index file lists; its map from tensors to files must match their contents exactly."""
    content = parse_json(index, index.data, "the index")
    places = content.get("weight_map")
    metadata = content.get("metadata", {})
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise index.error("is JSON without a weight_map from tensor names to file names")
    shards = sorted(set(places.values()))
    if len(shards) > MAX_SHARDS:
        raise index.error(f"lists {len(shards):,} shards, more than the {MAX_SHARDS:,} that are read")
    files = [file_in_folder(path.parent, shard, index.name) for shard in shards]
    stored: dict[str, Stored] = {}
    formats = set()
    for shard, file in zip(shards, files):
        loaded = _load(open_source(file))
        formats.add(loaded.format)
        for name, tensor in loaded.tensors.stored().items():
            if places.get(name) != shard:
                raise index.error(
                    f"says that tensor {shown(name)} is in {shown(places.get(name))}, not in {shown(shard)}"
                )
            stored[name] = tensor
    missing = next((name for name in places if name not in stored), None)
    if missing is not None:
        raise index.error(f"lists tensor {shown(missing)}, which {shown(places[missing])} does not hold")
    return Loaded(
        Tensors(stored), "+".join(sorted(formats)), metadata if isinstance(metadata, dict) else {}, files=(path, *files)
    )
