"""Checkpoint files of every format, from bytes to named arrays; `open_file` tells the formats apart."""

from __future__ import annotations

from .lazy_tensors import TensorInfo, Tensors
from .open_file import Loaded, load_file, read_tensors
from .safetensors_file import write_safetensors

__all__ = ["Loaded", "TensorInfo", "Tensors", "load_file", "read_tensors", "write_safetensors"]
