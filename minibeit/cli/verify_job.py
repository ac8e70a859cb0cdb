"""What `minibeit verify` is to verify: a model or a tokenizer, its weights, and the arrays of one call."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .loading import load_processor, shipped_checkpoint
from .terminal import UsageError, out

if TYPE_CHECKING:
    from ..verify.judging import Row
    from ..verify.lockstep import Job
    from ..verify.trace_file import TraceFile

BLOCK = 0.4  # share of patches hidden when a model of masked image modelling gets a random input


def settle_what(args: argparse.Namespace) -> None:
    """Sets `args.model` or `args.tokenizer`: a tokenizer that was given as a model is recognised.

    Raises UsageError for options that tokenizers do not have.
    """
    from ..tokenizer.files import holds_tokenizer

    if not args.tokenizer and args.model and args.task is None and holds_tokenizer(args.model):
        args.tokenizer = args.model
    if args.tokenizer is None:
        args.model = args.model or str(shipped_checkpoint())
    elif "timm" in (args.against, args.yardstick):
        raise UsageError("--tokenizer: timm has no tokenizer to compare with; use torch")


def read_network(args: argparse.Namespace) -> tuple[Any, str, Any]:
    """(config, task, {canonical name: float32 array}) of the model or tokenizer that the options name."""
    from ..checkpoint.load import load_checkpoint, open_checkpoint
    from ..task_table import TASKS
    from ..tokenizer.files import read_tokenizer
    from ..verify.networks import TOKENIZER

    if args.tokenizer:
        sizes, arrays = read_tokenizer(args.tokenizer)
        return sizes, TOKENIZER, arrays
    if args.task is not None and args.task not in TASKS:
        raise UsageError(f"--task: expected one of {', '.join(TASKS)}, found {args.task}")
    task = args.task or open_checkpoint(args.model).task or "model"
    config, arrays = load_checkpoint(args.model, task)
    return config, task, arrays


def open_job(args: argparse.Namespace, trace: TraceFile | None) -> Job:
    """The model or tokenizer and the call that are verified.  Raises ValueError for a trace of others."""
    from ..verify.lockstep import Job
    from ..verify.trace_file import misfits

    config, task, arrays = read_network(args)
    inputs: dict[str, Any] = {}
    if trace is not None and args.random_seed is None and not args.size:
        inputs = trace.inputs_for(task)
        if not inputs and not args.image:
            raise ValueError(
                f"{args.against}: has no array input.pixel_values, so what it was made from is not known; give "
                "--image, or --random-seed N if it was made from `minibeit verify --random-seed N`"
            )
    job = Job(config, task, arrays, inputs or call_inputs(args, config, task))
    if trace is not None and args.random_seed is None and "bool_masked_pos" not in trace.inputs:
        job.inputs = {name: array for name, array in job.inputs.items() if name != "bool_masked_pos"}
    wrong = misfits(trace, job) if trace is not None else []
    if wrong:
        raise ValueError("; ".join(wrong))
    return job


def call_inputs(args: argparse.Namespace, config: Any, task: str) -> dict[str, Any]:
    """The arrays of the call: pixels of --image or random ones, and a random mask where the task has one."""
    import numpy as np

    if args.image:
        inputs = {"pixel_values": _processor(args, config)(args.image).pixel_values}
        rng = np.random.default_rng(0)
    elif args.tokenizer:
        from ..tokenizer.preprocess import map_pixels

        size = args.size or (config.image_size, config.image_size)
        shape = (1, config.input_channels, *size)
        return {"pixel_values": map_pixels(np.random.default_rng(args.random_seed or 0).random(shape, np.float32))}
    else:
        rng = np.random.default_rng(args.random_seed or 0)
        shape = (1, config.num_channels, *(args.size or config.image_shape))
        inputs = {"pixel_values": rng.standard_normal(shape, dtype=np.float32)}
    if task == "masked_image_modeling" and config.use_mask_token:
        (height, width), (ph, pw) = inputs["pixel_values"].shape[2:], config.patch_shape
        inputs["bool_masked_pos"] = rng.random((1, (height // ph) * (width // pw))) < BLOCK
    return inputs


def _processor(args: argparse.Namespace, config: Any) -> Any:
    """What makes pixels of images: the model's image processor, or a tokenizer's mapping."""
    if not args.tokenizer:
        return load_processor(args.model, config, args.quiet)
    from ..tokenizer.preprocess import pixel_processor

    return pixel_processor(config.image_size, config.input_channels)


def made_model(args: argparse.Namespace, job: Job) -> Any:
    """minibeit's own, on the backend and in the precision that the options choose."""
    from ..ops import host_dtype
    from ..verify.networks import network

    arrays = cast(job.arrays, host_dtype(args.dtype))
    return network(job.config, job.task, arrays, dtype=args.dtype, backend=args.backend, device=args.device)


def cast(arrays: Any, dtype: str) -> Any:
    """{name: array} in another precision."""
    import numpy as np

    return {name: np.asarray(array, dtype) for name, array in arrays.items()}


def write_test_weights(args: argparse.Namespace, job: Job) -> int:
    """Writes the checkpoint; the architecture in its config says for which task it is."""
    import shutil

    from ..checkpoint.save import save_checkpoint
    from ..file_names import PROCESSOR_NAME, beside
    from ..hub import resolve
    from ..loading_options import FETCHED
    from ..task_table import TASKS
    from ..tokenizer.files import write_tokenizer
    from ..verify.informative import informative_weights

    folder, seed = Path(args.test_weights), args.random_seed or 0
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--test-weights: expected a folder that is empty or not there yet, found {folder}")
    if args.tokenizer:
        write_tokenizer(folder, job.config, informative_weights(job.config, job.task, seed))
        out(f"wrote {folder}: seed {seed}; give both sides this tokenizer")
        return 0
    config = job.config.replace(architectures=[TASKS[job.task].architecture(job.config.model_type)])
    save_checkpoint(folder, config, job.task, informative_weights(job.config, job.task, seed))
    settings = beside(resolve(args.model, FETCHED), PROCESSOR_NAME)
    if settings.is_file():
        shutil.copyfile(settings, folder / PROCESSOR_NAME)
    out(f"wrote {folder}: seed {seed}; give both sides this checkpoint")
    return 0


def judged_pixels(args: argparse.Namespace, job: Job, trace: TraceFile | None) -> tuple[Row | None, list[str]]:
    """The row of the pixels, where there are two sides of them, and what is to be said of those where there are not."""
    if trace is None:
        return None, []
    notes = _unmasked(args, job, trace)
    if not args.image:
        return None, [*notes, "preprocessing was not looked at, since no --image is given"]
    if "pixel_values" not in trace.inputs:
        return None, [*notes, f"preprocessing was not looked at, since {args.against} has no input.pixel_values"]
    from ..verify.pixels import judge

    return judge(trace.inputs["pixel_values"], _processor(args, job.config), args.image), notes


def _unmasked(args: argparse.Namespace, job: Job, trace: TraceFile) -> list[str]:
    """What is to be said where a model that hides patches is compared on a call that hides none."""
    masked = job.task == "masked_image_modeling" and job.config.use_mask_token
    if not masked or "bool_masked_pos" in job.inputs:
        return []
    return [f"{args.against} has no input.bool_masked_pos, so it was compared with a run in which no patch is masked"]
