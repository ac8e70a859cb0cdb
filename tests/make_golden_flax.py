"""Makes tests/data/golden_flax.safetensors from the real Flax classes.

Run by hand in an environment of its own, since transformers 5 has no Flax: pip install "transformers<5" flax jax
safetensors; then python tests/make_golden_flax.py
"""

from __future__ import annotations

import json
from pathlib import Path

import flax
import jax
import numpy as np
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

SEED = 0
SETTINGS = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 20, "image_size": 12,
    "patch_size": 4, "vocab_size": 11, "num_labels": 5, "use_mask_token": True, "layer_norm_eps": 1e-6,
}  # fmt: skip
VARIANTS = {  # name -> (class, changes of the settings)
    "model": ("FlaxBeitModel", {"use_relative_position_bias": True}),
    "model_cls": ("FlaxBeitModel", {"use_absolute_position_embeddings": True, "use_mean_pooling": False}),
    "mim": ("FlaxBeitForMaskedImageModeling", {"use_shared_relative_position_bias": True}),
    "classifier": (
        "FlaxBeitForImageClassification",
        {"use_relative_position_bias": True, "use_shared_relative_position_bias": True},
    ),
}


def main() -> None:
    rng = np.random.default_rng(SEED)
    pixel_values = rng.standard_normal((2, 3, 12, 12), dtype=np.float32)
    mask = rng.random((2, 9)) < 0.4
    tensors = {"pixel_values": pixel_values, "bool_masked_pos": mask}
    for name, (class_name, changes) in VARIANTS.items():
        model = getattr(transformers, class_name)(transformers.BeitConfig(**SETTINGS, **changes), seed=SEED)
        params = {
            key: np.asarray(value) + 0.2 * rng.standard_normal(value.shape, dtype=np.float32)
            for key, value in flatten_dict(model.params, sep="/").items()
        }
        nested = unflatten_dict(params, sep="/")
        options = {"bool_masked_pos": mask} if name in ("model", "mim") else {}
        out = model(pixel_values, params=nested, output_hidden_states=True, output_attentions=True, **options)
        tensors.update({f"{name}/params/{key}": value for key, value in params.items()})
        for key, value in out.items():
            parts = value if isinstance(value, tuple) else [value]
            tensors.update({f"{name}/out/{key}.{i}": np.asarray(part) for i, part in enumerate(parts)})
    metadata = {
        "seed": str(SEED),
        "settings": json.dumps(SETTINGS),
        "variants": json.dumps(VARIANTS),
        "versions": f"transformers {transformers.__version__}, flax {flax.__version__}, jax {jax.__version__}",
    }
    save_file(tensors, Path(__file__).parent / "data" / "golden_flax.safetensors", metadata)


if __name__ == "__main__":
    main()
