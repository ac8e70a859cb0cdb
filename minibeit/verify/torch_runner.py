"""PyTorch's own BEiT as a source: transformers' classes with hooks that give the canonical names.

The only file that imports torch; `timm_runner` gets it from here.  The weights are not copied: PyTorch computes on the
same memory.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ..checkpoint.names import DIALECTS, Naming
from ..config import BeitConfig
from ..ops import reference
from ..task_table import TASKS
from .lockstep import Job
from .streams import RunSource

# Where transformers 5 and 4 compute what we record: module path -> (what of it, canonical name).
# "out" is the module's result, "in" its first argument; "heads" a result to be split into heads, "second" the second
# part of a result, "outs"/"ins" a tuple of maps.
LAYERS5 = {
    "layernorm_before": [("out", "norm1")],
    "attention.q_proj": [("heads", "attention.query")],
    "attention.k_proj": [("heads", "attention.key")],
    "attention.v_proj": [("heads", "attention.value")],
    "attention.o_proj": [("in", "attention.context")],
    "attention": [("second", "attention.probs")],
    "layernorm_after": [("in", "attention.residual"), ("out", "norm2")],
    "mlp.fc2": [("in", "mlp.hidden")],
    "": [("out", "output")],
}
LAYERS4 = {
    "layernorm_before": [("out", "norm1")],
    "attention.attention.query": [("heads", "attention.query")],
    "attention.attention.key": [("heads", "attention.key")],
    "attention.attention.value": [("heads", "attention.value")],
    "attention.attention": [("second", "attention.probs")],
    "attention.output.dense": [("in", "attention.context")],
    "layernorm_after": [("in", "attention.residual"), ("out", "norm2")],
    "output.dense": [("in", "mlp.hidden")],
    "": [("out", "output")],
}
HEADS5 = {
    "fpn": [("ins", "feature_maps"), ("outs", "fpn")],
    "fpn.fpn1.activation": [("out", "fpn.0.hidden")],
}
HEADS4 = {
    "fpn1": [("in", "feature_maps.0"), ("out", "fpn.0")],
    "fpn1.2": [("out", "fpn.0.hidden")],
    "fpn2": [("in", "feature_maps.1"), ("out", "fpn.1")],
    "fpn3": [("in", "feature_maps.2"), ("out", "fpn.2")],
    "fpn4": [("in", "feature_maps.3"), ("out", "fpn.3")],
}


def torch_source(job: Job, leave_out: tuple[str, ...] = ()) -> RunSource:
    """The run of PyTorch in float32 on the job's weights and input, without arrays that `leave_out` (globs) names.

    Raises ImportError naming the extra and ValueError for a config that transformers has no model for.
    """
    torch, transformers = _libraries()
    model = build(job.config, job.task, job.arrays)
    label = f"PyTorch {torch.__version__.split('+')[0]} float32 (transformers {transformers.__version__})"
    names = [name for name in job.shapes() if not any(fnmatchcase(name, pattern) for pattern in leave_out)]
    return RunSource(label, names, lambda trace: run(model, job, trace))


MISSING = (
    'comparing with PyTorch needs torch and transformers: pip install "minibeit[verify]"; '
    "or give a trace made elsewhere with --against FILE"
)


def torch_library() -> Any:
    """The module torch.  Raises ImportError naming the extra."""
    if "torch" not in sys.modules:  # threads that wait by spinning would starve the runs beside them
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("KMP_BLOCKTIME", "0")
    try:
        import torch
    except ImportError as error:
        raise ImportError(MISSING) from error
    return torch


def _libraries() -> tuple[Any, Any]:
    torch = torch_library()
    try:
        import transformers
    except ImportError as error:
        raise ImportError(MISSING) from error
    return torch, transformers


def build(config: BeitConfig, task: str, arrays: Mapping[str, np.ndarray]) -> Any:
    """transformers' model of the task, its parameters being views of `arrays`."""
    torch, transformers = _libraries()
    data2vec = config.model_type == "data2vec-vision"
    name = TASKS[task].architecture(config.model_type)
    if not hasattr(transformers, name):
        raise ValueError(f"transformers {transformers.__version__} has no {name} to compare {task} with")
    config_class = transformers.Data2VecVisionConfig if data2vec else transformers.BeitConfig
    settings = {k: v for k, v in config.to_dict().items() if k not in ("compat", "feature_convention", "architectures")}
    options = {"add_pooling_layer": True} if task == "model" else {}
    with torch.device("cpu" if _old() else "meta"):  # old classes compute while they are made
        model = getattr(transformers, name)(config_class(**settings, attn_implementation="eager"), **options)
    model.load_state_dict(_state(model, config, arrays, torch), strict=False, assign=True)
    left = [key for key, value in model.state_dict().items() if value.is_meta and "num_batches_tracked" not in key]
    if left:
        raise ValueError(f"transformers' {name} has weights that the checkpoint lacks: {', '.join(left[:4])}")
    return model.eval()


