"""`minibeit bench`: time, memory and cold start of minibeit and of alternative engines."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .inputs import check_distinct, check_output
from .terminal import UsageError, note, out, positive, table

if TYPE_CHECKING:
    from ..bench.measure import Plan, Table
    from ..bench.workloads import Workload

HELP = "measure speed, memory and cold start, also of PyTorch, ONNX Runtime and OpenVINO"
GPU_OPTIONS = "--dtype float16 and --device go with --backend cupy alone"
LOW_OPTIONS = "--dtype int8 and bfloat16 measure a forward pass of --backend numba or numpy"
DESCRIPTION = """\
Measures models of the published shapes with random weights: milliseconds (median and least), images per second,
GFLOP/s, the share of what this CPU can multiply and add at all, the peak of the memory of a process that does nothing
else, and the time from the start of such a process to its first output.

All contestants get the same weights, dtype and number of threads, and take turns in one process.  Nothing is
timed before their outputs have been found to agree.  Other work on the machine spoils the figures.
"""
EXAMPLES = """\
  minibeit bench
  minibeit bench --size large --batch-size 1 8 --against torch,openvino --json times.json
  minibeit bench --suite readme
  minibeit bench --train --batch-size 8 --against torch,inductor
  minibeit bench --dtype int8 --batch-size 1 8
