"""The contestants on a GPU: minibeit with CuPy, PyTorch eager and compiled, timed by events of the device.

Each takes pixels from main memory and returns its output there, so every time includes upload and download.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..ops import get_ops, tf32_allowed

CONTESTANTS = {"cupy": "minibeit cupy", "torch-cuda": "PyTorch eager", "torch-compiled": "PyTorch compiled"}
PEERS = {"torch": ("torch-cuda", "torch-compiled")}  # name in `--against` -> contestants on a GPU
# Relative RMS by which outputs may differ: the effect of rounding to the dtype, or to TF32, over a dozen blocks.
AGREE = {"float32": 1e-4, "float64": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
AGREE_TF32 = 1e-2


class GpuForward:
    """One contestant: calling it computes, `seconds` times one call, `peak_bytes` gives the memory reserved."""

    model: Any = None  # minibeit's

    def __init__(
        self, run: Callable[[np.ndarray], Any], event: Callable[[], Any], peak_bytes: Callable[[], int]
    ) -> None:
        self._run = run
        self._event = event  # creates and records an event
        self.peak_bytes = peak_bytes

    def __call__(self, x: np.ndarray) -> Any:
        return self._run(x)

    def seconds(self, x: np.ndarray) -> float:
        """Seconds on the device's clock between the start and the end of one call."""
        start = self._event()
        self._run(x)
        return self._event().since(start)


def allowed_difference(dtype: str) -> float:
    """How far outputs of a dtype may differ, as relative RMS."""
    return AGREE_TF32 if dtype == "float32" and tf32_allowed() else AGREE[dtype]


def check(dtype: str, device: int | None) -> str:
    """A description of the device.  Raises ImportError, DeviceError or ValueError if it cannot be measured."""
    get_ops("cupy", dtype=dtype, device=device)
    from ..ops.cupy_gpu.device import describe

    return describe(device or 0)


def minibeit_forward(
    model: Any, output: Callable[[Any], Any] = lambda result: result, step: Callable[[np.ndarray], Any] | None = None
) -> GpuForward:
    """A model of minibeit as a contestant, or a `step` of its training."""
    from ..ops.cupy_gpu.device import cupy, peak_memory

    index = model.device or 0

    class Event:
        def __init__(self) -> None:
            with cupy.cuda.Device(index):
                self.event = cupy.cuda.Event()
                self.event.record()

        def since(self, start: Event) -> float:
            self.event.synchronize()
            return cupy.cuda.get_elapsed_time(start.event, self.event) / 1000

    contestant = GpuForward(step or (lambda x: output(model(x))), Event, lambda: peak_memory(index))
    contestant.model = model
    return contestant


def torch_forward(
    torch: Any, model: Any, output: Callable[[Any], Any], name: str, dtype: str, device: int | None
) -> GpuForward:
    """A model of transformers as a contestant, in true float32 unless MINIBEIT_TF32=1.  Raises ValueError."""
    place, kind = torch_place(torch, device), getattr(torch, dtype)
    model = model.to(place, kind)
    if name == "torch-compiled":
        model = torch.compile(model)

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return output(model(pixel_values=torch.from_numpy(x).to(place, kind))).float().cpu().numpy()

    return torch_contestant(torch, run, place)


def torch_place(torch: Any, device: int | None) -> str:
    """PyTorch's name of the GPU, once TF32 is as minibeit has it.  Raises ValueError without a GPU."""
    if not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} finds no GPU; install the build of PyTorch for your CUDA")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32_allowed()
    return f"cuda:{device or 0}"


def torch_contestant(torch: Any, run: Callable[[np.ndarray], Any], place: str) -> GpuForward:
    """What PyTorch runs on a GPU as a contestant."""

    class Event:
        def __init__(self) -> None:
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record(torch.cuda.current_stream(place))

        def since(self, start: Event) -> float:
            self.event.synchronize()
            return start.event.elapsed_time(self.event) / 1000

    return GpuForward(run, Event, lambda: torch.cuda.max_memory_reserved(place))
