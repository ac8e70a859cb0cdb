"""`minibeit compare`: how two models, backends or precisions differ on a user's images."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ..runs.found import STDIN, Found, find_images
from ..runs.results import check_finite
from .loading import check_head, config_of, load_processor, made_for
from .reports import (
    add_report_arguments,
    check_reports,
    print_classes,
    print_figures,
    print_notes,
    print_rows,
    write_reports,
)
from .terminal import StatusLine, UsageError, note, out, positive, table
from .views import add_view_arguments, config_changes, inference_of, processor_of, view_options

if TYPE_CHECKING:
    import numpy as np

    from ..config import BeitConfig
    from ..evaluate.comparison import Comparison, How

HELP = "compare two models, backends or precisions on images"
DESCRIPTION = """\
Shows the same images, which need no labels, to two models and says how far their answers are apart, each figure with
its 95% interval, and on which images most.  Neither is the truth; A is what B is compared with.

For classifiers: the share of images of the same class, the five classes shared, KL divergence, relative RMS of the
logits.  For segmentation: mean IoU between the maps, share of equal pixels, the same of the logits.  For masked image
modelling: the share of masked patches of the same visual token, and the cosine of the last hidden states.  For all
other checkpoints, for two of different tasks, and with --features: cosine and relative RMS of every hidden state.

Without B, A is compared with itself, and --backend, --dtype or --device take two values.  An image that cannot be used
is named on stderr and left out, the exit code is 1.
"""
EXAMPLES = """\
  minibeit compare flowers-beit flowers-beit-2 --images photos/ --html report.html
  minibeit compare flowers-beit --images photos/ --dtype float64 float32
  minibeit compare DIR --images photos/ --backend numpy numba --json numbers.json
  minibeit compare ADE-DIR OTHER-DIR --images street/ --slide