"""
TASK_NAMES = ("classification", "mim", "segmentation", "backbone")
SIZE_NAMES = ("base", "large", "digits")
# Rows of README's table: task, size, image size, batch size, contestants, fresh processes of each.
SUITES: dict[str, tuple[tuple[str, str, int, int, tuple[str, ...], int], ...]] = {
    "readme": (
        ("classification", "base", 224, 1, ("numba", "numpy", "torch", "onnxruntime", "openvino"), 3),
        ("classification", "base", 224, 8, ("numba", "torch", "onnxruntime", "openvino"), 0),
        ("classification", "base", 224, 32, ("numba", "torch", "onnxruntime", "openvino"), 0),
        ("classification", "large", 224, 1, ("numba", "torch"), 1),
        ("classification", "base", 384, 1, ("numba", "torch"), 0),
        ("segmentation", "base", 640, 1, ("numba", "torch", "openvino"), 1),
    ),
    "training": (
        ("classification", "base", 224, 8, ("numba", "numba-recompute", "torch", "inductor"), 1),
        ("mim", "base", 224, 8, ("numba", "numba-recompute", "torch"), 1),
        ("segmentation", "base", 512, 1, ("numba", "numba-recompute", "torch"), 1),
    ),
}
CHOSEN_BY_SUITE = {"train": False, "task": None, "size": None, "image_size": None, "batch_size": None, "against": None,
                   "cold_start": False, "backend": ["numba"], "dtype": "float32"}  # fmt: skip
TRAINED_BATCH = {"segmentation": 1}  # where it is not 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=list(SUITES), help="a whole table at once, as markdown (some minutes)")
    parser.add_argument(
        "--train", action="store_true", help="a step of training: forward, loss, backward and AdamW on all parameters"
    )
    parser.add_argument("--task", choices=TASK_NAMES, help="default classification")
    parser.add_argument("--size", choices=SIZE_NAMES, help="shape of the model (default base; digits is tiny)")
    parser.add_argument(
        "--image-size", type=positive, metavar="PX", help="default 224, for segmentation 640, trained 512"
    )
    parser.add_argument(
        "-b", "--batch-size", type=positive, nargs="+", metavar="B", help="default 1; trained 8, segmentation 1"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="of every contestant (default: all cores)")
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=["numba", "numpy", "cupy"],
        default=["numba"],
        help="minibeit's own (default numba); with cupy PyTorch runs on the GPU too, eager and compiled",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "int8", "bfloat16", "float16"],
        default="float32",
        help="int8 is measured on the CPU, beside float32; float16 on a GPU; bfloat16 on either",
    )
    parser.add_argument("--device", type=int, metavar="N", help="number of the GPU (default 0)")
    parser.add_argument(
        "--against",
        metavar="LIST",
        help="torch,onnxruntime,openvino, with --train torch,inductor (torch.compile), or none "
        "(default: those that are installed)",
    )
    parser.add_argument("--repeats", type=positive, metavar="N", help="rounds (default: some 20 s of them)")
    parser.add_argument(
        "--cold-start", action="store_true", help="five fresh processes of each contestant, in turns, instead of one"
    )
    parser.add_argument("--profile", action="store_true", help="also the time per op of every backend")
    parser.add_argument("--json", metavar="FILE", help="write every single time")
    parser.add_argument("--plot", metavar="FILE.png", help="draw bars (extra tutorials)")
    parser.add_argument(
        "--folder", metavar="DIR", help="keep checkpoints and exported models here for the next time (some gigabytes)"
    )


def run(args: argparse.Namespace) -> int:
    from ..bench import report
    from ..bench.measure import load_average, machine, measure

    files = [Path(path) for path in (args.plot, args.json) if path]
    for path in files:
        check_output(path)
    check_distinct(files)
    if args.plot:
        report.check_plot()  # before minutes of measuring, not after
    _check_suite(args)
    gpu = _gpu(args)
    races = _suite(args) if args.suite else _races(args)
    facts, tables, before = machine() | gpu, [], load_average()
    if isinstance(before, float) and before > 0.5:
        note(f"the machine is not idle (load {before}): the figures will be too slow")
    for _, group in itertools.groupby(races, lambda race: race[0].model):
        with _folder(args.folder) as folder:  # of one model: all of a suite together would be many gigabytes
            for workload, plan in group:
                try:
                    tables.append(measure(workload, plan, folder, note))
                except ValueError:
                    if args.suite and tables:  # minutes of measuring are not lost to the workload that failed
                        out(report.markdown(facts, tables))
                    raise
                if not args.suite:
                    _print(tables[-1])
                if args.profile:
                    _profile(workload, plan, folder)
    facts["load_averages"] = [before, load_average()]
    if args.suite:
        out(report.markdown(facts, tables))
    else:
        for line in report.footer(facts, tables):
            out(line)
    if args.json:
        report.write_json(args.json, facts, tables)
    if args.plot:
        report.write_plot(args.plot, facts, tables)
    return 0


def _check_suite(args: argparse.Namespace) -> None:
    """Raises UsageError for an option that --suite would not heed."""
    given = [name for name, usual in CHOSEN_BY_SUITE.items() if args.suite and getattr(args, name) != usual]
    if given:
        raise UsageError(f"--suite says itself what is measured, so --{given[0].replace('_', '-')} does not go with it")


def _gpu(args: argparse.Namespace) -> dict[str, str]:
    """{"gpu": description} if a GPU is to be measured.  Raises an error that says why there is none."""
    if args.train and args.task == "backbone":
        raise UsageError("--train measures tasks with a loss (classification, mim, segmentation)")
    if args.train and args.profile and "cupy" in args.backend:
        raise UsageError("--profile: times the ops of a training step on a CPU alone; on a GPU, use Nsight Systems")
    if "cupy" not in args.backend:
        if args.dtype == "float16" or args.device is not None:
            raise UsageError(GPU_OPTIONS)
        if args.dtype != "float32" and args.train:
            raise UsageError(LOW_OPTIONS)
        return {}
    if args.dtype == "int8":
        raise UsageError(LOW_OPTIONS)
    if args.backend != ["cupy"]:
        raise UsageError("--backend cupy is measured by itself, against PyTorch on the same GPU")
    from ..bench.gpu import check

    return {"gpu": check(args.dtype, args.device)}


@contextmanager
def _folder(path: str | None) -> Iterator[Path]:
    """The folder `path`, created if necessary, or a temporary one."""
    if path is None:
        import tempfile

        with tempfile.TemporaryDirectory(prefix="minibeit-bench-") as temporary:
            yield Path(temporary)
    else:
        Path(path).mkdir(parents=True, exist_ok=True)
        yield Path(path)


def _threads(args: argparse.Namespace) -> int:
    from ..machine import usable_cpus

    return args.threads or usable_cpus()


def _races(args: argparse.Namespace) -> list[tuple[Workload, Plan]]:
    """The measurements that the options ask for, one per batch size."""
    from ..bench.measure import Plan, choose_peers
    from ..bench.workloads import make

    named = None
    if args.against is not None:
        named = [name.strip() for name in args.against.split(",") if name.strip() not in ("", "none")]
    task, size = args.task or "classification", args.size or "base"
    try:
        batches = args.batch_size or [TRAINED_BATCH.get(task, 8) if args.train else 1]
        workloads = [make(task, size, args.image_size, B, args.train) for B in batches]
    except ValueError as error:
        raise UsageError(str(error)) from error
    on_gpu = args.backend == ["cupy"]
    own = dict.fromkeys(args.backend)
    if args.dtype in ("int8", "bfloat16") and not on_gpu:
        own = dict.fromkeys(("numba-float32", *own))
    if args.train and "numba" in own:
        own["numba-recompute"] = None
    contestants = (*own, *choose_peers(named, note, on_gpu, args.train, args.dtype))
    starts = 5 if args.cold_start else 1
    plan = Plan(
        contestants, _threads(args), args.repeats, starts, named is not None, dtype=args.dtype, device=args.device
    )
    return [(workload, plan) for workload in workloads]


def _suite(args: argparse.Namespace) -> list[tuple[Workload, Plan]]:
    from ..bench.contestants import PEERS
    from ..bench.measure import Plan, choose_peers
    from ..bench.workloads import make

    trained = args.suite == "training"
    peers = choose_peers(None, note, in_training=trained)
    races = []
    for task, size, image, batch, names, starts in SUITES[args.suite]:
        contestants = tuple(name for name in names if name not in PEERS or name in peers)
        workload = make(task, size, image, batch, trained)
        races.append((workload, Plan(contestants, _threads(args), args.repeats, starts)))
    return races


def _print(measured: Table) -> None:
    from ..bench import report

    out(report.heading(measured))
    for line in table([report.COLUMNS, *report.rows(measured)], right=range(1, len(report.COLUMNS))):
        out(line)
    out("")


def _profile(workload: Workload, plan: Plan, folder: Path) -> None:
    """Prints the time per op of minibeit's own contestants, measured in separate processes."""
    from ..bench.contestants import BACKENDS
    from ..bench.measure import profile
    from ..bench.report import profile_rows

    for name in plan.contestants:
        if name in BACKENDS:
            entries, seconds = profile(name, workload, plan, folder)
            out(f"{workload.name}, minibeit {name}: {1000 * seconds:.1f} ms, op by op")
            for line in table(profile_rows(entries, seconds), right=range(2, 6)):
                out(line)
            out("")
