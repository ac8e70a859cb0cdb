"""Checkpoints by their id on the Hugging Face Hub, fetched by huggingface_hub (extra `hub`) into its cache."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .catalogue import manifest, nearest
from .errors import CheckpointError
from .file_names import ADAPTER_CONFIG, ADAPTER_FILES, CONFIG_NAME, PROCESSOR_NAME, folder_files
from .loading_options import Loading, Where, split_keywords
from .strict_json import read_json
from .text import LONGEST_NAME, shortened

log = logging.getLogger(__name__)
ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
FILE_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".msgpack", ".npz", ".json", ".pkl")
SETTINGS = (CONFIG_NAME, PROCESSOR_NAME)
TRUE = ("1", "on", "true", "yes")
HUB = "https://huggingface.co"
PATIENCE = 6.0  # seconds to wait for a connection; huggingface_hub itself retries for half a minute


def resolve(path_or_id: str | os.PathLike[str], where: Where | None = None, weights: bool = True) -> Path:
    """The local path of a checkpoint: `path_or_id` itself if it exists, else the folder its files were downloaded to.

    `where` selects the files; with `weights=False` only the config and the image processor's settings are fetched.
    Environment: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.
    Raises FileNotFoundError if it is neither local nor on the Hub and CheckpointError if a download fails.
    """
    where = where or Where()
    if os.path.exists(path_or_id):
        return _within(Path(path_or_id), where.subfolder)
    if is_hub_id(path_or_id):
        return download(str(path_or_id), where, weights=weights)
    raise not_here(str(path_or_id))


def not_here(id: str) -> FileNotFoundError:
    """The error for a name that is no file, no folder and no id on the Hub, with what may have been meant."""
    entry = manifest().get(id, {})
    if "file" in entry:
        return FileNotFoundError(
            f"{id}: is published as a file, not on the Hub; download {entry['file']} and give its path"
        )
    near = nearest(id)
    hint = f", such as {' or '.join(near)}" if near else ""
    return FileNotFoundError(
        f"{shortened(id, LONGEST_NAME)}: there is no such file or folder, and an id on the Hub looks like owner/name"
        f"{hint}"
    )


def resolve_settings(
    path_or_id: str | os.PathLike[str], keywords: Mapping[str, Any], known: Iterable[str], name: str
) -> tuple[Path, dict[str, Any]]:
    """The file of settings, given itself, its folder, where it is called `name`, or an id on the Hub; and the settings
    (among `known`) that the keywords replace.

    Raises TypeError for a keyword that is neither in `known` nor a field of `Where`, FileNotFoundError if there is no
    such file, and what `resolve` raises.
    """
    where, settings = split_keywords(keywords, known)
    file = resolve(path_or_id, where, weights=False)
    if file.is_dir():
        file = file / name
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no {name} here; give the folder of a checkpoint")
    return file, settings


def _within(path: Path, subfolder: str) -> Path:
    if not subfolder:
        return path
    if not (path / subfolder).is_dir():
        raise FileNotFoundError(f"{path}: has no folder {subfolder!r} within it, which subfolder= asks for")
    return path / subfolder


def is_hub_id(path: Any) -> bool:
    """Whether a string looks like owner/name rather than like a file path."""
    return isinstance(path, str) and ID.fullmatch(path) is not None and not path.lower().endswith(FILE_ENDINGS)


def download(
    id: str,
    where: Where | None = None,
    output: str | os.PathLike[str] | None = None,
    weights: bool = True,
) -> Path:
    """Fetches config, processor settings and weights of `id`, with a progress bar; returns their folder.

    Of the weights the first format that the repository has is fetched (safetensors, PyTorch's .bin, Flax), and also an
    adapter.  Files already present are not fetched again; an interrupted download resumes.  `output` is a folder to use
    instead of the cache.  Raises FileNotFoundError or CheckpointError.
    """
    fetch = _Fetch(id, where or Where(), output)
    found = [fetch(name) for name in SETTINGS]
    if weights:
        found += _fetch_weights(fetch)
    file = next((file for file in found if file is not None), None)
    if file is None:
        raise FileNotFoundError(f"{id}: {fetch.place} holds neither {' nor '.join(SETTINGS)}{fetch.offline_hint()}")
    return file.parent


def _fetch_weights(fetch: _Fetch) -> list[Path]:
    """The weights that `fetch` finds, with all shards, and an adapter.  Raises FileNotFoundError if there are none."""
    loading = fetch.where if isinstance(fetch.where, Loading) else Loading()
    names = folder_files(loading.variant, loading.use_safetensors)
    main = next((file for file in map(fetch, names) if file is not None), None)
    adapter = fetch(ADAPTER_CONFIG)
    added = adapter and next((file for file in map(fetch, ADAPTER_FILES) if file is not None), None)
    if main is None and added is None:
        raise FileNotFoundError(f"{fetch.id}: {fetch.place} holds none of {', '.join(names)}{fetch.offline_hint()}")
    for shard in _shards(main) if main else []:
        if fetch(shard) is None:
            raise CheckpointError(f"{fetch.id}: {main} lists {shard}, which {fetch.place} does not hold")
    return [file for file in (main, adapter, added) if file is not None]


class _Fetch:
    """Fetches files of one repository, all of the same commit."""

    def __init__(self, id: str, where: Where, output: str | os.PathLike[str] | None) -> None:
        self.hub, self.errors = _library(id)
        self.id, self.revision, self.where = id, where.revision, where
        self.output = None if output is None else Path(output)
        self.offline = where.local_files_only or os.environ.get("HF_HUB_OFFLINE", "").lower() in TRUE
        self.endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
        home = os.environ.get("HF_HOME")
        cache = os.environ.get("HF_HUB_CACHE") or (os.path.join(home, "hub") if home else None)
        self.cache = where.cache_dir or cache
        self.unreachable: str | None = None  # why the Hub did not answer for some file
        if not self.offline:
            log.info("looking for %s at %s", id, self.endpoint or HUB)
            self.unreachable = _silence(self.endpoint or HUB)

    @property
    def place(self) -> str:
        """What was searched, for messages."""
        return "the cache" if self.offline or self.unreachable else "the repository on the Hub"

    def offline_hint(self) -> str:
        if not (self.offline or self.unreachable):
            return ""
        why = f"the Hub could not be reached ({self.unreachable})"
        if self.offline:
            why = f"{'local_files_only' if self.where.local_files_only else 'HF_HUB_OFFLINE'} is set"
        return f", and {why}; {_by_hand(self.id)}"

    def __call__(self, name: str) -> Path | None:
        """The local path of a file; None if the repository (or, without a network, the cache) lacks it."""
        try:
            file = Path(
                self.hub.hf_hub_download(
                    self.id,
                    name,
                    subfolder=self.where.subfolder or None,
                    revision=self.revision,
                    token=self.where.token,
                    force_download=self.where.force_download,
                    cache_dir=self.cache,
                    local_dir=self.output,
                    endpoint=self.endpoint,
                    local_files_only=self.offline or self.unreachable is not None,  # its retries take half a minute
                    library_name="minibeit",
                )
            )
        except self.errors.LocalEntryNotFoundError as error:
            if not self.offline and self.unreachable is None:
                self.unreachable = _sentence(error.__cause__ or error)
            return None
        except self.errors.EntryNotFoundError:
            return None
        except self.errors.RevisionNotFoundError:
            raise FileNotFoundError(f"{self.id}: has no revision {self.revision!r} on the Hub") from None
        except self.errors.GatedRepoError:
            raise FileNotFoundError(
                f"{self.id}: is gated; accept its terms on the Hub and give token= or set HF_TOKEN"
            ) from None
        except self.errors.RepositoryNotFoundError:
            raise FileNotFoundError(
                f"{self.id}: is no file or folder here and no repository on the Hub; if it is private, "
                "give token= or set HF_TOKEN"
            ) from None
        except Exception as error:  # its HTTP library's errors come through, and differ by version
            raise CheckpointError(
                f"{self.id}: the download of {name} failed ({_sentence(error)}); run again to resume it, "
                f"or {_by_hand(self.id)}"
            ) from error
        commit = file.parents[len(Path(self.where.subfolder or "").parts)].name
        if self.output is None and re.fullmatch(r"[0-9a-f]{40}", commit):
            self.revision = commit  # all further files from the same commit, even if the branch moves
        return file


def _library(id: str) -> tuple[Any, Any]:
    """huggingface_hub, and the module that defines its errors in every version."""
    try:
        import huggingface_hub
        import huggingface_hub.utils as errors
    except ImportError:
        raise FileNotFoundError(
            f"{id}: is no file or folder here, and to download it from the Hub huggingface_hub is missing; "
            f'pip install "minibeit[hub]", or {_by_hand(id)}'
        ) from None
    return huggingface_hub, errors


def _silence(endpoint: str) -> str | None:
    """Why a server cannot be reached within PATIENCE seconds; None if it can, or if a proxy is used.

    Runs in a separate thread, since name resolution has no timeout.
    """
    import socket  # imported here, since together they take longer than `import minibeit`
    import threading
    import urllib.parse
    import urllib.request

    url = urllib.parse.urlsplit(endpoint)
    if not url.hostname or urllib.request.getproxies().get(url.scheme):
        return None
    host, port = url.hostname, url.port or (443 if url.scheme == "https" else 80)
    reasons: list[str | None] = [f"no answer from {host} within {PATIENCE:.0f} s"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), PATIENCE).close()
            reasons.append(None)
        except OSError as error:
            reasons.append(f"{host}: {error.strerror or error}")

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return reasons[-1]


def _by_hand(id: str) -> str:
    return (
        f"put config.json, preprocessor_config.json and model.safetensors (or pytorch_model.bin) of "
        f"https://huggingface.co/{id}/tree/main into a folder and give its path"
    )


def _shards(main: Path) -> list[str]:
    """The files that an index lists; each must be a plain name in the same folder."""
    if not main.name.endswith(".index.json"):
        return []
    try:
        names = sorted(set(read_json(main)["weight_map"].values()))
        plain = all(re.fullmatch(r"[\w-][\w.-]*", name) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{main}: is not an index of shards ({_sentence(error)})") from None
    if not plain:
        raise CheckpointError(f"{main}: lists shards outside its folder")
    return names


def _sentence(error: BaseException) -> str:
    """The first line of an error's message; its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:")[:200] if lines else type(error).__name__
