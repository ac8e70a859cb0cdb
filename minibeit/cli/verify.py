"""`minibeit verify`: compares layer by layer with a float64 run and PyTorch, with an error budget."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text import one_line, shown_name
from .inputs import check_output
from .loading import add_model_arguments
from .terminal import UsageError, not_negative, note, out
from .verify_job import judged_pixels, made_model, open_job, settle_what, write_test_weights

if TYPE_CHECKING:
    from ..verify.lockstep import Job, Report
    from ..verify.streams import RunSource, Source
    from ..verify.trace_file import TraceFile

HELP = "compare layer by layer with PyTorch, a trace from elsewhere, or float64"
DESCRIPTION = """\
Runs a model or a tokenizer in lockstep with the reference in float64 and prints, for every intermediate array, how far
it is from the truth and how far PyTorch float32 (or NumPy float32) is.  Names the first array whose own error is out of
budget, and what that usually means.  A trace in bfloat16, float16 or int8 is measured by a run that imitates that
precision.
The exit code is 0 if everything is within budget, 1 if something is not, 2 if nothing could be compared.
docs/verify.md shows how to write a trace.
"""
EXAMPLES = """\
  minibeit verify --model DIR --against torch            with PyTorch as the yardstick (extra "verify")
  minibeit verify --model DIR                            the same without PyTorch; NumPy float32 is the yardstick
  minibeit verify --model DIR --against THEIRS.safetensors   another implementation's trace, made anywhere
  minibeit verify --gradients --against torch            every gradient, layer by layer, compared with autograd's
  minibeit verify --tokenizer DIR --against torch        a discrete VAE: DALL-E's files, Flava's codebook, one's own
  minibeit verify --list-names --model DIR               the names and shapes that such a trace has
  minibeit verify --weights A B                          two checkpoints, tensor by tensor
