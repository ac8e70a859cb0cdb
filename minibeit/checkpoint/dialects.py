"""The names of tensors in checkpoints: one table per dialect, from our canonical names to the file's.

`{e}` stands for the prefix of the encoder, `{i}` for a number and `{leaf}` for the last part of a name.  Every
canonical name that a model needs is translated and looked up; nothing is guessed from the names found in a file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a parameter is in a file: the tensor's name, and its layout there.

    `how` is "same", "transpose" (in, out), "hwio" (kh, kw, in, out), or "0/3", "1/3", "2/3" for a third of the rows.
    """

    name: str
    how: str = "same"

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file of a parameter whose shape in our layout is `shape`."""
        if self.how == "transpose":
            return shape[::-1]
        if self.how == "hwio":
            return shape[2], shape[3], shape[1], shape[0]
        return shape if self.how == "same" else (3 * shape[0], *shape[1:])


@dataclass(frozen=True)
class Dialect:
    """One way of naming the tensors of a BEiT.  `encoders` are the encoder's usual prefixes; writing uses the first."""

    name: str
    software: str
    rules: dict[str, str | Place]
    encoders: tuple[str, ...]
    layer_norm_eps: float  # default of that software; no file states it
    mark: str = ""  # a tensor that distinguishes the dialect from another with the same encoder names


# Names in files on the Hub: those of transformers 4, which transformers 5 writes too.
HUB: dict[str, str | Place] = {
    "beit.embeddings.cls_token": "{e}embeddings.cls_token",
    "beit.embeddings.mask_token": "{e}embeddings.mask_token",
    "beit.embeddings.position_embeddings": "{e}embeddings.position_embeddings",
    "beit.embeddings.patch.{leaf}": "{e}embeddings.patch_embeddings.projection.{leaf}",
    "beit.shared_bias_table": "{e}encoder.relative_position_bias.relative_position_bias_table",
    "beit.encoder.{i}.norm1.{leaf}": "{e}encoder.layer.{i}.layernorm_before.{leaf}",
    "beit.encoder.{i}.attention.query.{leaf}": "{e}encoder.layer.{i}.attention.attention.query.{leaf}",
    "beit.encoder.{i}.attention.key.{leaf}": "{e}encoder.layer.{i}.attention.attention.key.{leaf}",
    "beit.encoder.{i}.attention.value.{leaf}": "{e}encoder.layer.{i}.attention.attention.value.{leaf}",
    "beit.encoder.{i}.attention.output.{leaf}": "{e}encoder.layer.{i}.attention.output.dense.{leaf}",
    "beit.encoder.{i}.bias_table": (
        "{e}encoder.layer.{i}.attention.attention.relative_position_bias.relative_position_bias_table"
    ),
    "beit.encoder.{i}.lambda_1": "{e}encoder.layer.{i}.lambda_1",
    "beit.encoder.{i}.norm2.{leaf}": "{e}encoder.layer.{i}.layernorm_after.{leaf}",
    "beit.encoder.{i}.fc1.{leaf}": "{e}encoder.layer.{i}.intermediate.dense.{leaf}",
    "beit.encoder.{i}.fc2.{leaf}": "{e}encoder.layer.{i}.output.dense.{leaf}",
    "beit.encoder.{i}.lambda_2": "{e}encoder.layer.{i}.lambda_2",
    "beit.norm.{leaf}": "{e}layernorm.{leaf}",
    "beit.pooler.{leaf}": "{e}pooler.layernorm.{leaf}",
    "norm.{leaf}": "layernorm.{leaf}",
    "lm_head.{leaf}": "lm_head.{leaf}",
    "classifier.{leaf}": "classifier.{leaf}",
    "fpn.deconv1.{leaf}": "fpn1.0.{leaf}",
    "fpn.bn.{leaf}": "fpn1.1.{leaf}",
    "fpn.deconv2.{leaf}": "fpn1.3.{leaf}",
    "fpn.deconv3.{leaf}": "fpn2.0.{leaf}",
    "decode_head.psp_modules.{i}.conv.{leaf}": "decode_head.psp_modules.{i}.1.conv.{leaf}",
    "decode_head.psp_modules.{i}.bn.{leaf}": "decode_head.psp_modules.{i}.1.bn.{leaf}",
    "decode_head.psp_bottleneck.conv.{leaf}": "decode_head.bottleneck.conv.{leaf}",
    "decode_head.psp_bottleneck.bn.{leaf}": "decode_head.bottleneck.bn.{leaf}",
    "decode_head.lateral_convs.{i}.conv.{leaf}": "decode_head.lateral_convs.{i}.conv.{leaf}",
    "decode_head.lateral_convs.{i}.bn.{leaf}": "decode_head.lateral_convs.{i}.bn.{leaf}",
    "decode_head.fpn_convs.{i}.conv.{leaf}": "decode_head.fpn_convs.{i}.conv.{leaf}",
    "decode_head.fpn_convs.{i}.bn.{leaf}": "decode_head.fpn_convs.{i}.bn.{leaf}",
    "decode_head.fpn_bottleneck.conv.{leaf}": "decode_head.fpn_bottleneck.conv.{leaf}",
    "decode_head.fpn_bottleneck.bn.{leaf}": "decode_head.fpn_bottleneck.bn.{leaf}",
    "decode_head.classifier.{leaf}": "decode_head.classifier.{leaf}",
    "auxiliary_head.convs.{i}.conv.{leaf}": "auxiliary_head.convs.{i}.conv.{leaf}",
    "auxiliary_head.convs.{i}.bn.{leaf}": "auxiliary_head.convs.{i}.bn.{leaf}",
    "auxiliary_head.conv_cat.conv.{leaf}": "auxiliary_head.conv_cat.conv.{leaf}",
    "auxiliary_head.conv_cat.bn.{leaf}": "auxiliary_head.conv_cat.bn.{leaf}",
    "auxiliary_head.classifier.{leaf}": "auxiliary_head.classifier.{leaf}",
}

