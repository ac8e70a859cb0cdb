"""Writes weights/manifest.json: every published BEiT, DiT and Data2Vec-Vision checkpoint, as far as it is known.

    python weights/make_manifest.py

Sources: the conversion script and the tests of transformers, the README of microsoft/unilm (beit and dit), timm's
models/beit.py.  None of the numbers under `expected` was measured by minibeit: it is what others have published.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minibeit import BeitConfig
from minibeit.params import count_parameters

HOME = Path(__file__).resolve().parent
BASE: dict[str, Any] = {}
LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
PER_BLOCK = dict(use_relative_position_bias=True)
SHARED = dict(use_shared_relative_position_bias=True)
ABSOLUTE = dict(use_absolute_position_embeddings=True)
OUTPUTS = {"imagenet-1k": 1000, "imagenet-22k": 21841, "ade20k": 150, "rvl-cdip": 16}
APACHE, MIT = "Apache-2.0", "MIT"

# Counts stated elsewhere: in transformers' or the authors' own logs.  Others are computed by minibeit.
PUBLISHED_COUNTS = {
    "microsoft/beit-base-patch16-224-pt22k": 91_965_776,
    "microsoft/beit-large-patch16-224-pt22k": 311_534_016,
    "microsoft/beit-base-patch16-224-pt22k-ft22k": 102_557_713,
    "microsoft/beit-large-patch16-224-pt22k-ft22k": 325_792_593,
    "microsoft/beit-base-patch16-224": 86_530_984,
    "microsoft/beit-base-patch16-384": 86_744_104,
    "microsoft/beit-large-patch16-224": 304_430_568,
    "microsoft/beit-large-patch16-384": 304_998_888,
    "microsoft/beit-large-patch16-512": 305_674_728,
    "microsoft/beit-base-finetuned-ade-640-640": 163_407_980,
    "microsoft/beit-large-finetuned-ade-640-640": 441_271_084,
    "microsoft/dit-base": 92_108_288,
    "microsoft/dit-base-finetuned-rvlcdip": 85_820_176,
}

COCO = "COCO val2017 image 000000039769"
HF_TEST, CONVERTER = "transformers tests/models/beit", "transformers convert_beit_unilm_to_pytorch.py"
NOTEBOOK, BUMBLEBEE = (
    "N. Rogge's Transformers-Tutorials notebook",
    "tests proposed for elixir-nx/bumblebee (not merged)",
)


def expect(image: str, values: Any, source: str, tolerance: float | None, **more: Any) -> dict[str, Any]:
    """`values` stand at the beginning of every axis of `output` (default logits) of the first image."""
    return {"image": image, "values": values, "tolerance": tolerance, "source": source, **more}


def coco(values: Any, argmax: int, source: str = CONVERTER, tolerance: float = 1e-3) -> dict[str, Any]:
    return expect(COCO, values, source, tolerance, argmax=argmax)


def grey(values: Any, **more: Any) -> dict[str, Any]:
    return expect("every pixel value 0.5", values, BUMBLEBEE, None, **more)


MASKED = dict(bool_masked_pos="all")
EXPECTED: dict[str, list[dict[str, Any]]] = {
    "microsoft/beit-base-patch16-224-pt22k": [
        expect(
            COCO,
            [[-3.2437, 0.5072, -13.9174], [-3.2456, 0.4948, -13.9401], [-3.2033, 0.5121, -13.8550]],
            HF_TEST,
            1e-2,
            shape=[1, 196, 8192],
            processor="microsoft/beit-base-patch16-224",
            **MASKED,
        ),
        expect(
            COCO,
            [[-3.2422, 0.5089, -13.9103], [-3.2435, 0.4969, -13.9315], [-3.2006, 0.5147, -13.8450]],
            NOTEBOOK,
            None,
            processor="bilinear resize by torchvision, mean and std 0.5",
            **MASKED,
        ),
        grey([[0.4336, 1.2613, -6.8080]], bool_masked_pos="none"),
    ],
    "microsoft/beit-base-patch16-224": [
        coco([-1.2385, -1.0987, -1.0108], 281, HF_TEST, 1e-4),
        grey([-0.7950, -0.3834, -0.1417]),
        grey(105030.4297, output="sum of last_hidden_state"),
        grey(24.0872, output="sum of pooler_output"),
    ],
    "microsoft/beit-base-patch16-384": [coco([-1.5303, -0.9484, -0.3147], 761)],
    "microsoft/beit-large-patch16-224": [coco([-0.4804, 0.6257, -0.1837], 761)],
    "microsoft/beit-large-patch16-384": [coco([-0.5122, 0.5117, -0.2113], 761)],
    "microsoft/beit-large-patch16-512": [coco([-0.3062, 0.7261, 0.4852], 761)],
    "microsoft/beit-base-patch16-224-pt22k-ft22k": [coco([2.2288, 2.4671, 0.7395], 2397)],
    "microsoft/beit-large-patch16-224-pt22k-ft22k": [
        expect(
            COCO,
            [1.6881, -0.2787, 0.5901],
            HF_TEST,
            1e-4,
            argmax=2396,
            shape=[1, 21841],
            processor="microsoft/beit-base-patch16-224",
        )
    ],
    "microsoft/beit-base-finetuned-ade-640-640": [
        expect(
            "first image of hf-internal-testing/fixtures_ade20k",
            [
                [[-4.8960, -2.3688, -3.0355], [-2.8478, -0.9836, -1.7418], [-2.9449, -1.3332, -2.1456]],
                [[-5.8081, -3.4124, -4.1006], [-3.8561, -2.2081, -3.0323], [-3.8365, -2.4601, -3.3669]],
                [[-0.0309, 3.9868, 4.0540], [2.9640, 4.6877, 4.9976], [3.2081, 4.7690, 4.9942]],
            ],
            HF_TEST,
            1e-4,
            shape=[1, 150, 160, 160],
            processor="size 640, bicubic, no crop; Pillow 9 or later",
        ),
        grey([[[-2.3867, -0.4092, -0.4876, -0.5591, -0.4831], [-0.7347, 0.5419, 0.5512, 0.5975, 0.5525]]]),
    ],
    "microsoft/beit-large-finetuned-ade-640-640": [
        expect(
            "first image of hf-internal-testing/fixtures_ade20k",
            [
                [[-4.3305, -2.3049, -3.0161], [-2.9591, -1.5305, -2.2251], [-3.4198, -1.8004, -2.9062]],
                [[-5.8922, -3.7435, -4.3978], [-4.2063, -2.7872, -3.4755], [-4.2791, -3.1874, -4.1681]],
                [[0.9895, 4.3467, 4.7663], [4.2476, 5.6830, 6.1518], [4.5550, 6.2495, 6.5154]],
            ],
            CONVERTER,
            None,
            processor="size 640, bicubic, no crop; Pillow before 9",
        )
    ],
    "microsoft/dit-base-finetuned-rvlcdip": [
        expect("first image of nielsr/rvlcdip-demo, RGB", [-0.4158, -0.4092, -0.4347], HF_TEST, 1e-4, shape=[1, 16])
    ],
    "facebook/data2vec-vision-base-ft1k": [
        expect(
            COCO, [0.3277, -0.1395, 0.0911], "transformers tests/models/data2vec", 1e-4, top=["remote control", "tabby"]
        )
    ],
    "beit_base_patch16_224_pt22k_ft1k": [coco([0.1241, 0.0798, -0.6569], 285)],
    "beit_large_patch16_224_pt22k_ft1k": [coco([0.4610, -0.0928, 0.2086], 761)],
}


def preprocessing(size: int, resample: int, crop: int | None = None) -> dict[str, Any]:
    """`resample` is Pillow's number: 2 bilinear, 3 bicubic.  `crop`: shorter side to `size`, then its centre."""
    half = [0.5, 0.5, 0.5]
    resized = {"shortest_edge": size} if crop else {"height": size, "width": size}
    settings = {"do_resize": True, "size": resized, "resample": resample, "do_center_crop": crop is not None}
    if crop:
        settings["crop_size"] = {"height": crop, "width": crop}
    return {**settings, "do_normalize": True, "image_mean": half, "image_std": half}