"""
REPORTS = (".html", ".json", ".md")
PRECISIONS = ("bfloat16", "float16", "int8")  # of `verify.low_precision`, which is imported when it computes
PROBS = "*.attention.probs"
NORMS, MIGRATED = "norms", "migrated"  # an entry in the metadata of traces of minibeit's int8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, "a checkpoint (default: the shipped one, which reads digits)")
    parser.set_defaults(unusable=2)
    parser.add_argument("-t", "--tokenizer", metavar="DIR|FILE", help="a tokenizer instead of a model")
    parser.add_argument("--task", help="treat the checkpoint as a model of this task")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--image", metavar="FILE", help="an image as input")
    source.add_argument(
        "--random-seed", type=not_negative, metavar="N", help="random pixels as input (default: seed 0)"
    )
    parser.add_argument("--size", type=_size, metavar="HxW", help="size of random pixels (default: the model's own)")
    parser.add_argument("--against", metavar="torch|timm|TRACE", help="PyTorch, or the trace that is to be verified")
    parser.add_argument(
        "--yardstick", choices=("torch", "timm"), help="measure a trace by PyTorch instead of NumPy's float32"
    )
    parser.add_argument(
        "--precision", choices=("float32", *PRECISIONS),
        help="that the other side computes in (default: as a trace says or is stored, and --dtype)",
    )  # fmt: skip
    parser.add_argument("--only", metavar="GLOB", action="append", help="judge only these arrays; may be repeated")
    parser.add_argument("--attentions", action="store_true", help="judge attention maps too; unfuses fast attention")
    parser.add_argument("--bisect", action="store_true", help="switch the fast ops on one at a time")
    parser.add_argument("--report", metavar="FILE", action="append", default=[], help="write .html, .json or .md")
    parser.add_argument("--fail-fast", action="store_true", help="stop at the first array out of budget")
    parser.add_argument(
        "--save-trace", metavar="FILE", help="write the trace of --backend (or --against torch); no check"
    )
    parser.add_argument(
        "--export-golden", metavar="DIR", help="write test vectors for another implementation; no check"
    )
    parser.add_argument(
        "--test-weights", metavar="DIR", help="write a checkpoint of the same config in which every parameter matters"
    )
    parser.add_argument("--gradients", action="store_true", help="judge gradients and cotangents, not the forward")
    parser.add_argument("--list-names", action="store_true", help="print the names and shapes of all arrays")
    parser.add_argument("--weights", nargs=2, metavar=("A", "B"), help="compare two checkpoints tensor by tensor")
    parser.add_argument(
        "--published", nargs="?", const="all", metavar="ID", help="check published outputs; downloads models"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print only the verdict")


def run(args: argparse.Namespace) -> int:
    _check_usage(args)
    if args.weights:
        return _weights(args)
    if args.published:
        return _published(args)
    if args.gradients:
        from .verify_gradients import run_gradients

        return run_gradients(args)
    from ..verify.trace_file import TraceFile

    settle_what(args)
    trace = None if args.against in (None, "torch", "timm") else TraceFile(args.against)
    job = open_job(args, trace)
    if args.test_weights:
        return write_test_weights(args, job)
    if args.list_names:
        from ..verify.trace_names import describe

        out(describe(job.shapes()))
        return 0
    if args.export_golden:
        from ..verify.golden_pack import export_golden

        out(f"wrote {export_golden(args.export_golden, job, args.tokenizer or args.model, tuple(args.only or ['*']))}")
        return 0
    if args.save_trace:
        return _save_trace(args, job)
    if args.bisect:
        return _bisect(args, job)
    return _verify(args, job, trace)


def _check_usage(args: argparse.Namespace) -> None:
    for path in args.report:
        if Path(path).suffix.lower() not in REPORTS:
            raise UsageError(f"--report: expected a file name ending in {', '.join(REPORTS)}, found {path}")
    for path in [*args.report, *([args.save_trace] if args.save_trace else [])]:
        inputs = [file for file in (args.image, args.against, *(args.weights or ())) if file]
        check_output(Path(path), inputs, args.tokenizer or args.model)
    if args.yardstick and args.against in (None, "torch", "timm"):
        raise UsageError("--yardstick is for a trace; without one, --against says what minibeit is measured by")
    if args.tokenizer and (args.model or args.task or args.published):
        raise UsageError("--tokenizer: cannot be combined with --model, --task or --published")
    if args.size and args.image:
        raise UsageError("--size goes with random pixels; an image gets the size that the image processor gives it")


def _verify(args: argparse.Namespace, job: Job, trace: TraceFile | None) -> int:
    from ..verify.lockstep import check
    from ..verify.report_text import HEADER, line, verdict

    candidate, origins, leave_out = _candidate(args, job, trace)
    library = args.yardstick or (args.against if args.against in ("torch", "timm") else None)
    yardstick = None if library is None else _pytorch(library, job, leave_out)
    first, notes = judged_pixels(args, job, trace)
    if trace.metadata.get(NORMS) == MIGRATED if trace is not None else args.dtype == "int8":
        job = _migrated(job)
    if not args.quiet:
        out(HEADER)
        if first is not None:
            out(line(first))
    report = check(
        job,
        candidate,
        yardstick,
        args.only or "*",
        args.fail_fast,
        heat=any(path.lower().endswith(".html") for path in args.report),
        progress=None if args.quiet else lambda row: out(line(row)),
        leave_out=leave_out,
        first=first,
        notes=notes,
        precision=_precision(args, trace),
    )
    report.origins = origins
    if leave_out and not args.quiet:
        note("attention maps were left out, since asking for them switches fused attention off; --attentions asks")
    _write_reports(args, report)
    out(verdict(report))
    return exit_code(args, report)


def _migrated(job: Job) -> Job:
    """The job of a model whose scales were moved from norms to weights, as minibeit's int8 moves them."""
    from dataclasses import replace

    from ..verify.low_precision import migrated_arrays

    return replace(job, arrays=migrated_arrays(job.config, job.task, job.arrays))


def exit_code(args: argparse.Namespace, report: Report) -> int:
    """0 within budget, 1 not, 2 if nothing was compared."""
    if report.ok:
        return 0
    return 1 if report.compared or report.guilty else int(args.unusable)


def _precision(args: argparse.Namespace, trace: TraceFile | None) -> str | None:
    """The low precision that what is verified computes in, None for float32 and float64."""
    said = args.precision or (args.dtype if trace is None else trace.precision)
    return said if said in PRECISIONS else None


def _pytorch(library: str, job: Job, leave_out: tuple[str, ...] = ()) -> RunSource:
    from ..verify.networks import TOKENIZER

    if job.task == TOKENIZER:
        from ..verify.torch_tokenizer import tokenizer_source

        return tokenizer_source(job, leave_out)
    if library == "timm":
        from ..verify.timm_runner import timm_source

        return timm_source(job, leave_out)
    from ..verify.torch_runner import torch_source

    return torch_source(job, leave_out)


