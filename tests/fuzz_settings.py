"""Feeds mutated settings to minibeit: each is taken or refused by a documented error, at once and in little memory.

    python tests/fuzz_settings.py [COUNT] [--seed SEED] [--kind KIND]

COUNT (default 8000) is for each of config.json and preprocessor_config.json.  A finding is printed with the seed that
makes it again and ends the run with 1.  On Linux the process may not even ask for more memory than LIMIT_ADDRESSES.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_formats import mutated

import minibeit
from minibeit import BeitConfig, BeitImageProcessor
from minibeit.checkpoint.load import open_checkpoint
from minibeit.errors import CheckpointError

TESTS = Path(__file__).parent
FOLDERS = [TESTS / "data" / "dialects" / name for name in ("hub_classification", "hub_mim", "data2vec_classification")]
PROCESSORS = [
    {"do_resize": True, "size": {"height": 32, "width": 32}, "resample": 3, "image_mean": [0.5] * 3, "crop_size": 224},
    {"feature_extractor_type": "BeitFeatureExtractor", "size": 256, "do_center_crop": True, "crop_size": [224, 224]},
    {"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 32}, "image_std": [0.5, 0.5, 0.5]},
]
CLASSES = ("BeitModel", "BeitForMaskedImageModeling", "BeitForImageClassification", "BeitForSemanticSegmentation")
LIMIT_S = 1.0
LIMIT_MB = 200
LIMIT_ADDRESSES = 1 << 30  # bytes beyond those the process has when it starts
NUMBERS = [0, -1, 1, 2, 3, 7, 64, 255, 1000, 1001, 65535, 65536, 100_000, 1 << 20, 1 << 31, 1 << 62, 10**18]
RAW = ["NaN", "-Infinity", "1e999", "1e308", "1e-300", "-0.0", "9" * 30, "9" * 5000, "1." + "0" * 5000, '"\\ud800"']
SETTINGS = [*BeitConfig.__dataclass_fields__, "num_labels", "segmentation_indices", "stage_names", "unheard_of"]


def value(rng: random.Random) -> str:
    """The JSON text of something that a stranger may write where something else is expected."""
    kind = rng.randrange(12)
    if kind < 4:
        return str(rng.choice(NUMBERS))
    if kind == 4:
        return rng.choice(RAW)
    if kind == 5:
        return json.dumps([rng.choice(NUMBERS) for _ in range(rng.choice((1, 2, 3, 4, 65, 2000)))])
    if kind == 6:
        return (
            "["
            + ",".join([rng.choice(("1", "[]", "{}", '"a"', "0.5"))] * rng.choice((20_000, 149_000, 1_000_000)))
            + "]"
        )
    if kind == 7:
        depth = rng.choice((2, 10, 63, 64, 500, 5000, 100_000))
        return rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))
    if kind == 8:
        return rng.choice(
            ("true", "false", "null", '""', '"\\u001b[2J\\u0000"', '"' + "x" * 100_000 + '"', "[[1]]", "[null]")
        )
    if kind == 9:
        return json.dumps({str(i): f"L{i}" for i in range(rng.choice((0, 1, 5, 21841, 65536, 70_000)))})
    if kind == 10:
        return json.dumps(
            {
                rng.choice(("height", "width", "shortest_edge", "longest_edge", "max_height")): n
                for n in rng.sample(NUMBERS, 2)
            }
        )
    return str(rng.random() * 10 ** rng.randrange(-8, 8))


def changed(rng: random.Random, settings: dict[str, Any], names: list[str]) -> bytes:
    """The settings with one to four of them given other values, or given twice."""
    parts = {key: json.dumps(item) for key, item in settings.items()}
    for _ in range(rng.choice((1, 1, 2, 4))):
        parts[rng.choice(names)] = value(rng)
    pairs = [f"{json.dumps(key)}: {text}" for key, text in parts.items()]
    if rng.random() < 0.05:
        pairs.append(rng.choice(pairs))
    return ("{" + ", ".join(pairs) + "}").encode()


def judge_config(folder: Path, rng: random.Random) -> None:
    """Everything that looks at a config.json beside weights."""
    kind = rng.randrange(3)
    if kind == 0:
        BeitConfig.from_pretrained(folder).to_json_string()
    elif kind == 1:
        open_checkpoint(folder)
    else:
        getattr(minibeit, rng.choice(CLASSES)).from_pretrained(folder, backend="numpy")


def judge_processor(folder: Path, rng: random.Random) -> None:
    """Everything that looks at a preprocessor_config.json."""
    repr(BeitImageProcessor.from_pretrained(folder))


def check(judge: Callable[[Path, random.Random], None], folder: Path, rng: random.Random) -> str:
    """Judges a folder; returns "taken" or the refusal's kind.  Raises whatever is not documented."""
    try:
        judge(folder, rng)
        return "taken"
    except (CheckpointError, ValueError) as error:  # a task that the config does not suit is a ValueError
        message = str(error)
        named = isinstance(error, CheckpointError) or message.startswith("config: ")
        assert named and len(message) < 4000 and "\n" not in message, message[:300]
        return "refused"


