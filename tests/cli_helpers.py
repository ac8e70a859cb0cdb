"""Tiny checkpoints and pictures for the tests of the command line, and a way to run it."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

import minibeit
from minibeit import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitImageProcessor,
    BeitModel,
)
from minibeit.cli import main

SIZE = 16
HOME = str(Path(minibeit.__file__).resolve().parents[1])
ENVIRONMENT = {**os.environ, "PYTHONPATH": HOME, "MINIBEIT_BACKEND": "numpy", "PYTHONIOENCODING": "utf-8"}
NAMES = ("ant", "bee", "cat", "dog")


def config(**changes) -> BeitConfig:
    settings = dict(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=SIZE,
        patch_size=4,
        vocab_size=30,
        initializer_range=0.3,
        auxiliary_channels=4,
        pool_scales=[1, 2],
        id2label=dict(enumerate(NAMES)),
    )
    return BeitConfig.from_dict({**settings, **changes})


def listed_sums(folder: Path) -> dict[str, str]:
    """What SHA256SUMS, as sha256sum reads it, says of the files in a folder."""
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def actual_sums(folder: Path) -> dict[str, str]:
    """The sums of all files in a folder but SHA256SUMS."""
    files = [path for path in folder.iterdir() if path.name != "SHA256SUMS"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def save(folder: Path, kind: str, processor: bool = True, **changes) -> Path:
    """A random checkpoint of a task: classify, segment, mask or bare."""
    classes = {
        "classify": (BeitForImageClassification, {"use_relative_position_bias": True}),
        "segment": (BeitForSemanticSegmentation, {"out_indices": [1, 2, 3, 4]}),
        "mask": (BeitForMaskedImageModeling, {"use_mask_token": True}),
        "bare": (BeitModel, {}),
    }
    model_class, settings = classes[kind]
    model = model_class(config(**{**settings, **changes}))
    model.save_pretrained(folder)
    if processor:
        BeitImageProcessor(size=SIZE, resample=2).save_pretrained(folder)
    return folder


def save_pictures(folder: Path, *names: str, size: tuple[int, int] = (20, 24)) -> list[Path]:
    """Random RGB pictures (height, width), all different."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in names:
        rng = np.random.default_rng(sum(name.encode()))
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
        paths.append(folder / name)
    return paths


def run(capsys, *words) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line, in this process."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def start(*words, **options) -> subprocess.Popen:
    """The command line as a process of its own, which Ctrl-C interrupts."""
    return start_python("-m", "minibeit", *map(str, words), **options)


def start_python(*words: str, **options) -> subprocess.Popen:
    """Python as a process of its own.  A shell starts what runs behind it deaf to Ctrl-C, and its children with it."""
    pipe, before = subprocess.PIPE, signal.signal(signal.SIGINT, signal.default_int_handler)
    settings = dict(env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True, encoding="utf-8")
    try:
        return subprocess.Popen([sys.executable, *words], **{**settings, **options})
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def served(folder: str | Path) -> Iterator[str]:
    """The address of a web server of this process that has a folder's files."""
    handler = functools.partial(_Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass
