"""The one table of tasks: what each is called, in classes, configs and words, and which parameters are its head."""

from __future__ import annotations

from dataclasses import dataclass

PREFIXES = ("Beit", "Data2VecVision", "FlaxBeit")  # of transformers' class names


@dataclass(frozen=True)
class Task:
    """One task; `name` is also that of its module in `tasks/`.

    `ending` follows "Beit" in the name of its class, here and in transformers.  `heads` are the beginnings of the
    canonical names of parameters that the task has beside the encoder, `shown_by` is the one that tells it.  `bare`:
    the names in its files do not begin with `beit.`; `masked`: its calls take `bool_masked_pos`.
    """

    name: str
    ending: str
    words: str
    heads: tuple[str, ...] = ()
    shown_by: str = ""
    bare: bool = False
    masked: bool = False

    @property
    def class_name(self) -> str:
        """The class here, and in transformers for a BEiT."""
        return "Beit" + self.ending

    def architecture(self, model_type: str) -> str:
        """The class in transformers for a config of `model_type`."""
        return ("Data2VecVision" if model_type == "data2vec-vision" else "Beit") + self.ending


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("model", "Model", "the bare encoder", bare=True, masked=True),
        Task(
            "masked_image_modeling",
            "ForMaskedImageModeling",
            "masked image modeling",
            heads=("lm_head",),
            shown_by="lm_head.weight",
            masked=True,
        ),
        Task(
            "image_classification",
            "ForImageClassification",
            "image classification",
            heads=("classifier",),
            shown_by="classifier.weight",
        ),
        Task(
            "semantic_segmentation",
            "ForSemanticSegmentation",
            "semantic segmentation",
            heads=("decode_head", "fpn"),
            shown_by="decode_head.classifier.weight",
        ),
        Task("backbone", "Backbone", "feature maps", heads=("fpn",), shown_by="fpn.deconv1.weight", bare=True),
    )
}
CLASSES = {name: task.class_name for name, task in TASKS.items()}
# From the largest head to none: a segmentation head has an FPN too, which a backbone may have.
BY_HEAD = ("masked_image_modeling", "semantic_segmentation", "image_classification", "backbone", "model")
OF_ARCHITECTURE = {prefix + task.ending: name for name, task in TASKS.items() for prefix in PREFIXES}


def in_words(task: str) -> str:
    """A task as a message names it."""
    return TASKS[task].words if task in TASKS else task


def checked_task(task: str) -> str:
    """The task.  Raises ValueError, naming all, for one that there is none of."""
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, found {task!r}")
    return task