# Names that transformers 5 has in memory (`model.state_dict()`), which a plain torch.save writes.
TRANSFORMERS5: dict[str, str | Place] = {
    **HUB,
    "beit.shared_bias_table": "{e}shared_position_bias.relative_position_bias_table",
    "beit.encoder.{i}.norm1.{leaf}": "{e}layers.{i}.layernorm_before.{leaf}",
    "beit.encoder.{i}.attention.query.{leaf}": "{e}layers.{i}.attention.q_proj.{leaf}",
    "beit.encoder.{i}.attention.key.{leaf}": "{e}layers.{i}.attention.k_proj.{leaf}",
    "beit.encoder.{i}.attention.value.{leaf}": "{e}layers.{i}.attention.v_proj.{leaf}",
    "beit.encoder.{i}.attention.output.{leaf}": "{e}layers.{i}.attention.o_proj.{leaf}",
    "beit.encoder.{i}.bias_table": "{e}layers.{i}.relative_position_bias.relative_position_bias_table",
    "beit.encoder.{i}.lambda_1": "{e}layers.{i}.lambda_1",
    "beit.encoder.{i}.norm2.{leaf}": "{e}layers.{i}.layernorm_after.{leaf}",
    "beit.encoder.{i}.fc1.{leaf}": "{e}layers.{i}.mlp.fc1.{leaf}",
    "beit.encoder.{i}.fc2.{leaf}": "{e}layers.{i}.mlp.fc2.{leaf}",
    "beit.encoder.{i}.lambda_2": "{e}layers.{i}.lambda_2",
    "fpn.deconv1.{leaf}": "fpn.fpn1.conv_transpose1.{leaf}",
    "fpn.bn.{leaf}": "fpn.fpn1.normalization.{leaf}",
    "fpn.deconv2.{leaf}": "fpn.fpn1.conv_transpose2.{leaf}",
    "fpn.deconv3.{leaf}": "fpn.fpn2.{leaf}",
    "decode_head.psp_modules.{i}.conv.{leaf}": "decode_head.psp_modules.blocks.{i}.conv.convolution.{leaf}",
    "decode_head.psp_modules.{i}.bn.{leaf}": "decode_head.psp_modules.blocks.{i}.conv.normalization.{leaf}",
    "decode_head.psp_bottleneck.conv.{leaf}": "decode_head.psp_bottleneck.convolution.{leaf}",
    "decode_head.psp_bottleneck.bn.{leaf}": "decode_head.psp_bottleneck.normalization.{leaf}",
    "decode_head.lateral_convs.{i}.conv.{leaf}": "decode_head.lateral_convs.{i}.convolution.{leaf}",
    "decode_head.lateral_convs.{i}.bn.{leaf}": "decode_head.lateral_convs.{i}.normalization.{leaf}",
    "decode_head.fpn_convs.{i}.conv.{leaf}": "decode_head.fpn_convs.{i}.convolution.{leaf}",
    "decode_head.fpn_convs.{i}.bn.{leaf}": "decode_head.fpn_convs.{i}.normalization.{leaf}",
    "decode_head.fpn_bottleneck.conv.{leaf}": "decode_head.fpn_bottleneck.convolution.{leaf}",
    "decode_head.fpn_bottleneck.bn.{leaf}": "decode_head.fpn_bottleneck.normalization.{leaf}",
    "auxiliary_head.convs.{i}.conv.{leaf}": "auxiliary_head.convs.{i}.convolution.{leaf}",
    "auxiliary_head.convs.{i}.bn.{leaf}": "auxiliary_head.convs.{i}.normalization.{leaf}",
    "auxiliary_head.conv_cat.conv.{leaf}": "auxiliary_head.conv_cat.convolution.{leaf}",
    "auxiliary_head.conv_cat.bn.{leaf}": "auxiliary_head.conv_cat.normalization.{leaf}",
}

