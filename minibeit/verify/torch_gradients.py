"""PyTorch's gradients: transformers' model, its own loss, autograd, and hooks that give the cotangents their names."""

from __future__ import annotations

from typing import Any

import numpy as np

from .gradients import COTANGENT, GRADIENT
from .lockstep import Job
from .networks import TOKENIZER
from .torch_runner import _plan, _state, build, forward, torch_library

SAME = 2  # the map of the feature pyramid that is its input; which reader counts as whose is a matter of the code


def torch_gradients(job: Job) -> tuple[str, dict[str, np.ndarray]]:
    """(label, every float32 gradient and cotangent by name); `job` has labels.

    Left out are the cotangents of position bias tables, which PyTorch has only spread over (H, N, N), and of `fpn.2`,
    which is `feature_maps.2` under another name.  Raises ImportError naming the extra, and ValueError for a config that
    transformers has no model for and for inputs that its model cannot take.
    """
    if job.task == TOKENIZER:
        from .torch_tokenizer import tokenizer_gradients

        return tokenizer_gradients(job)
    torch = torch_library()
    model = build(job.config, job.task, job.arrays)
    found: dict[str, np.ndarray] = {}
    handles = []
    for path, wanted in _plan(model, job.config):
        module = model.get_submodule(path)
        for what, name in wanted:
            handles.append(_hooked(module, what, COTANGENT + name, job.config.num_attention_heads, found))
    try:
        with torch.enable_grad():
            output = forward(model, job)
            if output["logits"].requires_grad:
                output["logits"].register_hook(lambda g: found.update({f"{COTANGENT}logits": g.numpy()}))
            output["loss"].backward()
    finally:
        for handle in handles:
            handle.remove()
    parameters = dict(model.named_parameters())
    for name, key in zip(job.arrays, _state(model, job.config, job.arrays, torch), strict=True):
        if key in parameters and parameters[key].grad is not None:
            found[GRADIENT + name] = parameters[key].grad.numpy()
    return f"PyTorch {torch.__version__.split('+')[0]} float32", found


def _hooked(module: Any, what: str, name: str, num_heads: int, found: dict[str, np.ndarray]) -> Any:
    def keep(tensor: Any, name: str) -> None:
        def hook(g: Any) -> None:
            if what == "heads":
                g = g.reshape(*g.shape[:2], num_heads, -1).transpose(1, 2)
            found[name] = g.numpy().copy()

        if tensor.requires_grad:
            tensor.register_hook(hook)

    def before(module: Any, args: Any, kwargs: Any) -> None:
        first = args[0] if args else next(iter(kwargs.values()))
        for i, x in enumerate(first if what == "ins" else [first]):
            keep(x, f"{name}.{i}" if what == "ins" else name)

    def after(module: Any, args: Any, result: Any) -> None:
        if what == "outs":
            for i, x in enumerate(result):
                if i != SAME:
                    keep(x, f"{name}.{i}")
        elif what != "second":  # attention maps, which minibeit has no cotangents of
            keep(result[0] if isinstance(result, tuple) else result, name)

    if what in ("in", "ins"):
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)
