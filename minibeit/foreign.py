"""Arrays of other libraries as NumPy arrays, recognised by their methods without an import; and the way back."""

from __future__ import annotations

from typing import Any

import numpy as np


def as_numpy(x: Any) -> np.ndarray:
    """`x` as a NumPy array, a view where it can be one: NumPy, torch, jax, CuPy, TensorFlow, DLPack, lists of these.

    Tensors are detached and moved to main memory, bfloat16 becomes float32.  Raises ValueError or TypeError for what is
    no array.
    """
    if isinstance(x, np.ndarray):
        return _plain(x)
    if isinstance(x, (list, tuple)):
        return _plain(np.asarray([_part(part) for part in x]))
    if callable(getattr(x, "detach", None)):  # torch: attached to a graph, on a device, or of a dtype NumPy lacks
        x = x.detach().cpu()
        x = x.resolve_conj().resolve_neg() if hasattr(x, "resolve_conj") else x
        if str(x.dtype) == "torch.bfloat16":
            x = x.float()
    elif not hasattr(x, "__array__") and hasattr(x, "__dlpack__"):
        return _plain(np.from_dlpack(x))
    elif not hasattr(x, "__array__") and callable(getattr(x, "get", None)) and hasattr(x, "dtype"):
        x = x.get()  # CuPy
    return _plain(np.asarray(x))


def _part(x: Any) -> Any:
    """A part of a list: numbers and text as they are."""
    if isinstance(x, (list, tuple)):
        return [_part(part) for part in x]
    return as_numpy(x) if hasattr(x, "dtype") else x


def _plain(x: np.ndarray) -> np.ndarray:
    """bfloat16 of ml_dtypes, as jax has it, is no number to NumPy."""
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x


def as_real(x: Any, dtype: Any) -> np.ndarray:
    """`as_numpy(x)` in that dtype.  Raises ValueError for complex numbers, whose imaginary part would be lost."""
    array = as_numpy(x)
    if array.dtype.kind == "c":
        raise ValueError("expected real numbers, found complex ones")
    return np.asarray(array, dtype)


def dtype_name(dtype: Any) -> str:
    """The name of a dtype that is one already, or a dtype of NumPy or PyTorch: "float32" for torch.float32."""
    if isinstance(dtype, str) or type(dtype).__module__.partition(".")[0] == "torch":
        return str(dtype).removeprefix("torch.")
    try:
        return np.dtype(dtype).name
    except TypeError:
        return repr(dtype)


def is_torch(x: Any) -> bool:
    """Whether `x` is a tensor of PyTorch."""
    return type(x).__module__.partition(".")[0] == "torch" and callable(getattr(x, "detach", None))


def as_torch(x: np.ndarray) -> Any:
    """`x` as a tensor of PyTorch that shares its memory.  Raises ImportError where PyTorch is missing."""
    try:
        import torch
    except ImportError:
        raise ImportError("return_tensors='pt' needs PyTorch: pip install torch; 'np' needs nothing") from None
    return torch.from_numpy(np.asarray(x))