# transformers 5 saves Data2Vec-Vision with the encoder's names in files and the heads' names in memory.
MIXED: dict[str, str | Place] = {
    **HUB,
    **{ours: theirs for ours, theirs in TRANSFORMERS5.items() if ours.startswith(("decode_head", "auxiliary_head"))},
}

# microsoft/unilm: classification, pre-training, and the ADE20K models of mmseg (encoder under `backbone.`); also timm.
UNILM: dict[str, str | Place] = {
    **{ours: theirs for ours, theirs in HUB.items() if ours.startswith(("decode_head", "auxiliary_head"))},
    "decode_head.classifier.{leaf}": "decode_head.conv_seg.{leaf}",
    "auxiliary_head.classifier.{leaf}": "auxiliary_head.conv_seg.{leaf}",
    "beit.embeddings.cls_token": "{e}cls_token",
    "beit.embeddings.mask_token": "{e}mask_token",
    "beit.embeddings.position_embeddings": "{e}pos_embed",
    "beit.embeddings.patch.{leaf}": "{e}patch_embed.proj.{leaf}",
    "beit.shared_bias_table": "{e}rel_pos_bias.relative_position_bias_table",
    "beit.encoder.{i}.norm1.{leaf}": "{e}blocks.{i}.norm1.{leaf}",
    "beit.encoder.{i}.attention.query.weight": Place("{e}blocks.{i}.attn.qkv.weight", "0/3"),
    "beit.encoder.{i}.attention.query.bias": "{e}blocks.{i}.attn.q_bias",
    "beit.encoder.{i}.attention.key.weight": Place("{e}blocks.{i}.attn.qkv.weight", "1/3"),
    "beit.encoder.{i}.attention.value.weight": Place("{e}blocks.{i}.attn.qkv.weight", "2/3"),
    "beit.encoder.{i}.attention.value.bias": "{e}blocks.{i}.attn.v_bias",
    "beit.encoder.{i}.attention.output.{leaf}": "{e}blocks.{i}.attn.proj.{leaf}",
    "beit.encoder.{i}.bias_table": "{e}blocks.{i}.attn.relative_position_bias_table",
    "beit.encoder.{i}.lambda_1": "{e}blocks.{i}.gamma_1",
    "beit.encoder.{i}.norm2.{leaf}": "{e}blocks.{i}.norm2.{leaf}",
    "beit.encoder.{i}.fc1.{leaf}": "{e}blocks.{i}.mlp.fc1.{leaf}",
    "beit.encoder.{i}.fc2.{leaf}": "{e}blocks.{i}.mlp.fc2.{leaf}",
    "beit.encoder.{i}.lambda_2": "{e}blocks.{i}.gamma_2",
    "beit.norm.{leaf}": "{e}norm.{leaf}",
    "beit.pooler.{leaf}": "{e}fc_norm.{leaf}",
    "norm.{leaf}": "{e}norm.{leaf}",
    "lm_head.{leaf}": "lm_head.{leaf}",
    "classifier.{leaf}": "head.{leaf}",
    "fpn.deconv1.{leaf}": "{e}fpn1.0.{leaf}",
    "fpn.bn.{leaf}": "{e}fpn1.1.{leaf}",
    "fpn.deconv2.{leaf}": "{e}fpn1.3.{leaf}",
    "fpn.deconv3.{leaf}": "{e}fpn2.0.{leaf}",
}

