"""Floating-point operations of a forward pass, from the config alone: a multiplication and an addition count as two.

Only products are counted (linear layers, attention, convolutions), in their direct form.  What a fast algorithm saves
(Winograd, convolving before enlarging) shows as a higher rate, so the segmentation head's rate may exceed the roof.

Letters: B batch, N tokens, P patches, D width, F mlp width, K classes, V visual tokens, A auxiliary channels.
"""

from __future__ import annotations

from ..config import BeitConfig
from ..model.segmentation import feature_states


def count(config: BeitConfig, task: str, batch_size: int = 1, grid: tuple[int, int] | None = None) -> dict[str, int]:
    """{part: operations} of `task` for B images of `grid` patches, the native one by default.

    Counts only what the result depends on: no blocks after the last one that the head reads, and no auxiliary head,
    which is for training (see `training_step`).
    """
    gh, gw = config.grid if grid is None else grid
    P, D, F = gh * gw, config.hidden_size, config.intermediate_size
    N, (ph, pw) = P + 1, config.patch_shape
    blocks = _depth(config, task)
    parts = {
        "patches": P * config.num_channels * ph * pw * D,
        "qkv and output": blocks * N * 4 * D * D,
        "attention": blocks * 2 * N * N * D,
        "mlp": blocks * N * 2 * D * F,
    }
    if task == "image_classification":
        parts["classifier"] = D * config.num_labels
    elif task == "masked_image_modeling":
        parts["lm_head"] = P * D * config.vocab_size
    elif task == "semantic_segmentation" or (task == "backbone" and config.add_fpn):
        parts["fpn"] = 4 * P * D * D + 16 * P * D * D + 4 * P * D * D  # deconv1 at 2x, deconv2 at 4x, deconv3 at 2x
    if task == "semantic_segmentation":
        parts |= _decode_head(config, gh, gw)
    return {name: 2 * batch_size * products for name, products in parts.items()}


def total(config: BeitConfig, task: str, batch_size: int = 1, grid: tuple[int, int] | None = None) -> int:
    """The sum over all parts of `count`."""
    return sum(count(config, task, batch_size, grid).values())


def training_step(config: BeitConfig, task: str, batch_size: int = 1) -> int:
    """Operations of forward and backward, which has two products for each of the forward, without the optimizer.

    The pixels need no gradient: the patches have one product less.  What is computed twice to save memory counts once.
    """
    parts = count(config, task, batch_size)
    if task == "semantic_segmentation" and config.use_auxiliary_head:
        parts["auxiliary head"] = 2 * batch_size * _auxiliary_head(config)
    return 3 * sum(parts.values()) - parts["patches"]


def _depth(config: BeitConfig, task: str) -> int:
    """How many blocks the result depends on."""
    L = config.num_hidden_layers
    if task == "backbone":
        return max(i % (L + 1) for i in config.out_indices or ())
    if task == "semantic_segmentation":
        return max(feature_states(config))
    return L


def _decode_head(config: BeitConfig, gh: int, gw: int) -> dict[str, int]:
    """Products of the UPerNet head; its maps have 16 P, 4 P, P and about P / 4 pixels."""
    D, K, scales = config.hidden_size, config.num_labels, config.pool_scales
    fine = (16 + 4 + 1) * gh * gw
    coarse = (gh // 2) * (gw // 2)
    return {
        "laterals": fine * D * D,
        "pyramid pooling": sum(s * s for s in scales) * D * D + coarse * 9 * (1 + len(scales)) * D * D,
        "fpn_convs": fine * 9 * D * D,
        "fpn_bottleneck": 16 * gh * gw * 9 * 4 * D * D,
        "classifier": 16 * gh * gw * D * K,
    }


def _auxiliary_head(config: BeitConfig) -> int:
    """Products of the FCN head, on maps of P pixels."""
    channels, convs = config.auxiliary_channels, config.auxiliary_num_convs
    inputs = [config.hidden_size] + [channels] * (convs - 1)
    products = sum(9 * before * channels for before in inputs[:convs]) + channels * config.num_labels
    if config.auxiliary_concat_input:
        products += 9 * (config.hidden_size + channels) * channels
    return config.grid[0] * config.grid[1] * products
