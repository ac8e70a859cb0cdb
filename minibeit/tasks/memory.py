"""Whether a call fits into memory, asked before it is too late: the system ends a process that takes too much."""

from __future__ import annotations

from ..config import BeitConfig
from ..machine import available_memory
from ..params import count_parameters

WORTH_A_LOOK = 1 << 28  # bytes: less is not worth asking the system for
KEPT = 1 << 28  # bytes that an earlier call may have left with this process, for the next one
WIDE = 5  # arrays (N, D) at once: the residual stream beside queries, keys, values and context, or beside the MLP's
MAPS = 3  # of UPerNet's maps (D, 4 gh, 4 gw) at once
SEGMENTATION = "semantic_segmentation"


def least_bytes(config: BeitConfig, task: str, shape: tuple[int, ...], backend: str, itemsize: int) -> int:
    """What pixel values (B, C, height, width) take at least on their way through a model, beside its weights.

    Less than a call takes, so that none is refused that would fit: only arrays that must be there at the same time.
    """
    B, C, height, width = shape
    gh, gw = height // config.patch_shape[0], width // config.patch_shape[1]
    N, D, H = gh * gw + 1, config.hidden_size, config.num_attention_heads
    one = C * height * width + N * (D + max((WIDE - 1) * D, config.intermediate_size))
    if backend == "numpy":
        one += H * N * N  # the scores; compiled kernels keep a few rows of them
    if task == SEGMENTATION:
        one = max(one, D * MAPS * 16 * gh * gw)
    return B * one * itemsize


def check_call(config: BeitConfig, task: str, shape: tuple[int, ...], backend: str, itemsize: int) -> None:
    """Raises ValueError for pixel values of a shape that cannot fit, with the batch that might."""
    need = least_bytes(config, task, shape, backend, itemsize)
    there = _there(backend, need)
    if there is None or need <= there + KEPT:
        return
    B, _, height, width = shape
    fits = int((there + KEPT) * B // need)
    advice = f"at most {fits} at a time may fit" if fits else "take smaller images, or a machine with more memory"
    raise ValueError(
        f"pixel_values: {B} images of {height}x{width} take at least {need / 1e9:.1f} GB of memory beside the weights, "
        f"found {there / 1e9:.1f} GB; {advice}"
    )


def check_weights(config: BeitConfig, task: str, backend: str, itemsize: int) -> None:
    """Raises ValueError for weights that cannot be packed: there they take memory of their own, beside their file."""
    need = count_parameters(config, task) * itemsize
    there = _there(backend, need) if backend == "numba" else None
    if there is not None and need > there:
        raise ValueError(
            f"weights: as kernels read them they take {need / 1e9:.1f} GB of memory, found {there / 1e9:.1f} GB; "
            "take a smaller model, or the backend numpy, which maps the weights of a file"
        )


def _there(backend: str, need: int) -> int | None:
    """The memory that can be had; None where that does not matter, as on a GPU, or is not known."""
    return available_memory(swap=True) if need > WORTH_A_LOOK and backend != "cupy" else None