# OpenMMLab's mmpretrain, and mmsegmentation from 1.0 on, whose feature pyramid is a neck.
OPENMMLAB: dict[str, str | Place] = {
    ours: theirs for ours, theirs in UNILM.items() if ours.startswith(("beit.encoder", "decode_head", "auxiliary_head"))
}
OPENMMLAB = {
    ours: Place(place.name.replace("{e}blocks.", "{e}layers."), place.how)
    for ours, place in ((ours, p if isinstance(p, Place) else Place(p)) for ours, p in OPENMMLAB.items())
}
OPENMMLAB.update(
    {
        "beit.embeddings.cls_token": "{e}cls_token",
        "beit.embeddings.mask_token": "{e}mask_token",
        "beit.embeddings.position_embeddings": "{e}pos_embed",
        "beit.embeddings.patch.{leaf}": "{e}patch_embed.projection.{leaf}",
        "beit.shared_bias_table": "{e}rel_pos_bias.relative_position_bias_table",
        "beit.encoder.{i}.norm1.{leaf}": "{e}layers.{i}.ln1.{leaf}",
        "beit.encoder.{i}.norm2.{leaf}": "{e}layers.{i}.ln2.{leaf}",
        "beit.encoder.{i}.fc1.{leaf}": "{e}layers.{i}.ffn.layers.0.0.{leaf}",
        "beit.encoder.{i}.fc2.{leaf}": "{e}layers.{i}.ffn.layers.1.{leaf}",
        "beit.norm.{leaf}": "{e}ln1.{leaf}",
        "beit.pooler.{leaf}": "{e}ln2.{leaf}",
        "norm.{leaf}": "{e}ln1.{leaf}",
        "lm_head.{leaf}": "head.cls_head.{leaf}",
        "classifier.{leaf}": "head.fc.{leaf}",
        "fpn.deconv1.{leaf}": "neck.upsample_4x.0.{leaf}",
        "fpn.bn.{leaf}": "neck.upsample_4x.1.{leaf}",
        "fpn.deconv2.{leaf}": "neck.upsample_4x.3.{leaf}",
        "fpn.deconv3.{leaf}": "neck.upsample_2x.0.{leaf}",
    }
)


def _flax() -> dict[str, str | Place]:
    """Flax's names: HUB's with slashes; `kernel` for matrices, transposed, and `scale` for the weight of a norm."""
    rules: dict[str, str | Place] = {}
    for ours, theirs in HUB.items():
        if ours.startswith(("fpn", "decode_head", "auxiliary_head")):
            continue  # Flax has no segmentation
        stem, path = ours.removesuffix("{leaf}"), str(theirs).replace(".", "/").removesuffix("{leaf}")
        if stem == ours:
            rules[ours] = path
        elif "norm" in ours or "pooler" in ours:
            rules[stem + "weight"], rules[stem + "bias"] = path + "scale", path + "bias"
        else:
            how = "hwio" if "patch" in ours else "transpose"
            rules[stem + "weight"], rules[stem + "bias"] = Place(path + "kernel", how), path + "bias"
    return rules


DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            "data2vec5",
            "transformers 5 (Data2Vec segmentation)",
            MIXED,
            ("data2vec_vision.", "beit.", ""),
            1e-12,
            "decode_head.psp_bottleneck.convolution.weight",
        ),
        Dialect("hub", "transformers (Hub files; BEiT, DiT, Data2Vec)", HUB, ("beit.", "data2vec_vision.", ""), 1e-12),
        Dialect("transformers5", "transformers 5 in memory", TRANSFORMERS5, ("beit.", ""), 1e-12),
        Dialect("flax", "Flax", _flax(), ("beit/", ""), 1e-12),
        Dialect("unilm", "microsoft/unilm or timm", UNILM, ("", "backbone."), 1e-6),
        Dialect("openmmlab", "OpenMMLab (mmpretrain, mmsegmentation 1.x)", OPENMMLAB, ("backbone.", ""), 1e-6),
    )
}
ALIASES = {
    "timm": "unilm",
    "mmseg": "unilm",
    "mmpretrain": "openmmlab",
    "dit": "hub",
    "data2vec": "hub",
    "transformers": "hub",
}