def fuzz(kind: str, count: int, seed: int = 0) -> tuple[Counter[str], float, int]:
    """Runs `count` mutants of "config" or "processor"; returns outcomes, the longest seconds and the most megabytes.

    Case i depends on (kind, seed, i) alone.  Raises AssertionError naming the case for any finding.
    """
    outcomes: Counter[str] = Counter()
    longest, most = 0.0, 0
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = [Path(shutil.copytree(folder, Path(temporary) / folder.name)) for folder in FOLDERS]
        configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
        for index in range(count):
            rng = random.Random(f"{kind} {seed} {index}")
            at = rng.randrange(3)
            settings, names = (configs[at], SETTINGS) if kind == "config" else (PROCESSORS[at], _processor_names())
            text = changed(rng, settings, names) if rng.random() < 0.8 else mutated(rng, json.dumps(settings).encode())
            name, judge = {
                "config": ("config.json", judge_config),
                "processor": ("preprocessor_config.json", judge_processor),
            }[kind]
            (folders[at] / name).write_bytes(text)
            before, start = _megabytes("VmRSS", restart=True), time.thread_time()
            try:
                outcomes[check(judge, folders[at], rng)] += 1
            except BaseException as error:
                raise AssertionError(f"{kind}, seed {seed}, case {index}: {error!r}") from error
            seconds, megabytes = time.thread_time() - start, _megabytes("VmHWM") - before
            longest, most = max(longest, seconds), max(most, megabytes)
            assert seconds < LIMIT_S, f"{kind}, seed {seed}, case {index} took {seconds:.2f} s"
            assert megabytes < LIMIT_MB, f"{kind}, seed {seed}, case {index} took {megabytes} MB"
    return outcomes, longest, most


def _processor_names() -> list[str]:
    from minibeit.images.settings import SETTINGS as names

    return [*names, "reduce_labels", "image_processor_type", "feature_extractor_type", "unheard_of"]


def _megabytes(field: str, restart: bool = False) -> int:
    """VmRSS or VmHWM, which `restart` sets to what is taken now; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) // 1024


def _limit_addresses() -> None:
    if sys.platform.startswith("linux"):
        import resource

        limit = (_megabytes("VmSize") << 20) + LIMIT_ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzzes the readers of settings with mutated files.")
    parser.add_argument("count", type=int, nargs="?", default=8000, help="files per kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=("config", "processor"), action="append", help="only this one")
    arguments = parser.parse_args()
    _limit_addresses()
    for kind in arguments.kind or ("config", "processor"):
        start = time.perf_counter()
        try:
            outcomes, longest, most = fuzz(kind, arguments.count, arguments.seed)
        except AssertionError as finding:
            print(finding, file=sys.stderr)
            return 1
        print(
            f"{kind}: {arguments.count} files in {time.perf_counter() - start:.1f} s, {outcomes['taken']} taken, "
            f"longest {longest * 1000:.0f} ms, most memory {most} MB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
