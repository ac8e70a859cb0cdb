"""Makes data/golden_*.safetensors: every intermediate of tiny random BEiTs, computed by PyTorch and transformers.

Run by hand, `python tests/make_golden.py`; needs the extra verify.  A file holds the weights and inputs (exact in
float32), the float64 truth of every intermediate under its name in our traces, and in its metadata PyTorch float32's
own distance from that truth, the settings, the seed and the versions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import parity
import torch
import transformers
from safetensors.numpy import save_file

from minibeit.checkpoint.names import hub_names
from minibeit.params import param_shapes

DATA = Path(__file__).parent / "data"
TINY = dict(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=20,
    image_size=12,
    patch_size=4,
    num_labels=3,
    vocab_size=12,
    layer_norm_eps=1e-12,
)
BLOCK_BIAS = {"use_relative_position_bias": True}
SHARED_BIAS = {"use_shared_relative_position_bias": True}
POSITIONS = {"use_absolute_position_embeddings": True}
SEGMENT = {"num_hidden_layers": 4, "hidden_size": 8, "out_indices": [1, 2, 3, 4], "image_size": 16}

# name -> task, settings, size of the images
CASES = {
    "block_bias": ("image_classification", BLOCK_BIAS, (12, 12)),
    "shared_bias": ("model", {**SHARED_BIAS, "use_mask_token": True}, (12, 12)),
    "both_biases_resized": ("model", {**BLOCK_BIAS, **SHARED_BIAS}, (8, 20)),
    "absolute_positions": ("image_classification", {**POSITIONS, "num_labels": 1}, (12, 12)),
    "absolute_positions_resized": ("model", POSITIONS, (20, 8)),
    "cls_pooling": ("model", {**BLOCK_BIAS, "use_mean_pooling": False, "layer_scale_init_value": 0.0}, (12, 12)),
    "masked": ("masked_image_modeling", {**SHARED_BIAS, "use_mask_token": True, "hidden_act": "gelu_new"}, (12, 12)),
    "segmentation": (
        "semantic_segmentation",
        {**BLOCK_BIAS, **SEGMENT, "auxiliary_channels": 6, "auxiliary_concat_input": True, "pool_scales": [1, 2, 3]},
        (16, 16),
    ),
    "backbone": ("backbone", {**BLOCK_BIAS, **SEGMENT, "add_fpn": True, "num_channels": 1}, (16, 16)),
    "non_square": ("model", {**BLOCK_BIAS, "image_size": (12, 8)}, (12, 8)),
}

# Where PyTorch computes what our trace calls ...: (module, its input or its output).  {i} is any number.
PLACES = [
    (r"beit\.embeddings\.patch_embeddings", "output", "embeddings.patches"),
    (r"beit\.embeddings", "output", "embeddings"),
    (r"beit\.layers\.(\d+)\.layernorm_before", "output", "encoder.{i}.norm1"),
    (r"beit\.layers\.(\d+)\.attention\.q_proj", "heads", "encoder.{i}.attention.query"),
    (r"beit\.layers\.(\d+)\.attention\.k_proj", "heads", "encoder.{i}.attention.key"),
    (r"beit\.layers\.(\d+)\.attention\.v_proj", "heads", "encoder.{i}.attention.value"),
    (r"beit\.layers\.(\d+)\.attention\.o_proj", "input", "encoder.{i}.attention.context"),
    (r"beit\.layers\.(\d+)\.attention", "second", "encoder.{i}.attention.probs"),
    (r"beit\.layers\.(\d+)\.layernorm_after", "input", "encoder.{i}.attention.residual"),
    (r"beit\.layers\.(\d+)\.layernorm_after", "output", "encoder.{i}.norm2"),
    (r"beit\.layers\.(\d+)\.mlp\.fc2", "input", "encoder.{i}.mlp.hidden"),
    (r"beit\.layers\.(\d+)", "output", "encoder.{i}.output"),
    (r"beit\.layernorm", "output", "norm"),
    (r"beit\.pooler", "output", "pooler"),
    (r"layernorm", "output", "layernorm"),
    (r"classifier|lm_head|decode_head", "output", "logits"),
    (r"fpn", "maps", "feature_maps"),
    (r"fpn", "each", "fpn"),
    (r"fpn\.fpn1\.activation", "output", "fpn.0.hidden"),
    (r"decode_head\.psp_modules\.blocks\.(\d+)\.pooling", "output", "decode_head.psp_pools.{i}"),
    (r"decode_head\.psp_modules\.blocks\.(\d+)\.conv", "output", "decode_head.psp_modules.{i}"),
    (r"decode_head\.(psp_bottleneck|fpn_bottleneck)", "output", "decode_head.{i}"),
    (r"decode_head\.lateral_convs\.(\d+)", "output", "decode_head.lateral_convs.{i}"),
    (r"decode_head\.fpn_convs\.(\d+)", "input", "decode_head.laterals.{i}"),
    (r"decode_head\.fpn_convs\.(\d+)", "output", "decode_head.fpn_convs.{i}"),
    (r"auxiliary_head\.convs\.(\d+)", "output", "auxiliary_head.convs.{i}"),
    (r"auxiliary_head\.conv_cat", "output", "auxiliary_head.conv_cat"),
    (r"auxiliary_head", "output", "auxiliary_logits"),
]


def watch(model, named: dict[str, np.ndarray]) -> None:
    """Hooks that put every intermediate into `named` under its name in our traces."""
    if not hasattr(model, "beit"):  # the bare model is its own encoder
        modules = [(f"beit.{name}", module) for name, module in model.named_modules() if name]
    else:
        modules = list(model.named_modules())
    heads = model.config.num_attention_heads
    for path, module in modules:
        for pattern, part, target in PLACES:
            match = re.fullmatch(pattern, path)
            if match is None or isinstance(module, torch.nn.Identity):
                continue
            name = target.format(i=match[1]) if match.groups() else target

            def keep(module, args, result, name=name, part=part):
                value = args[0] if part in ("input", "maps") else result[1] if part == "second" else result
                if part in ("each", "maps"):
                    named.update({f"{name}.{i}": level.numpy().copy() for i, level in enumerate(value)})
                    return
                if part == "heads":
                    B, N, D = value.shape
                    value = value.view(B, N, heads, D // heads).transpose(1, 2)
                named[name] = value.numpy()

            module.register_forward_hook(keep)


def intermediates(model, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{name: array} of one pass: the traced names, and the outputs as `output.NAME`."""
    named: dict[str, np.ndarray] = {}
    watch(model, named)
    found = parity.hf_outputs(model, arrays)
    repeated = ("hidden_states", "attentions", "logits", "auxiliary_logits")
    named.update({f"output.{name}": value for name, value in found.items() if not name.startswith(repeated)})
    return {name: np.array(value, order="C") for name, value in named.items()}


