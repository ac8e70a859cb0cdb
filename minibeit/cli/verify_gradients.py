"""`minibeit verify --gradients`: compares every gradient with float64, PyTorch's autograd or a trace from elsewhere."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .terminal import UsageError, out
from .verify_job import call_inputs, cast, read_network, settle_what

if TYPE_CHECKING:
    from ..verify.gradients import GradientJob
    from ..verify.trace_file import TraceFile


def run_gradients(args: argparse.Namespace) -> int:
    """Does what the arguments ask; the exit code is 0 only if every gradient is within budget."""
    from ..verify.trace_file import TraceFile, misfits

    if args.bisect or args.against == "timm":
        raise UsageError("--gradients: cannot be combined with --bisect or --against timm; use --against torch")
    settle_what(args)
    trace = None if args.against in (None, "torch") else TraceFile(args.against)
    job = _job(args, trace)
    if args.list_names:
        out("\n".join(f"{name:64} {shape}" for name, shape in job.shapes().items()))
        return 0
    only = tuple(args.only or ["*"])
    if args.export_golden:
        return _export(args, job, only)
    wrong = misfits(trace, job) if trace is not None else []
    if wrong:
        raise ValueError("; ".join(wrong))
    if args.save_trace:
        return _save(args, job, only)
    return _check(args, job, trace)


def _job(args: argparse.Namespace, trace: TraceFile | None) -> GradientJob:
    from ..verify.gradient_files import call_of
    from ..verify.gradients import LOSSES, with_labels
    from ..verify.lockstep import Job

    config, task, arrays = read_network(args)
    if task not in LOSSES:
        raise ValueError(
            f"gradients: expected a task with a loss ({', '.join(LOSSES)}), found {task}; choose by --task"
        )
    inputs = call_inputs(args, config, task) if trace is None else call_of(trace, task)
    return with_labels(Job(config, task, arrays, inputs), args.random_seed or 0)


def _made(args: argparse.Namespace, job: GradientJob) -> tuple[str, dict[str, Any]]:
    """(label, gradients) of minibeit's own backward."""
    from ..ops import host_dtype
    from ..verify.gradients import model_gradients
    from ..verify.networks import trained_network

    arrays = cast(job.arrays, host_dtype(args.dtype))
    place: dict[str, Any] = dict(backend=args.backend or "numpy", device=args.device)
    model = trained_network(job.config, job.task, arrays, dtype=args.dtype, **place)
    return f"minibeit {model.ops.backend} {args.dtype}", model_gradients(job, model).arrays


def _check(args: argparse.Namespace, job: GradientJob, trace: TraceFile | None) -> int:
    from ..verify.gradients import check_gradients
    from ..verify.report_text import HEADER, line, verdict
    from .verify import _write_reports, exit_code

    yardstick = None
    if args.against == "torch":
        from ..verify.torch_gradients import torch_gradients

        yardstick = torch_gradients(job)
    label, found = _made(args, job) if trace is None else (trace.made_by, {name: trace[name] for name in trace})
    if not args.quiet:
        out(HEADER)
    report = check_gradients(
        job,
        found,
        label,
        yardstick,
        list(args.only or ["*"]),
        heat=any(path.lower().endswith(".html") for path in args.report),
        progress=None if args.quiet else lambda row: out(line(row)),
        partial=trace is not None,
        fail_fast=args.fail_fast,
    )
    _write_reports(args, report)
    out(verdict(report))
    return exit_code(args, report)


def _save(args: argparse.Namespace, job: GradientJob, only: tuple[str, ...]) -> int:
    from ..verify.gradient_files import save_gradients

    if args.against == "torch":
        from ..verify.torch_gradients import torch_gradients

        label, arrays = torch_gradients(job)
    else:
        label, arrays = _made(args, job)
    save_gradients(args.save_trace, job, label, arrays, only)
    out(f"wrote {args.save_trace}")
    return 0


def _export(args: argparse.Namespace, job: GradientJob, only: tuple[str, ...]) -> int:
    from ..verify.golden_pack import export_golden
    from ..verify.gradient_files import add_gradients
    from ..verify.lockstep import Job

    plain = {name: job.inputs[name] for name in ("pixel_values", "bool_masked_pos") if name in job.inputs}
    forward = Job(job.config, job.task, job.arrays, plain)
    folder = export_golden(args.export_golden, forward, args.tokenizer or args.model)
    add_gradients(folder, job, only)
    out(f"wrote {folder}")
    return 0
