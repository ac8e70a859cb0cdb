"""Writes tests/data/transformers4: what transformers 4 saves of every class, and what it computes from it.

Run with transformers 4.57 and torch: python tests/make_transformers_files.py.  The files are as save_pretrained wrote
them but for their values, which are drawn with more spread than a new model has.
"""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent / "data" / "transformers4"
SIZES = dict(hidden_size=4, num_hidden_layers=4, num_attention_heads=2, intermediate_size=4, image_size=8, patch_size=4,
             vocab_size=5, num_labels=3, layer_norm_eps=1e-6)  # fmt: skip
CLASSES = ("Model", "ForMaskedImageModeling", "ForImageClassification", "ForSemanticSegmentation", "Backbone")
SEGMENTATION = dict(out_indices=[1, 2, 3, 4], pool_scales=[1, 2], auxiliary_channels=4)


def cases():
    """(name, class, settings): every class with both poolings, the kinds of position in turn."""
    kinds = itertools.cycle(
        [{"use_relative_position_bias": True}, {"use_shared_relative_position_bias": True},
         {"use_absolute_position_embeddings": True}]
    )  # fmt: skip
    for name, pooling in itertools.product(CLASSES, (True, False)):
        settings = {**SIZES, "use_mean_pooling": pooling, **next(kinds)}
        if name == "ForMaskedImageModeling":
            settings["use_mask_token"] = True
        if name in ("ForSemanticSegmentation", "Backbone"):
            settings.update(SEGMENTATION)
        if name == "Backbone":
            settings.update(add_fpn=pooling, batch_norm_eps=1e-5)
        yield f"{name}-{'mean' if pooling else 'cls'}", name, settings


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)
    for case, name, settings in cases():
        model = getattr(transformers, f"Beit{name}")(transformers.BeitConfig(**settings)).eval()
        with torch.no_grad():
            for key, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
                if value.is_floating_point():
                    value.copy_(torch.randn(value.shape, generator=generator).abs() + 0.5 if "running_var" in key
                                else torch.randn(value.shape, generator=generator) * 0.5)  # fmt: skip
        model.save_pretrained(FOLDER / case)
        pixels = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            output = model.double()(pixels)
        found = output.feature_maps if name == "Backbone" else [output[0]]
        arrays = {f"output.{i}": np.ascontiguousarray(array.numpy()) for i, array in enumerate(found)}
        save_file({"pixel_values": pixels.numpy(), **arrays}, FOLDER / case / "expected.safetensors",
                  {"transformers": transformers.__version__, "torch": torch.__version__, "seed": "0"})  # fmt: skip


if __name__ == "__main__":
    main()
