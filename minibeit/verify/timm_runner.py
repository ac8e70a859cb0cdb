"""timm's BEiT as a source: the second implementation in PyTorch, for image classification at the native size."""

from __future__ import annotations

import functools
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ..checkpoint.names import DIALECTS, Naming
from .lockstep import Job
from .streams import RunSource
from .torch_runner import shared_tensor, torch_library


def timm_source(job: Job, leave_out: tuple[str, ...] = ()) -> RunSource:
    """timm's run in float32 on the job's weights and input.

    Raises ImportError without timm and ValueError for what timm does not have: other tasks, activations and sizes.
    """
    torch = torch_library()
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"comparing with timm needs it to be installed (pip install timm): {error}") from error
    model = _build(job, torch)
    names = [name for name in job.shapes() if not any(fnmatchcase(name, pattern) for pattern in leave_out)]
    label = f"PyTorch {torch.__version__.split('+')[0]} float32 (timm {timm.__version__})"
    return RunSource(label, names, lambda trace: _run(model, job, trace, torch))


def _build(job: Job, torch: Any) -> Any:
    from timm.models.beit import Beit

    c = job.config
    if job.task != "image_classification" or c.hidden_act != "gelu" or c.num_labels == 0:
        raise ValueError(f"timm has BEiT for image classification with gelu, found {job.task} with {c.hidden_act}")
    if tuple(job.inputs["pixel_values"].shape[2:]) != c.image_shape:
        raise ValueError(f"timm takes images of the model's own size {c.image_shape} only")
    with torch.device("meta"):
        model = Beit(
            img_size=c.image_shape,
            patch_size=c.patch_shape,
            in_chans=c.num_channels,
            num_classes=c.num_labels,
            global_pool="avg" if c.use_mean_pooling else "token",
            embed_dim=c.hidden_size,
            depth=c.num_hidden_layers,
            num_heads=c.num_attention_heads,
            mlp_ratio=c.intermediate_size / c.hidden_size,
            init_values=c.layer_scale_init_value or None,
            use_abs_pos_emb=c.use_absolute_position_embeddings,
            use_rel_pos_bias=c.use_relative_position_bias,
            use_shared_rel_pos_bias=c.use_shared_relative_position_bias,
            norm_layer=functools.partial(torch.nn.LayerNorm, eps=c.layer_norm_eps),
        )
    model = model.to_empty(device="cpu")  # timm fills its index tables itself, which the meta device does not
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    model.load_state_dict(_state(job, torch), assign=True)
    for block in model.blocks:
        block.attn.fused_attn = False  # so that there are probabilities to look at
    return model.eval()


def _state(job: Job, torch: Any) -> dict[str, Any]:
    """The state dict in timm's names; queries, keys and values are one tensor there."""
    naming, parts = Naming(DIALECTS["unilm"], ""), dict[str, list[np.ndarray]]()
    for name, array in job.arrays.items():
        if name != "beit.embeddings.mask_token":
            parts.setdefault(naming.place(name).name, []).append(array)
    return {name: shared_tensor(a[0] if len(a) == 1 else np.concatenate(a), torch) for name, a in parts.items()}


def _run(model: Any, job: Job, trace: Any, torch: Any) -> None:
    H = job.config.num_attention_heads
    handles = []

    def after(module: Any, name: str) -> None:
        def hook(module: Any, args: Any, result: Any) -> None:
            trace.record(name, result.detach().numpy())

        handles.append(module.register_forward_hook(hook))

    def before(module: Any, name: str) -> None:
        def hook(module: Any, args: Any) -> None:
            trace.record(name, args[0].detach().numpy())

        handles.append(module.register_forward_pre_hook(hook))

    def attention(attn: Any, path: str) -> None:
        """timm calls no module for q, k and v: the same product is done once more here."""

        def hook(module: Any, args: Any) -> None:
            tables = [m.relative_position_bias_table for m in (model.rel_pos_bias, attn) if m is not None]
            tables = [table.detach().numpy() for table in tables if table is not None]
            if tables:
                trace.record(f"{path}.bias_table", sum(tables[1:], tables[0]))
            bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
            qkv = torch.nn.functional.linear(args[0], attn.qkv.weight, bias)
            B, N, _ = args[0].shape
            for name, x in zip(("query", "key", "value"), qkv.reshape(B, N, 3, H, -1).permute(2, 0, 3, 1, 4)):
                trace.record(f"{path}.{name}", x.numpy())

        handles.append(attn.register_forward_pre_hook(hook))
        if trace.wants(f"{path}.probs"):
            after(attn.attn_drop, f"{path}.probs")
        before(attn.proj, f"{path}.context")

    after(model.patch_embed, "embeddings.patches")
    after(model.pos_drop, "embeddings")
    for i, block in enumerate(model.blocks):
        path = f"encoder.{i}"
        after(block.norm1, f"{path}.norm1")
        attention(block.attn, f"{path}.attention")
        before(block.norm2, f"{path}.attention.residual")
        after(block.norm2, f"{path}.norm2")
        before(block.mlp.fc2, f"{path}.mlp.hidden")
        after(block, f"{path}.output")
    if not job.config.use_mean_pooling:
        after(model.norm, "norm")
    before(model.head, "pooler")
    after(model.head, "logits")
    try:
        with torch.no_grad():
            model(torch.from_numpy(np.array(job.inputs["pixel_values"], np.float32)))
    finally:
        for handle in handles:
            handle.remove()