"""
CLASSIFICATION, SEGMENTATION, MASKED = "image_classification", "semantic_segmentation", "masked_image_modeling"
FEATURES = "features"
MOST_PRINTED = 10  # of the worst images


class Side(NamedTuple):
    """One of the two: a checkpoint, and how it is computed; None for what was not said."""

    model: str
    backend: str | None
    dtype: str | None
    device: int | None

    def options(self) -> dict[str, Any]:
        """What was said, as `from_pretrained` takes it."""
        return {name: value for name, value in self._asdict().items() if value is not None and name != "model"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..ops import BACKENDS

    parser.add_argument("a", metavar="A", help="a checkpoint: a folder, a file, or an id on the Hub")
    parser.add_argument("b", metavar="B", nargs="?", help="a second checkpoint (default: A, computed otherwise)")
    parser.add_argument(
        "-i", "--images", nargs="+", required=True, metavar="IMAGE",
        help="image files, folders of them, or quoted patterns",
    )  # fmt: skip
    parser.add_argument("-r", "--recursive", action="store_true", help="also search the folders within folders")
    for name, what in (
        ("--backend", f"what computes ({', '.join(BACKENDS)})"),
        ("--dtype", "precision, whatever the backend has, such as float32 or float64"),
        ("--device", "number of the GPU, with --backend cupy"),
    ):
        parser.add_argument(
            name, nargs="+", metavar="X", type=int if name == "--device" else str,
            help=f"{what}: one value for both, or one for A and one for B",
        )  # fmt: skip
    parser.add_argument("--features", action="store_true", help="compare hidden states, whatever heads there are")
    parser.add_argument(
        "-b", "--batch-size", type=positive, metavar="N",
        help="images computed at a time (default 8), of segmentation windows (default 1)",
    )  # fmt: skip
    add_report_arguments(parser)
    add_view_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from ..evaluate.page import OF_TWO_MODELS

    sides = sides_of(args)
    found = _images(args)
    names = [entry.source for entry in found]
    check_reports(args, names, [side.model for side in sides])
    task, notes = _task(args, [made_for(side.model) for side in sides])
    configs = [config_of(side.model, fetched=True) for side in sides]
    if task != SEGMENTATION and view_options(args):
        raise UsageError(f"{view_options(args)[0]}: is for two models of semantic segmentation")
    with StatusLine(args.quiet) as line:
        comparison = COMPARED[task](args, sides, configs, names, _how(args, line, len(names)))
    comparison = replace(comparison, notes=(*notes, *comparison.notes))
    for sentence in comparison.left_out:
        note(f"left out: {sentence}")
    if not comparison.images:
        raise ValueError("none of the images can be used")
    write_reports(args, comparison, OF_TWO_MODELS)
    _print(comparison)
    if not args.quiet:
        print_notes(comparison)
    return 1 if comparison.left_out else 0


def sides_of(args: argparse.Namespace) -> tuple[Side, Side]:
    """The two that are compared.  Raises UsageError for more than two values, and for nothing that differs."""
    values = {}
    for name in ("backend", "dtype", "device"):
        given = getattr(args, name) or [None]
        if len(given) > 2:
            raise UsageError(f"--{name}: expected one value for both or two, found {len(given)}; name A and B first")
        values[name] = given if len(given) == 2 else given * 2
    a, b = (
        Side(model, *(values[name][i] for name in ("backend", "dtype", "device")))
        for i, model in enumerate((args.a, args.b or args.a))
    )
    if args.b is None and a == b:
        raise UsageError("nothing to compare: name a second checkpoint, or two values for --backend or --dtype")
    return a, b


def _images(args: argparse.Namespace) -> list[Found]:
    if STDIN in args.images:
        raise UsageError("--images: expected files or folders, found -, standard input")
    found = find_images(args.images, args.recursive)
    wrong = next((entry.error for entry in found if entry.error is not None), None)
    if wrong:
        raise ValueError(wrong)
    return found


def _task(args: argparse.Namespace, made: list[str | None]) -> tuple[str, tuple[str, ...]]:
    """What is compared, and a note where it is not what the models were made for."""
    from ..task_table import in_words

    a, b = made
    if args.features:
        return FEATURES, ()
    if a == b:
        return (a if a is not None and a in COMPARED else FEATURES), ()
    what = [in_words(task) if task else "no task that is known" for task in made]
    return FEATURES, (f"A was made for {what[0]}, B for {what[1]}: their hidden states are compared",)


def _how(args: argparse.Namespace, line: StatusLine, count: int) -> How:
    from ..evaluate.comparison import How
    from ..images.ahead import default_workers

    return How(
        batch_size=args.batch_size or 8,
        workers=args.workers or default_workers(),
        worst=args.worst,
        draw=args.html is not None,
        seed=args.seed,
        tell=lambda done: line.show(f"{done} of {count} images"),
    )


# Tasks ----------------------------------------------------------------------------------------------------------------


def _classification(
    args: argparse.Namespace, sides: tuple[Side, Side], configs: list[BeitConfig], names: list[str], how: How
) -> Comparison:
    from ..evaluate.compare import compare_classification
    from ..tasks.image_classification import BeitForImageClassification

    for side, config in zip(sides, configs):
        if config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
            raise UsageError(f"{side.model}: does not name one of several classes; --features compares hidden states")
    notes = _same_classes(configs)
    models = [_loaded(BeitForImageClassification, side) for side in sides]
    processors = _processors(args, sides, models)
    read, preparation = _read(processors)
    labels = [configs[0].id2label[i] for i in range(configs[0].num_labels)]
    a, b = map(_logits, models)
    return compare_classification(
        a, b, names, read, labels, how, notes=notes, **_facts(args, sides, models, preparation)
    )


def _segmentation(
    args: argparse.Namespace, sides: tuple[Side, Side], configs: list[BeitConfig], names: list[str], how: How
) -> Comparison:
    import numpy as np

    from ..evaluate.compare_maps import Segment, compare_segmentation
    from ..sliding import segment
    from ..tasks.semantic_segmentation import BeitForSemanticSegmentation
    from .segment import palette

    notes = _same_classes(configs)
    models = [_loaded(BeitForSemanticSegmentation, side, **config_changes(args)) for side in sides]
    processors = [processor_of(args, processor) for processor in _processors(args, sides, models)]

    def maps_of(processor: Any, config: BeitConfig) -> Segment:
        views = inference_of(args, config)
        return lambda logits, image, shape: segment(logits, processor, image, shape, views)

    config = configs[0]
    a, b = map(_logits, models)
    first, second = (maps_of(processor, model.config) for processor, model in zip(processors, models))
    return compare_segmentation(
        a, b, (first, second), names,
        [config.id2label[i] for i in range(config.num_labels)], np.array(palette("auto", config.num_labels)),
        how, processors[0].apply_exif_orientation, notes,
        **_facts(args, sides, models, _read(processors)[1] | {"mode": inference_of(args, config).mode}),
    )  # fmt: skip


def _masked_modeling(
    args: argparse.Namespace, sides: tuple[Side, Side], configs: list[BeitConfig], names: list[str], how: How
) -> Comparison:
    from ..evaluate.compare import compare_masked_modeling
    from ..tasks.masked_image_modeling import BeitForMaskedImageModeling

    first, second = ((*config.grid, config.vocab_size) for config in configs)
    if first != second:
        words = "{0}x{1} patches and {2} visual tokens"
        raise UsageError(f"the models have {words.format(*first)} in A, {words.format(*second)} in B")
    models = [_loaded(BeitForMaskedImageModeling, side) for side in sides]
    read, preparation = _read(_processors(args, sides, models))

    def network(model: Any) -> Callable[..., Any]:
        def compute(pixels: np.ndarray, **inputs: Any) -> Any:
            output = model(pixels, **inputs)
            check_finite(output.logits)
            return output

        return compute

    a, b = map(network, models)
    facts = _facts(args, sides, models, preparation)
    return compare_masked_modeling(a, b, names, read, configs[0].grid, how, **facts)


def _features(
    args: argparse.Namespace, sides: tuple[Side, Side], configs: list[BeitConfig], names: list[str], how: How
) -> Comparison:
    from ..evaluate.compare import compare_features
    from ..tasks.backbone import BeitBackbone

    sizes = [(config.num_hidden_layers, config.hidden_size) for config in configs]
    if sizes[0] != sizes[1]:
        raise UsageError("the models have {} blocks of width {} in A, {} of width {} in B".format(*sizes[0], *sizes[1]))
    places = ["embeddings", *(f"after block {i}" for i in range(sizes[0][0]))]
    every: dict[str, Any] = dict(out_indices=tuple(range(len(places))), add_fpn=False, reshape_hidden_states=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*another task's head are not used")  # features need no head
        models = [BeitBackbone.from_pretrained(side.model, **_fetched(side), **every) for side in sides]
    read, preparation = _read(_processors(args, sides, models))

    def states(model: Any) -> Callable[[np.ndarray], list[np.ndarray]]:
        return lambda pixels: [check_finite(x) for x in model(pixels).feature_maps]

    a, b = map(states, models)
    return compare_features(a, b, names, read, places, how, **_facts(args, sides, models, preparation))


COMPARED: dict[str, Callable[..., Comparison]] = {
    CLASSIFICATION: _classification,
    SEGMENTATION: _segmentation,
    MASKED: _masked_modeling,
    FEATURES: _features,
}


def _same_classes(configs: list[BeitConfig]) -> tuple[str, ...]:
    """A note where the two call a class differently.  Raises UsageError for different numbers of classes."""
    a, b = configs
    if a.num_labels != b.num_labels:
        raise UsageError(
            f"A has {a.num_labels} classes, B {b.num_labels}; models of one set of classes can be compared, or with "
            "--features the hidden states of any two"
        )
    strange = [i for i in range(a.num_labels) if a.id2label[i] != b.id2label[i]]
    if not strange:
        return ()
    i = strange[0]
    return (
        f"A and B call {len(strange)} classes differently, such as class {i}, {a.id2label[i]!r} and {b.id2label[i]!r}; "
        "they are compared by number",
    )


def _fetched(side: Side) -> dict[str, Any]:
    return {**side.options(), "local_files_only": True}  # `made_for` has fetched it


def _loaded(model_class: Any, side: Side, **fields: Any) -> Any:
    check_head(side.model, model_class.task, fetched=True)
    return model_class.from_pretrained(side.model, **_fetched(side), **fields)


def _logits(model: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda pixels: check_finite(model(pixels).logits)


def _processors(args: argparse.Namespace, sides: tuple[Side, Side], models: list[Any]) -> list[Any]:
    quiet = [args.quiet, args.quiet or sides[0].model == sides[1].model]
    return [load_processor(side.model, model.config, q) for side, model, q in zip(sides, models, quiet)]


def _read(processors: list[Any]) -> tuple[Any, dict[str, Any]]:
    """What reads images for both, and how, for the report."""
    from ..evaluate.comparison import reader_of, same_pixels

    same = same_pixels(*processors)
    how = "the same for both" if same else "each by its own image processor"
    return reader_of(*processors), {"pixel values": how, "size": [processor.size for processor in processors]}


# Results --------------------------------------------------------------------------------------------------------------


def _facts(
    args: argparse.Namespace, sides: tuple[Side, Side], models: list[Any], settings: dict[str, Any]
) -> dict[str, Any]:
    from .. import __version__

    a, b = (
        {"model": side.model, "backend": model.ops.backend, "dtype": model.dtype} for side, model in zip(sides, models)
    )
    names = [f"{one['model']} ({one['backend']}, {one['dtype']})" for one in (a, b)]
    return dict(
        a=a,
        b=b,
        model=f"A, {names[0]}, and B, {names[1]}",
        data=", ".join(args.images),
        settings={**settings, "minibeit": __version__},
    )


def _print(comparison: Comparison) -> None:
    for name, side in (("A", comparison.a), ("B", comparison.b)):
        out(f"{name}  {side['model']} ({side['backend']}, {side['dtype']})")
    out("")
    print_figures(comparison)
    if comparison.task == FEATURES:
        print_rows("hidden states", "state", comparison.classes, comparison.unit)
    else:
        differing = [row for row in comparison.classes if row.figures[0].value < 1]
        print_classes(differing, comparison.unit, "classes that differ")
    if not comparison.worst:
        return
    out("")
    out("images, furthest apart first")
    for text in table([(worst.path, worst.text) for worst in comparison.worst[:MOST_PRINTED]]):
        out(f"  {text}")
