"""The folder of results: a Parquet file for each finished shard, and a manifest that says what they are of."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import atomic_write
from ..places import place
from ..strict_json import parse_json
from ..text import one_line, shortened
from .extra import needed

MANIFEST = "_manifest.json"  # Parquet's readers skip what begins with an underscore
FORMAT = "minibeit shards, version 1"
REPEATED = ["labels.list.element", "classes.list.element.label"]  # columns that a dictionary makes smaller
SHARD = re.compile(r"shard-(\d{8})\.parquet")


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:08d}.parquet"


class Folder:
    """A folder that this process and all workers see, by a path or by an address that fsspec opens.

    Its files appear complete or not at all.
    """

    def __init__(self, where: str) -> None:
        self.place = place(where)

    def prepare(self, manifest: Mapping[str, Any]) -> set[int]:
        """The numbers of the shards that are there.  Makes the folder and its manifest if there are none.

        Raises ValueError, one sentence, for a folder with shards of other work: another model, settings or images.
        """
        if isinstance(self.place, Path):
            self.place.mkdir(parents=True, exist_ok=True)
        names = self._names()
        shards = {int(match[1]) for name in names if (match := SHARD.fullmatch(name))}
        if MANIFEST in names:
            self._compare(manifest)
        elif any(name.endswith(".parquet") for name in names):
            raise ValueError(f"{self.place}: expected an empty folder or one of this work, found other Parquet files")
        else:
            self._write(MANIFEST, json.dumps({"format": FORMAT, **manifest}, indent=1).encode())
        return shards

    def clear(self) -> None:
        """Removes the shards and the manifest from a folder of this machine that has one."""
        if not (self.place / MANIFEST).is_file():
            return
        for name in (MANIFEST, *filter(SHARD.fullmatch, self._names())):
            (self.place / name).unlink()

    def write(self, number: int, table: Any) -> None:
        """Writes the table of a shard."""
        parquet, buffer = needed("pyarrow.parquet"), io.BytesIO()
        parquet.write_table(table, buffer, compression="zstd", use_dictionary=REPEATED)
        self._write(shard_name(number), buffer.getvalue())

    def has(self, number: int) -> bool:
        """Whether a shard is finished."""
        return (self.place / shard_name(number)).exists()

    def read(self, number: int, columns: list[str] | None = None) -> Any:
        """The table of a shard; with `columns` only those, and no more of the file than they take."""
        shard = self.place / shard_name(number)
        files, path = (None, str(shard)) if isinstance(shard, Path) else shard.opened
        try:
            with files.open(path, "rb") if files else open(path, "rb") as file:
                # In this thread alone: one of Arrow's that reads a file of Python's can end Python with an abort.
                return needed("pyarrow.parquet").ParquetFile(file, pre_buffer=False).read(columns, use_threads=False)
        except needed("pyarrow").ArrowInvalid as error:
            reason = one_line(error, 200)
            raise ValueError(f"{shard}: the shard is damaged ({reason}); once deleted, it is made anew") from error

    def _compare(self, manifest: Mapping[str, Any]) -> None:
        try:
            there = parse_json((self.place / MANIFEST).read_bytes().decode())
        except ValueError as error:
            raise ValueError(f"{self.place}/{MANIFEST}: expected a manifest of minibeit ({error})") from None
        here = json.loads(json.dumps({"format": FORMAT, **manifest}))
        if not isinstance(there, dict) or there.get("format") != FORMAT:
            raise ValueError(f"{self.place}/{MANIFEST}: expected {FORMAT!r}, found something else")
        for key in here:
            if there.get(key) != here[key]:
                old, new = _differing(there.get(key), here[key])
                raise ValueError(
                    f"{self.place}: has shards of other work, whose {key} is {_shown(old)} and not {_shown(new)}; "
                    "choose another --output, or remove the folder"
                )

    def _names(self) -> list[str]:
        try:
            return [entry.name for entry in self.place.iterdir()]
        except FileNotFoundError:
            return []

    def _write(self, name: str, content: bytes) -> None:
        with atomic_write(self.place / name) as file:
            file.write(content)


def _differing(old: Any, new: Any) -> tuple[Any, Any]:
    """Of two objects of JSON that differ, the parts that do."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return old, new
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return {key: old.get(key) for key in keys}, {key: new.get(key) for key in keys}


def _shown(value: Any) -> str:
    return shortened(json.dumps(value), 60)