def inputs(task: str, settings: dict, size: tuple[int, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    P = size[0] * size[1] // settings["patch_size"] ** 2
    arrays = {"pixel_values": rng.standard_normal((2, settings.get("num_channels", 3), *size), dtype=np.float32)}
    if settings.get("use_mask_token"):
        arrays["bool_masked_pos"] = rng.random((2, P)) < 0.4
    if task == "masked_image_modeling":
        arrays["labels"] = rng.integers(0, settings["vocab_size"], int(arrays["bool_masked_pos"].sum()))
    if task == "image_classification":
        K = settings["num_labels"]
        arrays["labels"] = rng.integers(0, K, 2) if K > 1 else rng.standard_normal(2, dtype=np.float32)
    if task == "semantic_segmentation":
        labels = rng.integers(0, settings["num_labels"], (2, 23, 30))
        labels[rng.random(labels.shape) < 0.1] = 255
        arrays["labels"] = labels
    return arrays


def make(name: str, seed: int) -> Path:
    task, changes, size = CASES[name]
    settings = {**TINY, **changes}
    model = parity.hf_model(task, settings, seed)
    arrays = inputs(task, settings, size, np.random.default_rng(seed))
    config = parity.our_config(model)
    shapes = param_shapes(config, task)
    stored = parity.hf_arrays(model)
    prefixed, bare = hub_names(shapes), hub_names(shapes, bare=True)
    tensors = {f"input.{key}": value for key, value in arrays.items()}
    for key in shapes:
        weight = stored[prefixed[key] if prefixed[key] in stored else bare[key]]
        tensors[f"weight.{key}"] = weight.astype(np.float32)
        assert np.array_equal(tensors[f"weight.{key}"], weight), key
    twin = parity.hf_float32(model)
    with torch.no_grad():
        truth, single = intermediates(model, arrays), intermediates(twin, arrays)
    tensors |= {f"truth.{key}": value for key, value in truth.items()}
    errors = {key: parity.rms(single[key] - truth[key]) for key in truth}
    path = DATA / f"golden_{name}.safetensors"
    metadata = {
        "task": task,
        "config": json.dumps(config.to_dict()),
        "float32_rms": json.dumps(errors),
        "seed": str(seed),
        "versions": json.dumps(
            {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
        ),
        "made_by": "tests/make_golden.py",
    }
    save_file({key: np.array(value, order="C") for key, value in tensors.items()}, path, metadata)
    return path


if __name__ == "__main__":
    for number, case in enumerate(CASES):
        written = make(case, seed=number)
        print(f"{written.name}: {written.stat().st_size / 1e3:.0f} KB")
