"""The backend for NVIDIA GPUs: the ops of `reference` by cuBLAS and kernels that CuPy compiles when first needed.

device.py   finding CuPy, driver and device; memory    *.cu, kernels.py                 the kernels and their launches
gemm.py     cuBLAS                                     prepare.py                       weights on the device
arrays.py, rows.py, attention.py, maps.py, winograd.py, losses.py  the ops              fallback.py  `on_device`

Pixels go up once and outputs come down once; in between nothing waits for the device.  A model is float32 (true
float32; MINIBEIT_TF32=1 lets products round to TF32), float64, or float16 or bfloat16: then matrices and what is
multiplied with them are stored so, while sums, softmax, norms, activations and the residual stream are float32.
"""

from __future__ import annotations

from .arrays import all_finite, arange, asarray, concatenate, deferred, num_threads, stage, to_host, zeros
from .attention import attention, project_qkv
from .fallback import on_device as on_device
from .glue import add, dropout, first_token, mask_tokens, mean_patches, recompute, tokens_to_map
from .losses import bce_with_logits, cross_entropy, mse_loss, soft_cross_entropy
from .maps import (
    adaptive_avg_pool,
    conv2d,
    conv_bn_relu,
    conv_bn_relu_resized,
    conv_transpose,
    conv_transpose_bn_gelu,
    max_pool2x2,
    resize_bicubic,
    resize_bilinear,
)
from .prepare import prepare
from .rows import layer_norm, linear, linear_activation, linear_residual

__all__ = [
    "adaptive_avg_pool",
    "add",
    "all_finite",
    "arange",
    "asarray",
    "attention",
    "bce_with_logits",
    "concatenate",
    "conv2d",
    "conv_bn_relu",
    "conv_bn_relu_resized",
    "conv_transpose",
    "conv_transpose_bn_gelu",
    "cross_entropy",
    "deferred",
    "dropout",
    "first_token",
    "layer_norm",
    "linear",
    "linear_activation",
    "linear_residual",
    "mask_tokens",
    "max_pool2x2",
    "mean_patches",
    "mse_loss",
    "num_threads",
    "prepare",
    "project_qkv",
    "recompute",
    "resize_bicubic",
    "resize_bilinear",
    "soft_cross_entropy",
    "stage",
    "to_host",
    "tokens_to_map",
    "zeros",
]
