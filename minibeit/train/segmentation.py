"""UPerNet trained on label maps: the objective, and the model that it starts from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..checkpoint.load import open_checkpoint
from ..config import BeitConfig
from ..image_processor import BeitImageProcessor
from ..images.transforms import IGNORED_LABEL, resize_labels
from ..metrics import areas, confusion_matrix, segmentation_scores
from ..model.segmentation import segmentation_loss
from ..ops import get_ops, reference
from ..tasks.semantic_segmentation import BeitForSemanticSegmentation
from .augment_maps import augmented, padded
from .batches import normalised, read_image
from .label_maps import Pair, Pairs, check_sizes
from .objective import Batch, Loss, Objective, Sample, Score
from .segmentation_recipes import SEGMENTATION_PRESETS, SegmentationRecipe
from .start import adapted, config_of, given, labels_of
from .start import processor_for as processor_of_checkpoint

TASK = BeitForSemanticSegmentation.task


class Segmentation(Objective):
    """The class of every pixel: cross-entropy of the logits at the size of the labels, and of the auxiliary head's.

    Batch norms use the statistics of the batch, so that every piece of a batch needs two images.  Held-out images are
    judged at the size that the processor makes of them.
    """

    best = ("mean_iou", 1)
    batch_statistics = True
    smallest_piece = 2

    def __init__(
        self, pairs: Pairs, processor: BeitImageProcessor, recipe: SegmentationRecipe, config: BeitConfig
    ) -> None:
        self.processor, self.recipe, self.config, self.read_map = processor, recipe, config, pairs.read_map
        (height, width), (ph, pw) = config.image_shape, config.patch_shape
        if height % ph or width % pw or min(config.grid) < 2:
            raise ValueError(
                f"crop_size: expected a multiple of the patch size {ph} x {pw}, at least twice, "
                f"found {height} x {width}"
            )
        self.train, self.held_out, self.fingerprint = pairs.train, pairs.held_out, pairs.fingerprint

    def read(self, example: Pair, key: Sequence[int]) -> Sample:
        rng, shape = np.random.default_rng(list(key)), self.config.image_shape
        image, labels = read_image(example.path, self.processor), self._labels(example)
        check_sizes(example, image.size, labels)
        pixels, labels = augmented(image, labels, shape, self.recipe, rng)
        return padded(normalised(pixels, self.processor), shape, 0), padded(labels, shape, IGNORED_LABEL)

    def read_judged(self, example: Pair) -> Sample:
        made = self.processor(example.path, segmentation_maps=self._labels(example), do_reduce_labels=False)
        return made.pixel_values[0], made.labels[0]

    def _labels(self, example: Pair) -> np.ndarray:  # -> (H, W)
        return self.read_map(example.map, self.processor.apply_exif_orientation)

    def for_step(self, batch: Batch, done: float, key: Sequence[int]) -> Batch:
        settings = {"output_auxiliary_logits": True, "head_dropout": self.recipe.head_dropout}
        return dataclasses.replace(batch, settings=settings)

    def loss(self, batch: Batch) -> Loss:
        counted = batch.targets != IGNORED_LABEL
        labels, share = batch.targets.astype(np.int64), 1.0
        if self.recipe.mean_of_all:
            share = float(counted.mean())
        if not counted.any():  # a mean of nothing: such a batch teaches nothing
            labels, share = np.zeros_like(labels), 0.0

        def loss(ops: Any, output: Any) -> Any:
            made = segmentation_loss(ops, output.logits, output.auxiliary_logits, labels, self.config)
            return made if share == 1 else ops.weighted_sum([made], [share])

        return loss

    def terms(self, batch: Batch) -> int:
        return batch.targets.size if self.recipe.mean_of_all else int((batch.targets != IGNORED_LABEL).sum())

    def said(self, output: Any) -> Any:  # -> (B, h, w)
        return output.logits.argmax(1)

    def right(self, said: Any, batch: Batch) -> tuple[float, int]:
        """Of the pixels at which the logits stand, before they are resized."""
        labels = np.stack([resize_labels(each, said.shape[1:]) for each in batch.targets])
        return float((said == labels).sum()), int((labels != IGNORED_LABEL).sum())

    def score(self) -> Score:
        return _Confusion(self.config.num_labels)


class _Confusion(Score):
    """The confusion matrix (K, K) of all pixels that count, and their cross-entropy."""

    sums = ("matrix", "loss")

    def __init__(self, classes: int) -> None:
        self.matrix = np.zeros((classes, classes), np.int64)
        self.loss = 0.0

    def add(self, output: Any, batch: Batch) -> None:
        for logits, labels in zip(output.logits, batch.targets):
            counted = labels != IGNORED_LABEL
            x = reference.resize_bilinear(logits[None], labels.shape)[0][:, counted]  # (K, n)
            true = labels[counted].astype(np.int64)
            self.matrix += confusion_matrix(true, x.argmax(0), len(self.matrix))
            top = x.max(0)
            log_sums = np.log(np.exp(x - top).sum(0)) + top
            self.loss += float((log_sums - x[true, np.arange(len(true))]).sum(dtype=np.float64))

    def metrics(self) -> dict[str, float]:
        scores = segmentation_scores(areas(self.matrix))
        return {"loss": self.loss / max(int(self.matrix.sum()), 1), **{k: float(v) for k, v in scores.items()}}


# The start ------------------------------------------------------------------------------------------------------------


def from_checkpoint(
    path: str | os.PathLike[str],
    names: Sequence[str],
    *,
    drop_path: float | None = None,
    seed: int = 0,
    backend: str | None = None,
    image_size: int | None = None,
    keep_classes: bool = False,
    convention: str | None = None,
    num_threads: int | None = None,
    dtype: str = "float32",
    device: int | None = None,
) -> BeitForSemanticSegmentation:
    """A checkpoint of any task as a segmenter of the classes `names`.

    The position bias table that a checkpoint of masked modelling shares is copied to every block, and its mask token is
    left out.  UPerNet is drawn at random, or kept from a checkpoint that has it, but for the layers that name
    classes, which are drawn anew unless `keep_classes`.  `convention` is the config's `feature_convention`.
    """
    get_ops(backend, None, dtype, device)  # reports a missing backend before gigabytes are read
    opened = open_checkpoint(path)
    config = opened.config
    fields: dict[str, Any] = {"semantic_loss_ignore_index": IGNORED_LABEL}
    if not keep_classes:
        fields.update(labels_of(names))
    if convention is not None:
        fields["feature_convention"] = convention
    if opened.task != TASK:
        indices = feature_indices(config.num_hidden_layers, convention or config.feature_convention)
        fields.update(out_indices=indices, out_features=None, problem_type=None)
    config, arrays = adapted(path, config, TASK, fields, drop_path, image_size, seed)
    return BeitForSemanticSegmentation(
        config, backend=backend, num_threads=num_threads, dtype=dtype, device=device, arrays=arrays
    )


def from_scratch(
    source: str,
    names: Sequence[str],
    *,
    drop_path: float | None = None,
    seed: int = 0,
    backend: str | None = None,
    image_size: int | None = None,
    convention: str | None = None,
    num_threads: int | None = None,
    dtype: str = "float32",
    device: int | None = None,
) -> BeitForSemanticSegmentation:
    """A model of random weights: a preset's name, or the `config.json` that says what it is made of."""
    config = config_of(source, SEGMENTATION_PRESETS)
    convention = convention or config.feature_convention
    fields: dict[str, Any] = {**labels_of(names), "semantic_loss_ignore_index": IGNORED_LABEL}
    fields.update(use_mask_token=False, problem_type=None, feature_convention=convention)
    if len(config.out_indices or ()) != 4:
        fields.update(out_indices=feature_indices(config.num_hidden_layers, convention), out_features=None)
    config = config.replace(**fields, **given(drop_path_rate=drop_path, image_size=image_size))
    return BeitForSemanticSegmentation(
        config, seed=seed, backend=backend, num_threads=num_threads, dtype=dtype, device=device
    )


