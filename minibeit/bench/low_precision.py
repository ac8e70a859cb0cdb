"""int8 and bfloat16 on the CPU: minibeit beside its own float32 and beside engines in the same precision.

Each engine quantises as its own documentation says: ONNX Runtime dynamically, per channel; OpenVINO with NNCF for
transformers, after seeing images.  bfloat16 is PyTorch's own dtype, and OpenVINO's hint of precision.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .workloads import Workload, pixels

FLOAT32 = "numba-float32"  # minibeit in float32: the first contestant, whose output the others are near
LABELS = {FLOAT32: "minibeit numba, float32"}
PEERS = {"int8": ("onnxruntime", "openvino"), "bfloat16": ("torch", "openvino")}
PACKAGES = {"openvino": ("nncf",)}  # for int8, beside those of float32
# Relative RMS by which outputs may differ from float32's.  The weights are random, so the logits hardly stand out of
# their own noise; measured: int8 0.6 % (dynamic) to 4 % (calibrated on noise), bfloat16 0.1 to 1 %.
AGREE = {"int8": 0.1, "bfloat16": 0.05}
CALIBRATION = 8  # batches for NNCF


def quantise_onnx(file: Path) -> None:
    """Replaces an exported model by its dynamically quantised self."""
    quantization = import_module("onnxruntime.quantization")
    wide = file.with_name("float32.onnx")
    file.rename(wide)
    options = dict(per_channel=True, weight_type=quantization.QuantType.QInt8)
    quantization.quantize_dynamic(str(wide), str(file), **options)
    wide.unlink()
    file.with_name(file.name + ".data").unlink(missing_ok=True)  # the weights in float32


def quantise_openvino(file: Path, workload: Workload) -> None:
    """Replaces an exported model by what NNCF makes of it."""
    nncf, openvino = import_module("nncf"), import_module("openvino")
    model = openvino.Core().read_model(str(file))
    data = nncf.Dataset([pixels(workload, seed=2 + i) for i in range(CALIBRATION)])
    done = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION)
    del model  # which maps the file that is written
    target = file.with_name("int8.xml")
    openvino.save_model(done, str(target), compress_to_fp16=False)
    for suffix in (".bin", ".xml"):  # the .xml last: it says that the export is whole
        target.with_suffix(suffix).replace(file.with_suffix(suffix))


def torch_forward(torch: Any, model: Any, output: Any) -> Any:
    """A PyTorch model in bfloat16, from float32 pixels to a float32 output."""
    model = model.to(torch.bfloat16)

    def forward(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return output(model(pixel_values=torch.from_numpy(x).to(torch.bfloat16))).float().numpy()

    return forward
