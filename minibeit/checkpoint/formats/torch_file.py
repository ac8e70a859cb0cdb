"""Files of torch.save, read without torch: the zip archive (since 1.6) and the older stream of pickles.

Layouts: torch/serialization.py, `_save` and `_legacy_save`.
"""

from __future__ import annotations

import struct
from typing import Any

from .file_bytes import Source, shown
from .lazy_tensors import ITEMSIZE
from .pickle_machine import MAX_STEPS, Machine, Name
from .torch_objects import Storage, allowed, call, storage_identity
from .zip_file import Entry, packed_reader

MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


def pickle_entry(entries: dict[str, Entry]) -> str | None:
    """The name of the archive's pickle, or None if it is no torch archive."""
    names = [name for name in entries if name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)]
    return names[0] if len(names) == 1 else None


def read_torch_zip(source: Source, entries: dict[str, Entry]) -> Any:
    """The object that torch.save wrote, with tensors as `Stored`."""
    pickled = pickle_entry(entries)
    assert pickled is not None
    prefix = pickled[: -len("data.pkl")]
    if f"{prefix}constants.pkl" in entries:
        raise source.error("is a TorchScript archive; save its state_dict with torch.save instead")
    order = entries.get(f"{prefix}byteorder")
    if order is not None and bytes(order.head(8)) != b"little":
        raise source.error("was written on a big-endian machine; convert it there with safetensors")
    storages: dict[str, Storage] = {}

    def load(identity: Any) -> Storage:
        dtype, key, number = storage_identity(source, identity)
        entry = entries.get(f"{prefix}data/{key}")
        if entry is None:
            raise source.error(f"the pickle refers to the storage {shown(key)}, which the archive lacks")
        if entry.size != number * ITEMSIZE[dtype]:
            raise source.error(
                f"storage {shown(key)} should hold {number:,} values of {dtype}, but has {entry.size:,} bytes"
            )
        return _storage(source, storages, key, Storage(dtype, number, packed_reader(entry)))

    return Machine(source, entries[pickled].data(), allowed, call, load).run()


def read_torch_legacy(source: Source) -> Any:
    """The object of a file from before torch 1.6 (or saved with _use_new_zipfile_serialization=False)."""
    storages: dict[str, Storage] = {}

    def load(identity: Any) -> Storage | Name:
        if isinstance(identity, tuple) and identity[:1] == ("module",) and len(identity) == 4:
            kind = identity[1]  # a class with its source text, which is neither read nor run
            if isinstance(kind, Name):
                return kind
        dtype, key, number = storage_identity(source, identity)
        return _storage(source, storages, key, Storage(dtype, number))

    def refuse(identity: Any) -> Any:
        raise source.error("the pickle refers to storages before they are declared")

    position = 0
    values = []
    # magic number, protocol, system, the object, the keys of its storages
    for loader, budget in ((refuse, 100), (refuse, 100), (refuse, 100), (load, MAX_STEPS), (refuse, MAX_STEPS)):
        machine = Machine(source, source.data, allowed, call, loader, position, budget)
        values.append(machine.run())
        position = machine.position
        if len(values) == 1 and values[0] != MAGIC:
            raise source.error("is a pickle, but not one that torch.save wrote")
    _, protocol, system, value, keys = values
    if protocol != LEGACY_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise source.error("is a torch file of an unknown version or of a big-endian machine")
    _fill(source, storages, keys, position)
    return value


def _storage(source: Source, storages: dict[str, Storage], key: str, storage: Storage) -> Storage:
    """The storage with that key; all references must describe it identically."""
    first = storages.setdefault(key, storage)
    if (first.dtype, first.count) != (storage.dtype, storage.count):
        raise source.error(f"the pickle describes the storage {shown(key)} in two ways")
    return first


def _fill(source: Source, storages: dict[str, Storage], keys: Any, position: int) -> None:
    """Finds the bytes of each storage: the number of elements in eight bytes, then the elements."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise source.error("the list of storages is not a list of different names")
    for key in keys:
        storage = storages.get(key)
        (number,) = struct.unpack("<q", source.part(position, 8, f"the size of storage {shown(key)}"))
        if storage is None or number != storage.count:
            raise source.error(f"storage {shown(key)} has another size in the file than in the pickle")
        length = number * ITEMSIZE[storage.dtype]
        storage.data = source.part(position + 8, length, f"storage {shown(key)}")
        position += 8 + length
    missing = next((key for key, storage in storages.items() if storage.data is None), None)
    if missing is not None:
        raise source.error(f"the file has no storage {shown(missing)}; it is truncated or damaged")
    if position != source.size:
        raise source.error(f"{source.size - position:,} bytes follow the last storage")
