"""Published outputs: what authors and converters documented about their checkpoints, checked on the checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import catalogue
from ..hub import resolve
from ..image_processor import BeitImageProcessor
from ..tasks import task_class
from ..trace import Trace
from .streams import host

PLAIN = "every pixel value 0.5"  # the one published input that needs no image
LOOSE = 1e-3  # relative to the largest published number, where the source names no tolerance


@dataclass
class Outcome:
    """One published output and what came out here.  `status`: "ok", "differs" or "skipped"."""

    id: str
    image: str
    source: str
    status: str
    text: str


def check_published(
    id: str,
    image: Any | None = None,
    backend: str | None = None,
    entry: Mapping[str, Any] | None = None,
    device: int | None = None,
) -> list[Outcome]:
    """Downloads a checkpoint and compares every output that the manifest lists for it.

    `image` is what the outputs were made from, where they need an image; `entry` replaces the manifest's.
    Raises ValueError for an id that the manifest does not have.
    """
    if entry is None:
        known = catalogue.manifest()
        if id not in known:
            raise ValueError(f"{id}: is not in the manifest; `minibeit models` lists what is")
        entry = known[id]
    expected = entry.get("expected") or []
    if not expected:
        return [Outcome(id, "", "", "skipped", "nothing is published about its outputs")]
    wanted = [case for case in expected if case["image"] == PLAIN or image is not None]
    skipped = [
        Outcome(id, case["image"], case["source"], "skipped", f"needs the image: give --image FILE ({case['image']})")
        for case in expected
        if case not in wanted
    ]
    if not wanted:
        return skipped
    folder = resolve(id)
    model = task_class(entry["task"]).from_pretrained(folder, backend=backend, device=device)
    processor = BeitImageProcessor(**entry["preprocessing"]) if entry.get("preprocessing") else None
    return [_outcome(id, case, model, processor, image) for case in wanted] + skipped


def _outcome(id: str, case: Mapping[str, Any], model: Any, processor: Any, image: Any) -> Outcome:
    pixels = _pixels(case, model, processor, image)
    options = {}
    if case.get("bool_masked_pos") == "all":
        (height, width), (ph, pw) = pixels.shape[2:], model.config.patch_shape
        options["bool_masked_pos"] = np.ones((1, (height // ph) * (width // pw)), bool)
    trace = Trace(("pooler", "norm", "encoder.*.output"))
    logits = model(pixels, **options, trace=trace).logits
    found = _found(case, logits, trace)
    values = np.asarray(case["values"], np.float64)
    gap = float(np.abs(found - values).max())
    tolerance = case.get("tolerance") or LOOSE * max(1.0, float(np.abs(values).max()))
    wrong = [] if gap <= tolerance else [f"differs by {gap:.2g}, tolerance {tolerance:.2g}"]
    if "shape" in case and tuple(case["shape"]) != logits.shape:
        wrong.append(f"shape {logits.shape}, published {tuple(case['shape'])}")
    if "argmax" in case and int(logits.argmax(-1).reshape(-1)[0]) != case["argmax"]:
        wrong.append(f"class {int(logits.argmax(-1).reshape(-1)[0])}, published {case['argmax']}")
    text = "; ".join(wrong) or f"within {gap:.2g}, tolerance {tolerance:.2g}"
    return Outcome(id, case["image"], case["source"], "differs" if wrong else "ok", text)


def _pixels(case: Mapping[str, Any], model: Any, processor: Any, image: Any) -> np.ndarray:
    c = model.config
    if case["image"] == PLAIN:
        return np.full((1, c.num_channels, *c.image_shape), 0.5, np.float32)
    return processor(image, return_tensors="np")["pixel_values"]


def _found(case: Mapping[str, Any], logits: np.ndarray, trace: Trace) -> np.ndarray:
    """The part of the output that was published: its first entries along every axis."""
    output = case.get("output", "logits")
    if output == "sum of pooler_output":
        return np.asarray(host(trace["pooler"]).sum(dtype=np.float64))
    if output == "sum of last_hidden_state":
        last = "norm" if "norm" in trace else [name for name in trace if name.endswith(".output")][-1]
        return np.asarray(host(trace[last]).sum(dtype=np.float64))
    shape = np.asarray(case["values"]).shape
    return logits[0][tuple(slice(0, n) for n in shape)].astype(np.float64)
