"""The list of planted faults: what is broken, where it must be found, and what the diagnosis must say."""

from __future__ import annotations

import numpy as np
from verify_plant import (
    Fault,
    after,
    align_corners,
    attention_with,
    averaged,
    batch_norm_eps,
    bf16,
    biased_keys,
    config,
    f16,
    flipped,
    index_of,
    nearest,
    no_scale,
    no_softmax_shift,
    one_wrong_row,
    op,
    pooling_cls_only,
    pooling_with_cls,
    relu_dropped,
    resized_with,
    scaled_before_bias,
    swap_cls,
    swap_rows,
    tiles,
    turn,
    unbiased_variance,
    weights,
)

from minibeit.ops import reference
from minibeit.ops.activations import ACTIVATIONS

E0, E1, A0 = "encoder.0.", "encoder.1.", "encoder.0.attention."
SEG = dict(task="semantic_segmentation")
SQUARE = dict(hidden_size=12, intermediate_size=12)
MIM = dict(task="masked_image_modeling")

FAULTS = [
    # Embeddings
    Fault("BGR for RGB", "embeddings.patches", weights(beit__embeddings__patch__weight=lambda w: w[:, ::-1]), "BGR"),
    Fault(
        "patch weight laid out height, width, channel",
        "embeddings.patches",
        weights(beit__embeddings__patch__weight=lambda w: w.transpose(0, 2, 3, 1).reshape(w.shape)),
        "laid out",
    ),
    Fault(
        "patch rows and columns swapped",
        "embeddings.patches",
        weights(beit__embeddings__patch__weight=lambda w: w.swapaxes(2, 3)),
        "oiwh",
    ),
    Fault("patch bias missing", "embeddings.patches", weights(beit__embeddings__patch__bias=lambda b: 0 * b), "bias"),
    Fault("CLS token missing", "embeddings", weights(beit__embeddings__cls_token=lambda t: 0 * t), "token"),
    Fault("mask token missing", "embeddings", weights(beit__embeddings__mask_token=lambda t: 0 * t), "mask", **MIM),
    Fault(
        "positions shifted by one",
        "embeddings",
        weights(beit__embeddings__position_embeddings=lambda t: np.roll(t, 1, 1)),
        "positions",
        settings=dict(use_absolute_position_embeddings=True),
    ),
    # Norms
    Fault("epsilon 1e-6 for 1e-12", E0 + "norm1", config(layer_norm_eps=1e-6), "1e-06 instead of 1e-12"),
    Fault("epsilon 1e-5 for 1e-12", E0 + "norm1", config(layer_norm_eps=1e-5), "1e-05 instead of 1e-12"),
    Fault("unbiased variance", E0 + "norm1", op("layer_norm", unbiased_variance), "D - 1"),
    Fault("norm bias missing", E1 + "norm2", weights(beit__encoder__1__norm2__bias=lambda b: 0 * b), "bias is missing"),
    Fault("norm weight missing", E1 + "norm1", weights(beit__encoder__1__norm1__weight=lambda w: 0 * w + 1), "weight"),
    # Attention
    Fault("key bias added", A0 + "key", op("project_qkv", biased_keys), "keys have none"),
    Fault(
        "query bias missing", A0 + "query", weights(beit__encoder__0__attention__query__bias=lambda b: 0 * b), "bias"
    ),
    Fault(
        "value bias missing", A0 + "value", weights(beit__encoder__0__attention__value__bias=lambda b: 0 * b), "bias"
    ),
    Fault(
        "transposed query",
        A0 + "query",
        weights(beit__encoder__0__attention__query__weight=lambda w: w.T),
        "transposed",
    ),
    Fault("transposed key", A0 + "key", weights(beit__encoder__0__attention__key__weight=lambda w: w.T), "transposed"),
    Fault(
        "queries and keys swapped",
        A0 + "query",
        op("project_qkv", lambda *a: (lambda q, k, v: (k, q, v))(*reference.project_qkv(*a))),
        "key projection",
    ),
    Fault(
        "heads on the wrong axis",
        A0 + "query",
        op(
            "project_qkv",
            lambda x, p, H: tuple(
                reference.linear(x, layer).reshape(*x.shape[:2], -1, H).transpose(0, 3, 1, 2)
                for layer in (p.query, p.key, p.value)
            ),
        ),
        "wrong axis",
    ),
    Fault("scores not scaled", A0 + "probs", op("attention", attention_with(factor=2.0)), "not divided by sqrt(d)"),
    Fault("scores scaled twice", A0 + "probs", op("attention", attention_with(factor=0.5)), "twice"),
    Fault("position bias missing", A0 + "probs", op("attention", attention_with(no_bias=True)), "bias is missing"),
    Fault("CLS rows of the index swapped", A0 + "probs", index_of(swap_cls), "swapped"),
    Fault("position bias transposed", A0 + "probs", index_of(lambda i, R: np.ascontiguousarray(i.T)), "transposed"),
    Fault("bias index by width, height", A0 + "probs", index_of(turn), "height and width swapped"),
    Fault(
        "CLS rows of the table swapped",
        A0 + "bias_table",
        weights(beit__encoder__0__bias_table=lambda t: swap_rows(t, -3, -2)),
        "row of the table 15, 16",
    ),
    Fault(
        "one wrong row in the table",
        E1 + "attention.bias_table",
        weights(beit__encoder__1__bias_table=one_wrong_row),
        "row of the table 7",
    ),
    Fault("half-precision probabilities", A0 + "probs", op("attention", attention_with(half_probs=True)), "float16"),
    Fault("heads joined wrongly", A0 + "context", op("attention", attention_with(mixed_heads=True)), "(d, H)"),
    Fault("softmax without shift", A0 + "probs", no_softmax_shift, "NaN"),
    Fault(
        "transposed projection",
        A0 + "residual",
        weights(beit__encoder__0__attention__output__weight=lambda w: w.T),
        "transposed",
    ),
    Fault("layer scale dropped", A0 + "residual", op("linear_residual", no_scale), "layer scale is missing"),
    Fault(
        "layer scale dropped in the MLP", E0 + "output", op("linear_residual", no_scale, 1), "layer scale is missing"
    ),
    Fault(
        "bias after the layer scale",
        A0 + "residual",
        op("linear_residual", scaled_before_bias),
        "after the layer scale",
    ),
    Fault(
        "residual missing",
        E1 + "attention.residual",
        op("linear_residual", lambda x, w, s, r, keep: s * reference.linear(x, w), 2),
        "residual is missing",
    ),
    # MLP
    Fault("tanh GELU for erf", E0 + "mlp.hidden", config(hidden_act="gelu_pytorch_tanh"), "instead of gelu"),
    Fault("quick GELU", E0 + "mlp.hidden", config(hidden_act="quick_gelu"), "quick_gelu"),
    Fault("ReLU for GELU", E0 + "mlp.hidden", config(hidden_act="relu"), "relu"),
    Fault(
        "no activation",
        E1 + "mlp.hidden",
        op("linear_activation", lambda x, w, a: reference.linear(x, w), 1),
        "no activation",
    ),
    Fault("fc2 bias missing", E1 + "output", weights(beit__encoder__1__fc2__bias=lambda b: 0 * b), "bias is missing"),
    Fault("bf16 weights of one layer", E1 + "mlp.hidden", weights(beit__encoder__1__fc1__weight=bf16), "bfloat16"),
    Fault("f16 weights of one layer", E1 + "output", weights(beit__encoder__1__fc2__weight=f16), "float16"),
    Fault("results stored as bf16", E0 + "norm2", after("layer_norm", bf16, 1), "bfloat16"),
    Fault(
        "one wrong element", E1 + "mlp.hidden", weights(beit__encoder__1__fc1__bias=lambda b: b + 0.01 * (b == b[3]))
    ),
    Fault(
        "one wrong token", E1 + "norm2", after("layer_norm", lambda y: y * (np.arange(7)[:, None] != 4), 3), "token 4"
    ),
    Fault("NaN in one place", E1 + "norm1", after("layer_norm", lambda y: np.where(y > 1.5, np.nan, y), 2), "NaN"),
    # Pooling and heads
    Fault("mean pooling with CLS", "pooler", pooling_with_cls, "CLS included"),
    Fault("CLS for mean pooling", "pooler", pooling_cls_only, "CLS token is normalised"),
    Fault("classifier bias missing", "logits", weights(classifier__bias=lambda b: 0 * b), "bias is missing"),
    Fault("two classes swapped", "logits", weights(classifier__weight=lambda w: w[[1, 0, *range(2, len(w))]])),
    Fault("lm_head bias missing", "logits", weights(lm_head__bias=lambda b: 0 * b), "bias is missing", **MIM),
    Fault(
        "final norm of the head missing", "layernorm", op("layer_norm", lambda x, p, e: x, 6), "norm is missing", **MIM
    ),
    # Feature maps and segmentation
    Fault(
        "feature index off by one",
        "feature_maps.0",
        config(feature_convention="unilm", out_indices=[0, 1, 2, 3]),
        **SEG,
    ),
    Fault(
        "backbone stage off by one",
        "feature_maps.0",
        config(out_indices=[2]),
        "another hidden state",
        task="backbone",
        settings=dict(out_indices=[1]),
    ),
    Fault("deconvolution flipped", "fpn.0", op("conv_transpose", flipped, 0), "flipped", **SEG),
    Fault(
        "tanh GELU in the pyramid",
        "fpn.0.hidden",
        op(
            "conv_transpose_bn_gelu",
            lambda x, d, bn: ACTIVATIONS["gelu_pytorch_tanh"](reference.batch_norm(reference.conv_transpose(x, d), bn)),
        ),
        "gelu_pytorch_tanh",
        **SEG,
    ),
    Fault("average for max pooling", "fpn.3", op("max_pool2x2", averaged), "average", **SEG),
    Fault(
        "pooling cells do not overlap",
        "decode_head.psp_pools.1",
        op("adaptive_avg_pool", tiles),
        "do not overlap",
        **SEG,
    ),
    Fault(
        "batch-norm epsilon 1e-3",
        "decode_head.lateral_convs.0",
        op("conv_bn_relu", batch_norm_eps(1e-3)),
        "0.001",
        **SEG,
    ),
    Fault("ReLU missing", "decode_head.lateral_convs.1", op("conv_bn_relu", relu_dropped, 1), "ReLU is missing", **SEG),
    Fault(
        "kernel flipped",
        "decode_head.fpn_convs.1",
        weights(decode_head__fpn_convs__1__conv__weight=lambda w: w[:, :, ::-1, ::-1]),
        "flipped",
        **SEG,
    ),
    Fault(
        "running mean not subtracted",
        "decode_head.psp_modules.0",
        weights(decode_head__psp_modules__0__bn__running_mean=lambda m: 0 * m),
        "running mean",
        **SEG,
    ),
    Fault(
        "align_corners between levels",
        "decode_head.laterals.2",
        op("resize_bilinear", align_corners),
        "align_corners",
        **SEG,
    ),
    Fault(
        "align_corners before the bottleneck",
        "decode_head.psp_bottleneck",
        op("conv_bn_relu_resized", resized_with(align_corners)),
        "align_corners",
        **SEG,
    ),
    Fault(
        "nearest for bilinear",
        "decode_head.fpn_bottleneck",
        op("conv_bn_relu_resized", resized_with(nearest), 1),
        "nearest",
        **SEG,
    ),
    Fault(
        "maps joined in reverse",
        "decode_head.fpn_bottleneck",
        op(
            "conv_bn_relu_resized",
            lambda maps, layer, size: reference.conv_bn_relu(
                np.concatenate([reference.resize_bilinear(x, size) for x in maps[::-1]], 1), layer
            ),
            1,
        ),
        "reverse order",
        **SEG,
    ),
    Fault(
        "classifier bias of the map missing",
        "logits",
        weights(decode_head__classifier__bias=lambda b: 0 * b),
        "bias",
        **SEG,
    ),
    Fault(
        "auxiliary head: channels swapped",
        "auxiliary_head.convs.0",
        weights(auxiliary_head__convs__0__conv__weight=lambda w: w[:, ::-1]),
        **SEG,
    ),
]
