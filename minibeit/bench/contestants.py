"""The contestants behind one interface: each turns a checkpoint folder into a function from pixels to an output array.

All get the same weights, in float32 (see `gpu` and `low_precision` for other dtypes), and the same number of threads,
and are used as usual: transformers' classes under `inference_mode`, ONNX Runtime and OpenVINO with a model exported
from them once, at a fixed shape.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..task_table import CLASSES
from . import gpu, low_precision, training
from .workloads import TASKS, Workload, model_class, pixels

Forward = Callable[[np.ndarray], np.ndarray]
BACKENDS = ("numba", "numpy", "cupy")
PEERS = {  # name -> packages that must be importable; the version of the first is shown
    "torch": ("torch", "transformers"),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript", "torch", "transformers"),
    "openvino": ("openvino", "torch", "transformers"),
}
FORWARD_PEERS = tuple(PEERS)
PEERS["inductor"] = PEERS["torch"]  # in training only
EXPORTED = {"onnxruntime": "model.onnx", "openvino": "model.xml", **training.MARKS}


def missing(name: str, dtype: str = "float32") -> list[str]:
    """The packages that a peer needs and that are not installed."""
    needed = (*PEERS.get(name, ()), *(low_precision.PACKAGES.get(name, ()) if dtype == "int8" else ()))
    return [package for package in needed if importlib.util.find_spec(package) is None]


def version(name: str) -> str:
    """Versions of the computing packages, for the report."""
    packages = {
        name: ("minibeit", name.partition("-")[0]) for name in (*BACKENDS, *training.BACKENDS, *low_precision.LABELS)
    }
    packages |= {name: ("torch", "transformers") for name in ("torch", *gpu.PEERS["torch"], *training.PEERS)}
    return ", ".join(f"{package} {_version(package)}" for package in packages.get(name, (name,)))


def _version(package: str) -> str:
    if package == "minibeit":
        from .. import __version__

        return __version__
    try:
        if package == "cupy":  # the distribution is named after its CUDA: cupy-cuda12x
            return str(import_module(package).__version__)
        return metadata.version(package)
    except (metadata.PackageNotFoundError, ImportError, AttributeError):
        return "?"


def label(name: str) -> str:
    """The name in tables."""
    if name in gpu.CONTESTANTS:
        return gpu.CONTESTANTS[name]
    return _LABELS.get(name, name)


_LABELS = (
    training.BACKENDS | training.PEERS | low_precision.LABELS | {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
)


def export(name: str, workload: Workload, folder: Path, exports: Path, dtype: str = "float32") -> None:
    """Writes the exported model that a peer runs, if it needs one, into `exports`; for int8 a quantised one."""
    if name not in EXPORTED:
        return
    if workload.training:  # compiles, which takes minutes and may fail
        training.load(name, workload, folder, 1)(pixels(workload))
        exports.mkdir(parents=True, exist_ok=True)
        (exports / EXPORTED[name]).touch()
        return
    import torch

    exports.mkdir(parents=True, exist_ok=True)
    module = _first_output(transformers_model(workload, folder))
    example = torch.from_numpy(pixels(workload))
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        if name == "onnxruntime":
            program = torch.onnx.export(module, (example,), dynamo=True, verbose=False)
            program.save(str(exports / EXPORTED[name]), external_data=True)
            if dtype == "int8":
                low_precision.quantise_onnx(exports / EXPORTED[name])
        else:
            openvino = import_module("openvino")
            traced = torch.jit.trace(module, example, check_trace=False, strict=False)  # the check costs minutes
            model = openvino.convert_model(traced, example_input=example, input=[list(example.shape)])
            openvino.save_model(model, str(exports / EXPORTED[name]), compress_to_fp16=False)
            if dtype == "int8":
                low_precision.quantise_openvino(exports / EXPORTED[name], workload)


def load(
    name: str,
    workload: Workload,
    folder: Path,
    exports: Path,
    threads: int,
    dtype: str = "float32",
    device: int | None = None,
) -> Forward:
    """The contestant, ready to be called.

    The threads of minibeit and NumPy are set by the environment of the process (see `measure`), the peers' here.
    """
    if workload.training:
        return training.load(name, workload, folder, threads, dtype, device)
    if name == low_precision.FLOAT32:
        name, dtype = "numba", "float32"
    if name in BACKENDS:
        model = model_class(workload.task).from_pretrained(folder, backend=name, dtype=dtype, device=device)
        return gpu.minibeit_forward(model, _output) if name in gpu.CONTESTANTS else lambda x: _output(model(x))
    if name in gpu.CONTESTANTS:
        torch = import_module("torch")
        return gpu.torch_forward(torch, transformers_model(workload, folder), _output, name, dtype, device)
    return {"torch": _load_torch, "onnxruntime": _load_onnx, "openvino": _load_openvino}[name](
        workload, folder, exports, threads, dtype
    )


def _output(result: Any) -> Any:
    """The logits; for a backbone the last map."""
    logits = getattr(result, "logits", None)
    return result.feature_maps[-1] if logits is None else logits


def transformers_model(workload: Workload, folder: Path, **settings: Any) -> Any:
    """transformers' model of the checkpoint; `settings` change its config."""
    transformers = import_module("transformers")
    transformers.logging.set_verbosity_error()
    return getattr(transformers, CLASSES[TASKS[workload.task][0]]).from_pretrained(str(folder), **settings).eval()


def _first_output(model: Any) -> Any:
    """The model as a module from one tensor to one tensor, which exporters need."""
    import torch

    class FirstOutput(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Any) -> Any:
            return _output(self.model(pixel_values=pixel_values))

    return FirstOutput().eval()


def _load_torch(workload: Workload, folder: Path, exports: Path, threads: int, dtype: str) -> Forward:
    import torch

    torch.set_num_threads(threads)
    model = transformers_model(workload, folder)
    if dtype == "bfloat16":
        return low_precision.torch_forward(torch, model, _output)

    def forward(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return _output(model(pixel_values=torch.from_numpy(x))).numpy()

    return forward


def _load_onnx(workload: Workload, folder: Path, exports: Path, threads: int, dtype: str) -> Forward:
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    file = str(exports / EXPORTED["onnxruntime"])
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def _load_openvino(workload: Workload, folder: Path, exports: Path, threads: int, dtype: str) -> Forward:
    openvino = import_module("openvino")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        # The default is bfloat16 on CPUs that have it, also for what int8 leaves.
        "INFERENCE_PRECISION_HINT": "f32" if dtype == "float32" else "bf16",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    compiled = openvino.Core().compile_model(str(exports / EXPORTED["openvino"]), "CPU", settings)
    request = compiled.create_infer_request()

    def forward(x: np.ndarray) -> np.ndarray:
        request.infer([x], share_inputs=True)
        return request.get_output_tensor(0).data.copy()

    return forward
