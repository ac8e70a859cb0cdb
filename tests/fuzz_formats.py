"""Feeds mutated checkpoint files to the readers: each must load or be refused by a CheckpointError, at once.

    python tests/fuzz_formats.py [COUNT] [--seed SEED] [--format FORMAT]

COUNT (default 20000) is per format. A finding is printed with the seed that makes it again and ends the run with 1.
"""

from __future__ import annotations

import argparse
import io
import random
import struct
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from minibeit.checkpoint.formats import load_file
from minibeit.errors import CheckpointError

FOLDER = Path(__file__).parent / "data" / "formats"
CORPUS = {
    "safetensors": ["tensors.safetensors", "expected_flax.safetensors"],
    "torch": ["unilm.pth", "mmseg.pth", "encoder.pkl"],
    "torch-legacy": ["legacy.pth"],
    "flax": ["flax_chunked.msgpack", "flax_model.msgpack"],
    "npz": ["arrays.npz", "compressed.npz"],
}
LIMIT_S = 1.0
NUMBERS = [0, 1, 2, 3, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 1 << 24, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1]
TEXTS = [
    b"null",
    b"true",
    b"-1",
    b"1e9",
    b"99999999999999999999",
    b'"',
    b"{",
    b"[",
    b"\\ud800",
    b"\xff\xfe",
    b"\x00",
    b"..",
    b"/",
]
PICKLES = [bytes([code]) for code in b"()tRb012ue}].Q\x81\x8f\x90\x91\x93"]
PICKLES += [b"cos\nsystem\n", b"cbuiltins\nset\n", b"ccollections\nOrderedDict\n", b"h\x00", b"q\x00"]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One to four small changes of bytes."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        at = rng.randrange(len(result) + 1)
        kind = rng.randrange(9)
        if kind == 0 and result:
            result[at % len(result)] ^= 1 << rng.randrange(8)
        elif kind == 1 and result:
            result[at % len(result)] = rng.randrange(256)
        elif kind == 2:
            del result[at:]
        elif kind == 3:
            del result[at : at + rng.choice((1, 2, 4, 8, 100))]
        elif kind == 4:
            other = rng.randrange(len(result) + 1)
            result[at:at] = result[other : other + rng.choice((1, 4, 16, 64, 300))]
        elif kind == 5:
            width, layout = rng.choice(((1, "<B"), (2, "<H"), (4, "<I"), (8, "<Q"), (2, ">H"), (4, ">I"), (8, ">Q")))
            result[at : at + width] = struct.pack(layout, rng.choice(NUMBERS) & ((1 << 8 * width) - 1))
        elif kind == 6:
            text = rng.choice(TEXTS)
            result[at : at + rng.choice((0, len(text)))] = text
        elif kind == 7:
            text = rng.choice(PICKLES)
            result[at : at + rng.choice((0, len(text)))] = text
        else:
            result[at:at] = rng.randbytes(rng.choice((1, 2, 8, 40)))
    return bytes(result)


def mutated_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with changes in its header, the length of which is right again."""
    (length,) = struct.unpack_from("<Q", data)
    header = mutated(rng, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + b"{" + header[1:] + data[8 + length :]


def mutated_entry(rng: random.Random, data: bytes) -> bytes:
    """A valid zip archive with changes within one entry, mostly the pickle."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
        method = archive.infolist()[0].compress_type
    pickled = [name for name in contents if name.endswith("data.pkl")]
    name = pickled[0] if pickled and rng.random() < 0.8 else rng.choice(list(contents))
    head = len(contents[name]) if pickled else 256  # an array's header rather than its values
    contents[name] = mutated(rng, contents[name][:head]) + contents[name][head:]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in contents.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


MUTATIONS: dict[str, list[Callable[[random.Random, bytes], bytes]]] = {
    "safetensors": [mutated, mutated_header],
    "torch": [mutated, mutated_entry],
    "npz": [mutated, mutated_entry],
}


def check(data: bytes) -> str:
    """Reads everything of a file; returns "loaded" or the refusal."""
    try:
        loaded = load_file(data, "fuzzed")
        for name in loaded.tensors:
            array = loaded.tensors.read(name)
            assert array.shape == loaded.tensors.info(name).shape
        return "loaded"
    except CheckpointError as error:
        message = str(error)
        assert message.startswith(("fuzzed: ", "tensor ")) and len(message) < 1000 and message.isprintable(), message
        return "refused"


def fuzz(format: str, count: int, seed: int = 0) -> tuple[Counter[str], float]:
    """Runs `count` mutated files of a format; returns how many loaded and the longest time of one in seconds.

    Case i depends on (format, seed, i) alone. Raises AssertionError naming the case for any finding.
    """
    corpus = [(FOLDER / name).read_bytes() for name in CORPUS[format]]
    outcomes: Counter[str] = Counter()
    longest = 0.0
    for index in range(count):
        rng = random.Random(f"{format} {seed} {index}")
        data = rng.choice(MUTATIONS.get(format, [mutated]))(rng, rng.choice(corpus))
        start = time.thread_time()
        try:
            outcomes[check(data)] += 1
        except BaseException as error:
            raise AssertionError(f"format {format}, seed {seed}, case {index}: {error!r}") from error
        longest = max(longest, time.thread_time() - start)
        assert longest < LIMIT_S, f"format {format}, seed {seed}, case {index} took {longest:.2f} s"
    return outcomes, longest


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzzes the checkpoint readers with mutated files.")
    parser.add_argument("count", type=int, nargs="?", default=20_000, help="files per format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=CORPUS, action="append", help="only this one (may be repeated)")
    arguments = parser.parse_args()
    import resource  # not on Windows

    for format in arguments.format or CORPUS:
        start = time.perf_counter()
        try:
            outcomes, longest = fuzz(format, arguments.count, arguments.seed)
        except AssertionError as finding:
            print(finding, file=sys.stderr)
            return 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(
            f"{format}: {arguments.count} files in {time.perf_counter() - start:.1f} s, {outcomes['loaded']} loaded, "
            f"longest {longest * 1000:.1f} ms, peak memory of the process {peak} MB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