def _state(model: Any, config: BeitConfig, arrays: Mapping[str, np.ndarray], torch: Any) -> dict[str, Any]:
    """The state dict, under whichever names this version of transformers has in memory."""
    keys = set(model.state_dict())
    namings = [Naming(DIALECTS[d], p) for d in ("transformers5", "hub") for p in ("beit.", "data2vec_vision.", "")]
    state = {}
    for name, array in arrays.items():  # Data2Vec-Vision has names of both versions in one model
        key = next((key for key in (naming.place(name).name for naming in namings) if key in keys), None)
        if key is None:
            raise ValueError(f"transformers' {type(model).__name__} has no place for {name}")
        state[key] = shared_tensor(array, torch)
    return state


def shared_tensor(array: np.ndarray, torch: Any) -> Any:
    """A tensor on the same memory; of mapped files it is read-only, which inference respects."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def run(model: Any, job: Job, trace: Any) -> None:
    """One forward pass with hooks that record into `trace`."""
    import torch

    H = job.config.num_attention_heads
    handles = []
    for path, wanted in _plan(model, job.config):
        module = model.get_submodule(path)
        for what, name in wanted:
            if what in ("in", "ins"):
                handles.append(module.register_forward_pre_hook(_before(trace, what, name), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(_after(trace, what, name, H)))
    handles += _bias_hooks(model, job, trace)
    options = {}
    if any(hasattr(module, "layer") for module in model.modules()) and trace.wants("encoder.0.attention.probs"):
        options["output_attentions"] = True  # else old classes return none; new ones would hoard those of all blocks
    try:
        with torch.no_grad():
            result = forward(model, job, **options)
        _record_results(result, trace, job)
    finally:
        for handle in handles:
            handle.remove()


def forward(model: Any, job: Job, **options: Any) -> Any:
    """The model's output for the job's inputs, floats in float32.  Raises ValueError for inputs it cannot take."""
    import torch

    inputs = {}
    for name, array in job.inputs.items():
        tensor = torch.from_numpy(np.array(array))
        inputs[name] = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
    if _interpolates(model, job):
        options["interpolate_pos_encoding"] = True
    try:
        return model(**inputs, **options)
    except RuntimeError as error:  # torch's own, such as positions that transformers cannot resize
        raise ValueError(f"transformers cannot run this model on this input: {str(error).splitlines()[0]}") from error


def _plan(model: Any, config: BeitConfig) -> list[tuple[str, list[tuple[str, str]]]]:
    """(module path, what to record of it) for this model."""
    prefix = next((p for p in ("beit", "data2vec_vision") if hasattr(model, p)), "")
    dot = f"{prefix}." if prefix else ""
    encoder = model.get_submodule(prefix)
    new = hasattr(encoder, "layers")
    plan: list[tuple[str, list[tuple[str, str]]]] = [
        (f"{dot}embeddings.patch_embeddings", [("out", "embeddings.patches")]),
        (f"{dot}embeddings", [("first", "embeddings")]),
    ]
    for i in range(config.num_hidden_layers):
        layer = f"{dot}layers.{i}" if new else f"{dot}encoder.layer.{i}"
        for path, wanted in (LAYERS5 if new else LAYERS4).items():
            full = f"{layer}.{path}" if path else layer
            plan.append((full, [(what, f"encoder.{i}.{name}") for what, name in wanted]))
    if not config.use_mean_pooling:
        plan.append((f"{dot}layernorm", [("out", "norm")]))
    if getattr(encoder, "pooler", None) is not None:
        plan.append((f"{dot}pooler", [("out", "pooler")]))
    if hasattr(model, "lm_head"):
        plan.append(("layernorm", [("out", "layernorm")]))
    fpn = getattr(model, "fpn", None)
    if fpn is not None and hasattr(fpn, "fpn1"):
        plan += HEADS5.items()
    elif hasattr(model, "fpn1"):
        plan += HEADS4.items()
    if hasattr(model, "decode_head"):
        plan += _decode_plan(model.decode_head, len(config.pool_scales))
        if model.auxiliary_head is not None:
            plan += _auxiliary_plan(model.auxiliary_head)
    return plan


def _decode_plan(head: Any, scales: int) -> list[tuple[str, list[tuple[str, str]]]]:
    root, plan = "decode_head.", []
    new = any(name == "blocks" for name, _ in head.psp_modules.named_children())
    for j in range(scales):
        pool, conv = (f"blocks.{j}.pooling", f"blocks.{j}.conv") if new else (f"{j}.0", f"{j}.1")
        plan.append((f"{root}psp_modules.{pool}", [("out", f"{root}psp_pools.{j}")]))
        plan.append((f"{root}psp_modules.{conv}", [("out", f"{root}psp_modules.{j}")]))
    for i in range(3):
        plan.append((f"{root}lateral_convs.{i}", [("out", f"{root}lateral_convs.{i}")]))
        plan.append((f"{root}fpn_convs.{i}", [("in", f"{root}laterals.{i}"), ("out", f"{root}fpn_convs.{i}")]))
    bottleneck = "psp_bottleneck" if hasattr(head, "psp_bottleneck") else "bottleneck"
    plan.append((f"{root}{bottleneck}", [("out", f"{root}psp_bottleneck")]))
    plan.append((f"{root}fpn_bottleneck", [("out", f"{root}fpn_bottleneck")]))
    return plan


def _auxiliary_plan(head: Any) -> list[tuple[str, list[tuple[str, str]]]]:
    root = "auxiliary_head."
    plan = [(f"{root}convs.{i}", [("out", f"{root}convs.{i}")]) for i in range(len(head.convs))]
    if getattr(head, "concat_input", False):
        plan.append((f"{root}conv_cat", [("out", f"{root}conv_cat")]))
    plan.append((f"{root}classifier", [("out", "auxiliary_logits")]))
    return plan


def _before(trace: Any, what: str, name: str) -> Any:
    def hook(module: Any, args: Any, kwargs: Any) -> None:
        first = args[0] if args else next(iter(kwargs.values()))
        for i, x in enumerate(first if what == "ins" else [first]):
            trace.record(f"{name}.{i}" if what == "ins" else name, x.detach().numpy())

    return hook


def _after(trace: Any, what: str, name: str, num_heads: int) -> Any:
    def hook(module: Any, args: Any, result: Any) -> None:
        if what == "second" and not trace.wants(name):
            return
        if what == "outs":
            for i, x in enumerate(result):
                trace.record(f"{name}.{i}", x.detach().numpy())
            return
        if what == "second":
            result = result[1]
        elif isinstance(result, tuple):
            result = result[0]
        x = result.detach()
        if what == "heads":
            x = x.reshape(*x.shape[:2], num_heads, -1).transpose(1, 2)
        trace.record(name, x.numpy())

    return hook


def _bias_hooks(model: Any, job: Job, trace: Any) -> list[Any]:
    """Hooks that read the bias table for the grid at hand back out of the (1, H, N, N) bias."""
    config = job.config
    if not (config.use_relative_position_bias or config.use_shared_relative_position_bias):
        return []
    ph, pw = config.patch_shape
    height, width = job.inputs["pixel_values"].shape[2:]
    index = reference.relative_position_index((height // ph, width // pw))
    _, first = np.unique(index, return_index=True)  # one pair of tokens for every row of the table
    parts: dict[str, np.ndarray] = {}

    def table(bias: Any) -> np.ndarray:
        return bias.detach().numpy().reshape(-1, index.size)[:, first].T

    def keep(key: str) -> Any:
        def hook(module: Any, args: Any, result: Any) -> None:
            parts[key] = table(result)

        return hook

    def emit(block: str) -> Any:
        def hook(module: Any, args: Any, result: Any) -> None:
            found = [parts[key] for key in ("shared", block) if key in parts]
            trace.record(f"encoder.{block}.attention.bias_table", sum(found[1:], found[0]))

        return hook

    handles = []
    for path, module in model.named_modules():
        block = next((word for word in path.split(".") if word.isdigit()), "shared")
        if path.endswith(("relative_position_bias", "shared_position_bias")):
            handles.append(module.register_forward_hook(keep(block)))
        elif path.endswith(("attention.o_proj", "attention.output.dense")):  # by then the block's bias has been made
            handles.append(module.register_forward_hook(emit(block)))
    return handles


def _interpolates(model: Any, job: Job) -> bool:
    """Whether an old transformers must be told that the image is not of the native size."""
    native = tuple(job.inputs["pixel_values"].shape[2:]) == job.config.image_shape
    return _old() and not native


def _old() -> bool:
    """Whether this is transformers 4."""
    import transformers

    return int(transformers.__version__.split(".")[0]) < 5


def _record_results(result: Any, trace: Any, job: Job) -> None:
    """What no hook saw: the logits, and maps of a backbone without feature pyramid."""
    if "logits" in result:
        trace.record("logits", result["logits"].detach().numpy())
    if job.task == "backbone" and not job.config.add_fpn:
        for i, x in enumerate(result["feature_maps"]):
            trace.record(f"feature_maps.{i}", x.detach().numpy())