def _candidate(
    args: argparse.Namespace, job: Job, trace: TraceFile | None
) -> tuple[Source, dict[str, str], tuple[str, ...]]:
    """What is verified, the code behind its ops, and globs of names it does not have."""
    from ..verify.lockstep import model_source

    if trace is not None:
        return trace.source(), {}, ()
    model = made_model(args, job)
    fused = not args.tokenizer and model.ops.origin["attention"] != "numpy" and not args.attentions
    label = f"minibeit {model.ops.backend} {args.dtype}"
    leave_out = (PROBS,) if fused else ()
    return model_source(job, model, label, leave_out=leave_out), model.ops.origin, leave_out


def _bisect(args: argparse.Namespace, job: Job) -> int:
    from ..ops import default_backend
    from ..verify.bisect import bisect

    def show(suspect: Any) -> None:
        state = "ok" if suspect.report.ok else "GUILTY"
        out(f"{suspect.op:24} at most {suspect.worst_ratio:.1f}x NumPy float32's own error  {state}")

    leave_out = () if args.attentions else (PROBS,)
    suspects = bisect(job, args.backend or default_backend(), leave_out, show, args.device)
    guilty = [suspect.op for suspect in suspects if not suspect.report.ok]
    out(f"FAIL: {', '.join(guilty)}" if guilty else f"OK: each of {len(suspects)} fast ops is within budget by itself")
    return 1 if guilty or not suspects else 0


def _save_trace(args: argparse.Namespace, job: Job) -> int:
    from ..ops import host_dtype
    from ..verify.trace_file import save_trace

    select = tuple(args.only or ["*"])
    if args.against in ("torch", "timm"):
        source = _pytorch(args.against, job)
        save_trace(args.save_trace, job, source.run, source.label, select)
    else:
        model = made_model(args, job)
        label, low = f"minibeit {model.ops.backend} {args.dtype}", _precision(args, None)
        save_trace(
            args.save_trace,
            job,
            lambda trace: model(**job.inputs, trace=trace),
            label,
            select,
            host_dtype(args.dtype),
            model.ops.origin,
            {"precision": low, NORMS: MIGRATED} if low == "int8" else {"precision": low} if low else {},
        )
    out(f"wrote {args.save_trace}")
    return 0


def _write_reports(args: argparse.Namespace, report: Report) -> None:
    from ..files import atomic_write
    from ..verify.report_text import as_json, markdown

    for path in args.report:
        suffix = Path(path).suffix.lower()
        if suffix == ".html":
            from ..verify.report_html import html

            text = html(report)
        else:
            text = as_json(report) if suffix == ".json" else markdown(report)
        with atomic_write(path) as file:
            file.write(text.encode("utf-8", "backslashreplace"))
        note(f"wrote {path}")


def _weights(args: argparse.Namespace) -> int:
    from ..tokenizer.files import holds_tokenizer
    from ..verify.weights import compare_tokenizers, compare_weights, describe

    compare = compare_tokenizers if all(map(holds_tokenizer, args.weights)) else compare_weights
    report = compare(args.weights[0], args.weights[1], args.task)
    out(describe(report))
    return 0 if report.ok else 1


def _published(args: argparse.Namespace) -> int:
    from .. import catalogue
    from ..verify.published import check_published

    ids = [id for id, entry in catalogue.manifest().items() if entry.get("expected")]
    outcomes = []
    for id in ids if args.published == "all" else [args.published]:
        for outcome in check_published(id, args.image, args.backend, device=args.device):
            outcomes.append(outcome)
            out(f"{shown_name(outcome.id):48} {outcome.status:8} {one_line(outcome.image)}: {one_line(outcome.text)}")
    checked = [outcome for outcome in outcomes if outcome.status != "skipped"]
    wrong = [outcome for outcome in checked if outcome.status != "ok"]
    if not checked:
        out("FAIL: nothing was compared")
    else:
        out(f"{'FAIL' if wrong else 'OK'}: {len(checked) - len(wrong)} of {len(checked)} published outputs are met")
    return 0 if checked and not wrong else 1


def _size(text: str) -> tuple[int, int]:
    height, x, width = text.lower().partition("x")
    if not (x and height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in pixels, found {text!r}")
    return int(height), int(width)
