"""Writes tests/data/dialects/: tiny checkpoints made by the software whose dialect they are, and what it computed.

    python tests/make_golden_dialects.py unilm FOLDER     FOLDER: the folder beit of a clone of microsoft/unilm;
                                                          needs torch, timm, scipy (timm's import of torchvision is
                                                          stubbed where that is missing)
    python tests/make_golden_dialects.py timm             needs torch, timm
    python tests/make_golden_dialects.py transformers4    needs torch, transformers<5, flax, jax

Every parameter is random (seed 0): defaults such as zero tables would hide mistakes.  Logits are float64 where the
software can, else float32.  NAME.* is the checkpoint, NAME.expected.safetensors its input and output.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent / "data" / "dialects"
SIZES = dict(img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=3, mlp_ratio=2)
PIXELS = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)


def randomise(torch: Any, model: Any) -> Any:
    """Every parameter and running statistic drawn at random, exact in float32, and the model in float64."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                one = name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight"))
                value.copy_(1 + 0.2 * noise.abs() if one else 0.3 * noise)
    return model.eval()


def expect(name: str, note: dict[str, str], **arrays: Any) -> None:
    content = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
    path = FOLDER / f"{name}.expected.safetensors"
    save_file(content, path, {"seed": "0", "numpy": np.__version__, **note})
    path.chmod(0o644)


def stub_torchvision() -> None:
    """timm imports torchvision, whose builds do not fit every torch; BEiT uses nothing of it."""
    if importlib.util.find_spec("torchvision") is not None:
        return

    class Names(type):
        def __getattr__(cls, name: str) -> str:  # InterpolationMode.NEAREST and the like
            if name.startswith("__"):
                raise AttributeError(name)
            return name

    class Anything(types.ModuleType):
        __path__: list[str] = []

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return Names(name, (), {})

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            if name.split(".")[0] in ("torchvision", "huggingface_hub"):
                return importlib.util.spec_from_loader(name, Finder)
            return None

        @staticmethod
        def create_module(spec: Any) -> Any:
            return Anything(spec.name)

        @staticmethod
        def exec_module(module: Any) -> None:
            pass

    sys.meta_path.append(Finder)  # type: ignore[arg-type]


def unilm(folder: str) -> None:
    stub_torchvision()
    import timm
    import torch

    sys.path.insert(0, folder)
    import modeling_finetune
    import modeling_pretrain

    note = {"software": "microsoft/unilm beit", "torch": torch.__version__, "timm": timm.__version__}
    norm = lambda width: torch.nn.LayerNorm(width, eps=1e-6)  # noqa: E731
    shared = dict(**SIZES, qkv_bias=True, norm_layer=norm)
    x = torch.from_numpy(PIXELS).double()

    for name, settings in {
        "unilm_classification": dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1),
        "unilm_cls_token": dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1, use_mean_pooling=False),
        "unilm_dit": dict(use_abs_pos_emb=True, init_values=0.1),
        "unilm_plain": dict(use_abs_pos_emb=True),
    }.items():
        model = randomise(torch, modeling_finetune.VisionTransformer(num_classes=5, **shared, **settings))
        wrapped = {"module": model.state_dict()} if name == "unilm_dit" else {"model": model.state_dict(), "epoch": 29}
        torch.save(wrapped, FOLDER / f"{name}.pth")
        with torch.no_grad():
            logits = model.double()(x)
        expect(name, note, pixel_values=PIXELS, logits=logits.numpy())

    # unilm's pre-training calls patch_embed(x, bool_masked_pos=...), which takes and ignores it
    model = modeling_pretrain.VisionTransformerForMaskedImageModeling(
        vocab_size=20, use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1, **shared
    )
    randomise(torch, model)
    torch.save({"model": model.state_dict()}, FOLDER / "unilm_mim.pth")
    mask = np.random.default_rng(1).random((2, 16)) < 0.4
    with torch.no_grad():
        logits = model.double()(x, torch.from_numpy(mask), return_all_tokens=True)
    expect("unilm_mim", note, pixel_values=PIXELS, bool_masked_pos=mask, logits=logits.numpy())
    unilm_backbone(torch, folder, shared, x, note)
    unilm_resize(torch, note)