def feature_indices(L: int, convention: str) -> tuple[int, ...]:
    """`out_indices` for the outputs of a third, a half, two thirds and all of L blocks, as the published models have.

    In transformers' convention an index cannot mean the last block's output, so that the one before is taken.  In a
    shallow model they are the last four.  Raises ValueError for fewer than four blocks.
    """
    if L < 4:
        raise ValueError(f"num_hidden_layers: UPerNet reads four hidden states, which {L} blocks do not have")
    last = L if convention == "unilm" else L - 1
    states = [round(L / 3), L // 2, round(2 * L / 3), last]
    if not states[0] < states[1] < states[2] < last:
        states = list(range(last - 3, last + 1))
    return tuple(state - 1 if convention == "unilm" else state + 1 for state in states)


def processor_for(
    config: BeitConfig, checkpoint: str | os.PathLike[str] | None, recipe: SegmentationRecipe, reduce: bool
) -> BeitImageProcessor:
    """The image processor of the checkpoint at the size of the config, with the recipe's normalisation."""
    values = processor_of_checkpoint(config, checkpoint).to_dict()
    if recipe.normalisation is not None:
        mean, std = map(list, recipe.normalisation)
        values.update(image_mean=mean, image_std=std)
    return BeitImageProcessor.from_dict({**values, "do_reduce_labels": reduce})
