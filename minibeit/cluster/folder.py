"""The folder of results: a Parquet file for each finished shard, and a manifest that says what they are of."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import atomic_write
from ..strict_json import parse_json
from ..text import shortened
from .extra import needed
from .places import is_address

MANIFEST = "_manifest.json"  # Parquet's readers skip what begins with an underscore
FORMAT = "minibeit shards, version 1"
REPEATED = ["labels.list.element", "classes.list.element.label"]  # columns that a dictionary makes smaller
SHARD = re.compile(r"shard-(\d{8})\.parquet")


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:08d}.parquet"


class Folder:
    """A folder that this process and all workers see, by a path or by an address that fsspec opens.

    Its files appear complete or not at all: on disk by a rename, at an address as object stores write.
    """

    def __init__(self, place: str) -> None:
        self.place = place

    def prepare(self, manifest: Mapping[str, Any]) -> set[int]:
        """The numbers of the shards that are there.  Makes the folder and its manifest if there are none.

        Raises ValueError, one sentence, for a folder with shards of other work: another model, settings or images.
        """
        if not is_address(self.place):
            Path(self.place).mkdir(parents=True, exist_ok=True)
        names = self._names()
        shards = {int(match[1]) for name in names if (match := SHARD.fullmatch(name))}
        if MANIFEST in names:
            self._compare(manifest)
        elif any(name.endswith(".parquet") for name in names):
            raise ValueError(f"{self.place}: expected an empty folder or one of this work, found other Parquet files")
        else:
            self._write(MANIFEST, json.dumps({"format": FORMAT, **manifest}, indent=1).encode())
        return shards

    def write(self, number: int, table: Any) -> None:
        """Writes the table of a shard."""
        parquet, buffer = needed("pyarrow.parquet"), io.BytesIO()
        parquet.write_table(table, buffer, compression="zstd", use_dictionary=REPEATED)
        self._write(shard_name(number), buffer.getvalue())

    def read(self, number: int, columns: list[str] | None = None) -> Any:
        """The table of a shard; with `columns` only those, and no more of the file than they take."""
        parquet = needed("pyarrow.parquet")
        if not is_address(self.place):
            return parquet.read_table(Path(self.place) / shard_name(number), columns=columns)
        files, path = self._opened()
        with files.open(f"{path}/{shard_name(number)}", "rb") as file:
            return parquet.read_table(file, columns=columns)

    def _compare(self, manifest: Mapping[str, Any]) -> None:
        try:
            there = parse_json(self._read(MANIFEST).decode())
        except ValueError as error:
            raise ValueError(f"{self.place}/{MANIFEST}: expected a manifest of minibeit ({error})") from None
        here = json.loads(json.dumps({"format": FORMAT, **manifest}))
        if not isinstance(there, dict) or there.get("format") != FORMAT:
            raise ValueError(f"{self.place}/{MANIFEST}: expected {FORMAT!r}, found something else")
        for key in here:
            if there.get(key) != here[key]:
                raise ValueError(
                    f"{self.place}: has shards of other work, whose {key} is {_shown(there.get(key))} and not "
                    f"{_shown(here[key])}; choose another --output, or remove the folder"
                )

    def _names(self) -> list[str]:
        if not is_address(self.place):
            return [path.name for path in Path(self.place).iterdir()]
        files, path = self._opened()
        try:
            return [name.rstrip("/").rpartition("/")[2] for name in files.ls(path, detail=False)]
        except FileNotFoundError:
            return []

    def _write(self, name: str, content: bytes) -> None:
        if not is_address(self.place):
            with atomic_write(Path(self.place) / name) as file:
                file.write(content)
            return
        files, path = self._opened()
        files.makedirs(path, exist_ok=True)  # nothing for object stores
        files.pipe_file(f"{path}/{name}", content)

    def _read(self, name: str) -> bytes:
        if not is_address(self.place):
            return (Path(self.place) / name).read_bytes()
        files, path = self._opened()
        return bytes(files.cat_file(f"{path}/{name}"))

    def _opened(self) -> tuple[Any, str]:
        files, path = needed("fsspec").core.url_to_fs(self.place)
        return files, path.rstrip("/")


def _shown(value: Any) -> str:
    return shortened(json.dumps(value), 60)