def entry(
    id: str,
    origin: str,
    task: str,
    size: str,
    image: int,
    config: dict[str, Any],
    labels: str | None,
    processor: dict[str, Any],
    license: str,
    file: str | None = None,
) -> dict[str, Any]:
    settings = {**(LARGE if size == "large" else BASE), "image_size": image, **config}
    if labels:
        settings["num_labels"] = OUTPUTS[labels]
    if origin in ("timm", "unilm"):
        settings["layer_norm_eps"] = 1e-6
    if task == "semantic_segmentation":
        settings["out_indices"] = [7, 11, 15, 23] if size == "large" else [3, 5, 7, 11]
    if task == "masked_image_modeling":
        settings["use_mask_token"] = True
    computed = count_parameters(BeitConfig.from_dict(settings), task)
    return {
        "origin": origin,
        "task": task,
        "size": size,
        "image_size": image,
        "config": settings,
        "parameters": PUBLISHED_COUNTS.get(id, computed),
        "parameters_published": id in PUBLISHED_COUNTS,
        "labels": labels,
        "preprocessing": processor,
        "license": license,
        **({"file": file} if file else {}),
        "expected": EXPECTED.get(id, []),
    }


def entries() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}

    def add(id: str, *args: Any, **more: Any) -> None:
        found[id] = entry(id, *args, **more)

    mim, cls, seg = "masked_image_modeling", "image_classification", "semantic_segmentation"
    release = "https://github.com/addf400/files/releases/download/v1.0/{}.pth"
    for size in ("base", "large"):
        name, stem = f"microsoft/beit-{size}", f"beit_{size}_patch16"
        squash = preprocessing(224, 2)
        add(f"{name}-patch16-224-pt22k", "hub", mim, size, 224, SHARED, None, squash, APACHE)
        add(f"{name}-patch16-224-pt22k-ft22k", "hub", cls, size, 224, PER_BLOCK, "imagenet-22k", squash, APACHE)
        for image in (224, 384, 512) if size == "large" else (224, 384):
            add(
                f"{name}-patch16-{image}", "hub", cls, size, image, PER_BLOCK, "imagenet-1k", preprocessing(image, 2),
                APACHE,
            )  # fmt: skip
        ade = preprocessing(640, 3)
        add(f"{name}-finetuned-ade-640-640", "hub", seg, size, 640, PER_BLOCK, "ade20k", ade, APACHE)
        license = "not stated on the Hub; microsoft/unilm is MIT"
        add(f"microsoft/dit-{size}", "hub", mim, size, 224, ABSOLUTE, None, squash, license)
        add(f"microsoft/dit-{size}-finetuned-rvlcdip", "hub", cls, size, 224, ABSOLUTE, "rvl-cdip", squash, license)
        bare = {**SHARED, "use_mean_pooling": False}
        cubic = preprocessing(224, 3)
        add(f"facebook/data2vec-vision-{size}", "hub", "model", size, 224, bare, None, cubic, APACHE)
        found[f"facebook/data2vec-vision-{size}"]["config"]["model_type"] = "data2vec-vision"
        add(f"facebook/data2vec-vision-{size}-ft1k", "hub", cls, size, 224, PER_BLOCK, "imagenet-1k", cubic, APACHE)
        found[f"facebook/data2vec-vision-{size}-ft1k"]["config"]["model_type"] = "data2vec-vision"

        crops = {224: preprocessing(248, 3, 224), 384: preprocessing(384, 3, 384), 512: preprocessing(512, 3, 512)}
        for image in (224, 384, 512) if size == "large" else (224, 384):
            timm = f"timm/{stem}_{image}.in22k_ft_in22k_in1k"
            add(timm, "timm", cls, size, image, PER_BLOCK, "imagenet-1k", crops[image], APACHE)
        timm = f"timm/{stem}_224.in22k_ft_in22k"
        add(timm, "timm", cls, size, 224, PER_BLOCK, "imagenet-22k", crops[224], APACHE)

        tested = {224: preprocessing(256, 3, 224), 384: crops[384], 512: crops[512]}
        unilm: list[tuple[str, str, int, dict[str, bool], str | None]] = [
            ("224_pt22k", mim, 224, SHARED, None),
            ("224_pt22k_ft22k", cls, 224, PER_BLOCK, "imagenet-22k"),
            ("224_pt22k_ft1k", cls, 224, PER_BLOCK, "imagenet-1k"),
            ("224_pt22k_ft22kto1k", cls, 224, PER_BLOCK, "imagenet-1k"),
            ("384_pt22k_ft22kto1k", cls, 384, PER_BLOCK, "imagenet-1k"),
        ]
        if size == "large":
            unilm.append(("512_pt22k_ft22kto1k", cls, 512, PER_BLOCK, "imagenet-1k"))
        for rest, task, image, config, labels in unilm:
            id = f"{stem}_{rest}"
            add(id, "unilm", task, size, image, config, labels, tested[image], MIT, file=release.format(id))
        id = f"{stem}_640_pt22k_ft22ktoade20k"
        slid = {**PER_BLOCK, "feature_convention": "unilm"}
        add(id, "unilm", seg, size, 640, slid, "ade20k", ade, MIT, file=release.format(id))
        dit = "https://huggingface.co/HYPJUDY/dit/resolve/main/"
        stems = {"base": ("dit-base-224-p16-500k-62d53a", "b"), "large": ("dit-large-224-p16-500k-d7a2fb", "l")}
        pretrained, letter = stems[size]
        add(
            pretrained, "unilm", mim, size, 224, ABSOLUTE, None, tested[224], MIT, file=f"{dit}dit-pts/{pretrained}.pth"
        )
        id = f"rvlcdip_dit-{letter}"
        add(id, "unilm", cls, size, 224, ABSOLUTE, "rvl-cdip", tested[224], MIT, file=f"{dit}dit-fts/{id}.pth")
    id = "beit_base_patch16_224_pt1k_800ep"
    plain = {**ABSOLUTE, "layer_scale_init_value": 0.0}
    add(id, "unilm", mim, "base", 224, plain, None, preprocessing(256, 3, 224), MIT, file=release.format(id))
    return found


def text() -> str:
    """The manifest as JSON: `expected` values stand at the beginning of every axis of the first image's logits."""
    note = "made by weights/make_manifest.py; expected: outputs published by others, at the beginning of every axis"
    return json.dumps({"note": note, "checkpoints": entries()}, indent=1) + "\n"


if __name__ == "__main__":
    (HOME / "manifest.json").write_text(text(), encoding="utf-8")
