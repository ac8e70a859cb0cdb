"""Makes tests/data/processor.safetensors: what transformers' BeitImageProcessorPil gives for small pictures and maps.

    python tests/make_golden_processor.py        # needs minibeit[verify]

Each case has a name, settings and an input; arrays are `NAME.pixel_values`, `NAME.labels`, inputs `input.NAME`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import torch
import transformers
from safetensors.numpy import save_file
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil

SEED = 20
FILE = Path(__file__).parent / "data" / "processor.safetensors"


def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Pictures (H, W, C) with both smooth areas and noise, label maps, and logits (B, K, h, w)."""
    y, x = np.mgrid[0:37, 0:29]
    waves = np.stack([np.sin(x / 5 + c) * np.cos(y / 7 - c) for c in range(4)], axis=-1)
    picture = np.clip(128 + 100 * waves + rng.normal(0, 30, waves.shape), 0, 255).astype(np.uint8)
    return {
        "picture": np.ascontiguousarray(picture[..., :3]),
        "rgba": picture,
        "gray": np.ascontiguousarray(picture[..., 0]),
        "floats": rng.random((23, 31, 3)).astype(np.float32),
        "whole_floats": np.floor(rng.random((23, 31, 3)) * 256).astype(np.float32),
        "doubles": rng.random((3, 20, 18)),
        "map": rng.choice(np.array([0, 1, 3, 10, 150, 255], np.uint8), (5, 4)).repeat(8, 0).repeat(7, 1),
        "logits": rng.normal(0, 1, (2, 5, 7, 9)).astype(np.float32),
    }


def cases() -> list[dict]:
    """Name, input, settings, and the input that is the label map if any."""
    # Pillow 13 resizes the height first where that is less work, older ones always the width; here both do the same.
    square, tall = {"height": 16, "width": 16}, {"height": 22, "width": 14}
    found = []
    for resample in range(6):
        found.append({"name": f"down{resample}", "input": "picture", "settings": {"size": tall, "resample": resample}})
        large = {"height": 40, "width": 33}
        found.append({"name": f"up{resample}", "input": "picture", "settings": {"size": large, "resample": resample}})
    for height, width in ((11, 12), (30, 31), (12, 33), (38, 9)):
        settings = {"do_resize": False, "do_center_crop": True, "crop_size": {"height": height, "width": width}}
        found.append({"name": f"crop{height}x{width}", "input": "picture", "settings": settings})
    plain = {
        "floats": {"input": "floats", "settings": {"size": square}},
        "floats_not_rescaled": {"input": "floats", "settings": {"size": square, "do_rescale": False}},
        "floats_not_resized": {"input": "floats", "settings": {"do_resize": False, "do_rescale": False}},
        "whole_floats": {"input": "whole_floats", "settings": {"size": square}},
        "doubles": {"input": "doubles", "settings": {"do_resize": False, "do_rescale": False}},
        "imagenet": {
            "input": "picture",
            "settings": {"size": square, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
        },
        "one_number": {"input": "picture", "settings": {"size": square, "image_mean": 0.4, "image_std": 0.3}},
        "not_normalized": {"input": "picture", "settings": {"size": square, "do_normalize": False}},
        "factor": {"input": "picture", "settings": {"size": square, "rescale_factor": 0.01}},
        "shortest": {"input": "picture", "settings": {"size": {"shortest_edge": 17}}},
        "longest": {"input": "picture", "settings": {"size": {"shortest_edge": 17, "longest_edge": 19}}},
        "max": {"input": "picture", "settings": {"size": {"max_height": 20, "max_width": 19}}},
        "rgba": {"input": "rgba", "settings": {"size": square, "do_convert_rgb": True}},
        "map": {"input": "picture", "map": "map", "settings": {"size": tall}},
        "map_reduced": {"input": "picture", "map": "map", "settings": {"size": tall, "do_reduce_labels": True}},
        "map_cropped": {
            "input": "picture",
            "map": "map",
            "settings": {"do_resize": False, "do_center_crop": True, "crop_size": tall, "do_reduce_labels": True},
        },
    }
    return found + [dict(name=name, **case) for name, case in plain.items()]


def main() -> None:
    arrays = inputs(np.random.default_rng(SEED))
    tensors = {f"input.{name}": array for name, array in arrays.items()}
    for case in cases():
        settings = {"do_center_crop": False, **case["settings"]}
        maps = arrays[case["map"]].copy() if "map" in case else None  # the original changes the caller's map
        batch = BeitImageProcessorPil(**settings)(arrays[case["input"]], maps, return_tensors="np")
        tensors.update({f"{case['name']}.{key}": np.ascontiguousarray(value) for key, value in batch.items()})
    outputs = SimpleNamespace(logits=torch.from_numpy(arrays["logits"]))
    post = BeitImageProcessorPil().post_process_semantic_segmentation
    sizes = [(20, 30), (5, 4)]
    for i, item in enumerate(post(outputs, sizes, return_segmentation_scores=True)):
        tensors[f"post{i}.segmentation"] = item.segmentation.numpy()
        tensors[f"post{i}.segmentation_scores"] = item.segmentation_scores.numpy()
    metadata = {
        "cases": json.dumps(cases()),
        "sizes": json.dumps(sizes),
        "versions": json.dumps({m.__name__: m.__version__ for m in (np, PIL, torch, transformers)}),
        "seed": str(SEED),
    }
    save_file(tensors, FILE, metadata)
    print(f"{FILE.name}: {len(tensors)} arrays, {FILE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
