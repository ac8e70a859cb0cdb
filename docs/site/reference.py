"""The pages of the reference, which mkdocstrings fills from the docstrings."""

from __future__ import annotations

# page: (title, what it is about, names)
PAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "pipelines": (
        "Pipelines",
        "One call from images to results, images read ahead, and a page to look into a model with.",
        ("minibeit.pipeline", "minibeit.read_ahead", "minibeit.explore", "minibeit.Exploration"),
    ),
    "models": (
        "Models",
        "Arrays go in, a dataclass of arrays comes out. The Auto classes choose by the checkpoint.",
        (
            "minibeit.BeitModel",
            "minibeit.BeitForImageClassification",
            "minibeit.BeitForMaskedImageModeling",
            "minibeit.BeitForSemanticSegmentation",
            "minibeit.BeitBackbone",
            "minibeit.BeitPreTrainedModel",
            "minibeit.Data2VecVisionPreTrainedModel",
            "minibeit.Data2VecVisionModel",
            "minibeit.Data2VecVisionForImageClassification",
            "minibeit.Data2VecVisionForSemanticSegmentation",
            "minibeit.AutoModel",
            "minibeit.AutoModelForImageClassification",
            "minibeit.AutoModelForMaskedImageModeling",
            "minibeit.AutoModelForSemanticSegmentation",
            "minibeit.AutoBackbone",
            "minibeit.AutoConfig",
            "minibeit.AutoImageProcessor",
            "minibeit.AutoFeatureExtractor",
        ),
    ),
    "settings": (
        "Config and image processor",
        "What a checkpoint's `config.json` and `preprocessor_config.json` say.",
        (
            "minibeit.BeitConfig",
            "minibeit.Data2VecVisionConfig",
            "minibeit.BeitImageProcessor",
            "minibeit.BeitImageProcessorPil",
            "minibeit.BeitImageProcessorFast",
            "minibeit.BeitFeatureExtractor",
        ),
    ),
    "outputs": (
        "Outputs and errors",
        "What a call returns, where intermediates are collected, and what may be raised.",
        (
            "minibeit.BeitModelOutputWithPooling",
            "minibeit.ImageClassifierOutput",
            "minibeit.MaskedLMOutput",
            "minibeit.SemanticSegmenterOutput",
            "minibeit.BackboneOutput",
            "minibeit.Trace",
            "minibeit.CheckpointError",
            "minibeit.ImageError",
        ),
    ),
    "tokenizer": (
        "Tokenizer",
        "DALL-E's discrete VAE: images to visual tokens and back.",
        ("minibeit.DalleTokenizer", "minibeit.DalleTokenizerConfig"),
    ),
    "training": (
        "Training",
        "Gradients, and what the commands `finetune`, `pretrain` and `dvae` are made of.",
        (
            "minibeit.value_and_grad",
            "minibeit.Gradients",
            "minibeit.Noise",
            "minibeit.train.loop.Trainer",
            "minibeit.train.objective.Classification",
            "minibeit.train.segmentation.Segmentation",
            "minibeit.train.pretraining.MaskedModeling",
            "minibeit.train.discrete_vae.DiscreteVae",
            "minibeit.train.examples.read_examples",
            "minibeit.train.examples.read_images",
            "minibeit.train.label_maps.read_pairs",
            "minibeit.train.recipes.Recipe",
            "minibeit.train.optimizer.AdamW",
            "minibeit.train.probe.probe",
        ),
    ),
    "measuring": (
        "Measuring",
        "Metrics with their intervals, sliding windows, and whole evaluations.",
        (
            "minibeit.metrics",
            "minibeit.sliding",
            "minibeit.evaluate.classification.evaluate_classification",
            "minibeit.evaluate.segmentation.evaluate_segmentation",
            "minibeit.evaluate.masked_modeling.evaluate_masked_modeling",
        ),
    ),
    "flax": (
        "Flax's classes",
        "The calling convention of the classes that transformers 5 dropped.",
        (
            "minibeit.FlaxBeitModel",
            "minibeit.FlaxBeitForMaskedImageModeling",
            "minibeit.FlaxBeitForImageClassification",
            "minibeit.FlaxBeitModelOutputWithPooling",
            "minibeit.FlaxMaskedLMOutput",
            "minibeit.FlaxSequenceClassifierOutput",
        ),
    ),
    "ops": (
        "Operations",
        "Every operation that a model asks of a backend, as NumPy defines it.",
        (
            "minibeit.ops.reference.transformer",
            "minibeit.ops.reference.arrays",
            "minibeit.ops.reference.maps",
            "minibeit.ops.reference.losses",
            "minibeit.ops.reference.optimizer",
        ),
    ),
}
LETTERS = """\
The letters are the same everywhere: **B** batch, **C** channels, **P** patches = gh x gw, **N** tokens = 1 + P,
**D** width, **H** heads, **d** head size = D / H, **F** width inside the MLP, **L** blocks, **K** classes,
**V** visual tokens, **R** rows of the bias table, **(gh, gw)** patch grid.
"""


def texts() -> dict[str, str]:
    """The pages of the reference as Markdown, by page of the site."""
    pages = {}
    rows = ["| page | |", "|---|---|"]
    for page, (title, about, names) in PAGES.items():
        entries = "\n\n".join(f"::: {name}" for name in names)
        pages[f"reference/{page}.md"] = f"# {title}\n\n{about}\n\n{entries}\n"
        rows.append(f"| [{title}]({page}.md) | {about} |")
    pages["reference/index.md"] = "# Reference\n\nMade from the docstrings. " + LETTERS + "\n" + "\n".join(rows) + "\n"
    return pages
