"""What the tensors of a checkpoint are called: one table per dialect, from our canonical names to the file's.

A rule is a pair of templates; `{i}` stands for a number and `{leaf}` for the last word.  Every canonical name that a
model needs is translated and looked up, so nothing is guessed from the names that happen to be in a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Names in files on the Hub: those of transformers 4, under which transformers 5 saves too.
HUB = {
    "beit.embeddings.cls_token": "beit.embeddings.cls_token",
    "beit.embeddings.mask_token": "beit.embeddings.mask_token",
    "beit.embeddings.position_embeddings": "beit.embeddings.position_embeddings",
    "beit.embeddings.patch.{leaf}": "beit.embeddings.patch_embeddings.projection.{leaf}",
    "beit.shared_bias_table": "beit.encoder.relative_position_bias.relative_position_bias_table",
    "beit.encoder.{i}.norm1.{leaf}": "beit.encoder.layer.{i}.layernorm_before.{leaf}",
    "beit.encoder.{i}.attention.query.{leaf}": "beit.encoder.layer.{i}.attention.attention.query.{leaf}",
    "beit.encoder.{i}.attention.key.{leaf}": "beit.encoder.layer.{i}.attention.attention.key.{leaf}",
    "beit.encoder.{i}.attention.value.{leaf}": "beit.encoder.layer.{i}.attention.attention.value.{leaf}",
    "beit.encoder.{i}.attention.output.{leaf}": "beit.encoder.layer.{i}.attention.output.dense.{leaf}",
    "beit.encoder.{i}.bias_table": (
        "beit.encoder.layer.{i}.attention.attention.relative_position_bias.relative_position_bias_table"
    ),
    "beit.encoder.{i}.lambda_1": "beit.encoder.layer.{i}.lambda_1",
    "beit.encoder.{i}.norm2.{leaf}": "beit.encoder.layer.{i}.layernorm_after.{leaf}",
    "beit.encoder.{i}.fc1.{leaf}": "beit.encoder.layer.{i}.intermediate.dense.{leaf}",
    "beit.encoder.{i}.fc2.{leaf}": "beit.encoder.layer.{i}.output.dense.{leaf}",
    "beit.encoder.{i}.lambda_2": "beit.encoder.layer.{i}.lambda_2",
    "beit.norm.{leaf}": "beit.layernorm.{leaf}",
    "beit.pooler.{leaf}": "beit.pooler.layernorm.{leaf}",
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

# Buffers that carry no learned number: index tables that follow from the grid, and a counter of training steps.
IGNORED = re.compile(r".*(relative_position_index|num_batches_tracked)$")


def translate(name: str, rules: dict[str, str]) -> str:
    """`name` in the words of the table's right side.  Raises KeyError for a name that no rule knows."""
    words = name.split(".")
    number = next((word for word in words if word.isdigit()), "")
    for leaf in (words[-1], None):
        key = ".".join("{i}" if word.isdigit() else word for word in (words if leaf is None else words[:-1]))
        key = key if leaf is None else f"{key}.{{leaf}}"
        if key in rules:
            return rules[key].format(i=number, leaf=leaf)
    raise KeyError(name)


def hub_names(names: Iterable[str], model_type: str = "beit", bare: bool = False) -> dict[str, str]:
    """{canonical name: name in a Hub file}.

    `bare` files, those of the encoder alone and of backbones, have no `beit.` in front; Data2Vec-Vision writes
    `data2vec_vision.` instead.
    """
    prefix = "" if bare else model_type.replace("-", "_") + "."
    return {name: re.sub(r"^beit\.", prefix, translate(name, HUB)) for name in names}