def unilm_backbone(torch: Any, folder: str, shared: dict[str, Any], x: Any, note: dict[str, str]) -> None:
    """The encoder with pyramid of the ADE20K models; mmcv and mmseg, of which it uses the registry, are stubbed."""
    registry = types.SimpleNamespace(register_module=lambda: lambda cls: cls)
    for name, content in {
        "mmcv_custom": dict(load_checkpoint=None),
        "mmseg": {},
        "mmseg.utils": dict(get_root_logger=None),
        "mmseg.models": {},
        "mmseg.models.builder": dict(BACKBONES=registry),
    }.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(content)
    sys.path.insert(0, f"{folder}/semantic_segmentation")
    from backbone.beit import BEiT

    settings = {**shared, "patch_size": 16, "img_size": 64, "depth": 4, "out_indices": [0, 1, 2, 3]}
    model = BEiT(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1, **settings)
    randomise(torch, model)
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "meta": {"CLASSES": ("wall", "sky")}}, FOLDER / "unilm_backbone.pth")
    pixels = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)
    with torch.no_grad():
        maps = model.double()(torch.from_numpy(pixels).double())
    named = {f"feature_maps.{i}": value.numpy() for i, value in enumerate(maps)}
    expect("unilm_backbone", note, pixel_values=pixels, **named)


def unilm_resize(torch: Any, note: dict[str, str]) -> None:
    """The tables of unilm_classification for 32 pixels, by timm's adaptation of unilm's resizing (linear)."""
    from timm.layers.pos_embed import resample_abs_pos_embed
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

    rng = np.random.default_rng(2)
    table = rng.standard_normal((7 * 7 + 3, 3)).astype(np.float32)
    positions = rng.standard_normal((1, 17, 4)).astype(np.float32)
    new = resize_rel_pos_bias_table(torch.from_numpy(table), (8, 6), (15 * 11 + 3, 3))
    embedded = resample_abs_pos_embed(torch.from_numpy(positions), [8, 6])
    small = resample_abs_pos_embed(torch.from_numpy(positions), [3, 2])
    arrays = dict(table=table, positions=positions, timm_table=new.numpy(), timm_positions=embedded.numpy())
    expect("timm_resize", note, **arrays, timm_positions_small=small.numpy())


def timm_model() -> None:
    stub_torchvision()
    import timm
    import torch
    from safetensors.torch import save_file as save_torch
    from timm.models.beit import Beit

    settings = dict(SIZES, num_classes=5, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)
    model = randomise(torch, Beit(**settings))
    save_torch(model.state_dict(), FOLDER / "timm.safetensors")
    (FOLDER / "timm.safetensors").chmod(0o644)
    with torch.no_grad():
        logits = model.double()(torch.from_numpy(PIXELS).double())
    note = {"software": "timm", "torch": torch.__version__, "timm": timm.__version__}
    expect("timm", note, pixel_values=PIXELS, logits=logits.numpy())


def transformers4() -> None:
    import flax
    import jax
    import torch
    import transformers

    note = {"torch": torch.__version__, "transformers": transformers.__version__}
    sizes = dict(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24, image_size=16, patch_size=4,
        vocab_size=20, num_labels=5,
    )  # fmt: skip
    per_block, shared = dict(use_relative_position_bias=True), dict(use_shared_relative_position_bias=True)
    x = torch.from_numpy(PIXELS).double()
    data2vec = transformers.Data2VecVisionConfig
    for name, cls, config, settings, safe in (
        ("hub_classification", "BeitForImageClassification", transformers.BeitConfig, per_block, True),
        ("hub_mim", "BeitForMaskedImageModeling", transformers.BeitConfig, {**shared, "use_mask_token": True}, False),
        ("data2vec_classification", "Data2VecVisionForImageClassification", data2vec, per_block, False),
        ("data2vec_model", "Data2VecVisionModel", data2vec, {**shared, "use_mean_pooling": False}, True),
    ):
        model = randomise(torch, getattr(transformers, cls)(config(**sizes, **settings)))
        model.save_pretrained(FOLDER / name, safe_serialization=safe)
        with torch.no_grad():
            output = model.double()(x)
        value = output.logits if hasattr(output, "logits") else output.last_hidden_state
        expect(name, {**note, "software": "transformers"}, pixel_values=PIXELS, output=value.numpy())

    note.update(software="transformers Flax", flax=flax.__version__, jax=jax.__version__)
    for name, cls, settings in (
        ("flax_classification", "FlaxBeitForImageClassification", per_block),
        ("flax_mim", "FlaxBeitForMaskedImageModeling", {**shared, "use_mask_token": True}),
    ):
        model = getattr(transformers, cls)(transformers.BeitConfig(**sizes, **settings), seed=0)
        rng = np.random.default_rng(0)
        flat = flax.traverse_util.flatten_dict(model.params)
        drawn = {
            key: (key[-1] == "scale") + 0.3 * rng.standard_normal(flat[key].shape, np.float32) for key in sorted(flat)
        }
        model.params = flax.traverse_util.unflatten_dict(
            {key: value.astype(np.float32) for key, value in drawn.items()}
        )
        model.save_pretrained(FOLDER / name)
        expect(name, note, pixel_values=PIXELS, output=np.asarray(model(PIXELS).logits))


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    {"unilm": unilm, "timm": timm_model, "transformers4": transformers4}[sys.argv[1]](*sys.argv[2:])
