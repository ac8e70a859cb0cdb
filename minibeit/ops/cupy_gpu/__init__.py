"""The backend for NVIDIA GPUs: the ops of `reference` with cuBLAS and kernels that CuPy compiles on first use.

device.py   finding CuPy, driver and device; memory    *.cu, kernels.py                 the kernels and their launches
gemm.py     cuBLAS                                     prepare.py                       weights on the device
arrays.py, rows.py, attention.py, maps.py, winograd.py, losses.py  the ops              bind.py      `on_device`
halves.py, learned.py, learned_attention.py, learned_maps.py, learned_losses.py  forward and backward, for a tape
optimizer.py, transfers.py  of training

Pixels go up once and outputs come down once; in between nothing waits for the device.  Calls in all threads are queued
on the device's null stream, after what the caller's stream has to do (`device.session`); ops that are called by
themselves run on the caller's stream, which should be one for all of them.  A model is float32 (true float32;
MINIBEIT_TF32=1 lets products round to TF32), float64, or float16 or bfloat16: then matrices and what is multiplied with
them are stored so, while sums, softmax, norms, activations and the residual stream are float32.
"""

from __future__ import annotations

from .arrays import *
from .attention import *
from .bind import on_device
from .losses import *
from .maps import *
from .prepare import prepare
from .rows import *
