"""An evaluation as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..task_table import in_words
from ..text import html as escape
from .drawing import as_data
from .evaluation import ClassRow, Evaluation, Figure, Worst
from .page_parts import SCRIPT, STYLE

MOST_IN_A_MATRIX = 40  # classes; of more, the largest confusions are listed
MOST_CONFUSIONS = 30


class Words(NamedTuple):
    """What the page calls the rows and columns of a confusion, its parts, and by its unit the gallery."""

    row: str = "true"
    column: str = "predicted"
    taken: str = "What is taken for what"
    matrix: str = "Confusion matrix"
    classes: str = "Classes"
    ignored: str = "not counted"
    worst: tuple[tuple[str, str], ...] = (
        ("images", "The worst mistakes"),
        ("pixels", "The images of lowest mIoU"),
        ("patches", "The images of largest loss"),
    )


OF_A_MODEL = Words()
OF_TWO_MODELS = Words(
    row="A",
    column="B",
    taken="What A and B call differently",
    matrix="What A and B say",
    classes="Where along the model, or in which class",
    ignored="",
    worst=tuple((unit, "Where the two are furthest apart") for unit in ("images", "pixels", "patches")),
)


def page(evaluation: Evaluation, words: Words = OF_A_MODEL) -> str:
    """The whole page."""
    title = f"{evaluation.model} on {evaluation.data}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(in_words(evaluation.task))}, {evaluation.images:,} images</p>',
        _figures(evaluation),
        _notes(evaluation),
        _gallery(evaluation, words),
        _classes(evaluation, words),
        _confusions(evaluation, words),
        _settings(evaluation),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
{chr(10).join(part for part in parts if part)}
<script>{SCRIPT}</script>
</body></html>
"""


def _figures(evaluation: Evaluation) -> str:
    cards = "".join(
        f'<div class="card"><div class="name">{escape(figure.title)}</div><div class="value">{figure.shown()}</div>'
        f'<div class="interval">{figure.interval() or "no interval"}</div></div>'
        for figure in evaluation.figures
    )
    how = "Wilson for shares of images" if evaluation.unit == "images" else "a bootstrap over images"
    return f'<div class="cards">{cards}</div><p class="hint">Below each figure its 95% interval: {how}.</p>'


def _notes(evaluation: Evaluation) -> str:
    items = [*evaluation.notes, *(f"left out: {sentence}" for sentence in evaluation.left_out)]
    return f"<ul>{''.join(f'<li>{escape(item)}' for item in items)}</ul>" if items else ""


# The worst images -----------------------------------------------------------------------------------------------------


def _gallery(evaluation: Evaluation, words: Words) -> str:
    if not evaluation.worst:
        return ""
    wide = " wide" if any(len(worst.drawings) > 1 for worst in evaluation.worst) else ""
    figures = "".join(map(_shown, evaluation.worst))
    heading = f"<h2>{dict(words.worst)[evaluation.unit]}</h2>"
    return f'{heading}{_legend(evaluation, words)}<div class="gallery{wide}">{figures}</div>'


def _shown(worst: Worst) -> str:
    images = "".join(
        f'<div><img loading="lazy" alt="{escape(title or worst.text)}" width="{pixels.shape[1]}" '
        f'height="{pixels.shape[0]}" src="{as_data(pixels)}">{f"<span>{escape(title)}</span>" if title else ""}</div>'
        for title, pixels in worst.drawings
    )
    return (
        f'<figure><div class="row">{images}</div><figcaption>{escape(worst.text)}'
        f'<br><span class="file">{escape(worst.path)}</span></figcaption></figure>'
    )


def _legend(evaluation: Evaluation, words: Words) -> str:
    spans = "".join(
        f'<span><i style="background:rgb{colour}"></i>{escape(name)}</span>' for name, colour in evaluation.legend
    )
    ignored = f'<span><i style="background:#fff"></i>{words.ignored}</span>' if words.ignored else ""
    return f'<div class="legend">{spans}{ignored}</div>' if spans else ""


# Classes --------------------------------------------------------------------------------------------------------------


def _classes(evaluation: Evaluation, words: Words) -> str:
    if not evaluation.classes:
        return ""
    titles = [figure.title for figure in evaluation.classes[0].figures]
    head = "".join(f'<th data-sort="number">{escape(title)}<th>95% interval' for title in titles)
    rows = "".join(_row(row) for row in sorted(evaluation.classes, key=lambda row: row.figures[0].value))
    return (
        f"<h2>{words.classes}</h2><p class=hint>A click on a heading sorts.</p>"
        '<div class="scroll"><table class="classes"><thead><tr><th data-sort="number">class<th data-sort="text">name'
        f'<th data-sort="number">{escape(evaluation.unit)}{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _row(row: ClassRow) -> str:
    cells = "".join(_cell(figure) for figure in row.figures)
    return f"<tr><td>{row.index}<td>{escape(row.name)}<td data-value={row.count}>{row.count:,}{cells}</tr>"


def _cell(figure: Figure) -> str:
    """A figure over a bar of its length, and its interval."""
    value = 0.0 if figure.value != figure.value else figure.value
    return (
        f'<td class="bar" data-value="{value:.6f}" style="--share:{value:.4f}">{figure.shown()}'
        f'<td class="interval">{figure.interval()}'
    )


def _confusions(evaluation: Evaluation, words: Words) -> str:
    names = evaluation.names
    pairs = {number for true, predicted, _ in evaluation.confusions for number in (true, predicted)}
    classes = sorted(pairs | {row.index for row in evaluation.classes})
    if not evaluation.confusions:
        return ""
    if len(classes) <= MOST_IN_A_MATRIX:
        return _matrix(evaluation, classes, names, words)
    wrong = sorted((entry for entry in evaluation.confusions if entry[0] != entry[1]), key=lambda entry: -entry[2])
    rows = "".join(
        f"<tr><td>{escape(names[true])}<td>{escape(names[predicted])}<td>{count:,}</tr>"
        for true, predicted, count in wrong[:MOST_CONFUSIONS]
    )
    return (
        f'<h2>{words.taken}</h2><div class="scroll"><table class="narrow"><thead><tr><th>{words.row}<th>{words.column}'
        f"<th>{escape(evaluation.unit)}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _matrix(evaluation: Evaluation, classes: list[int], names: Sequence[str], words: Words) -> str:
    counts = {(true, predicted): count for true, predicted, count in evaluation.confusions}
    totals = {i: sum(count for (true, _), count in counts.items() if true == i) for i in classes}
    shares = evaluation.unit != "images"
    numbers = "shares of a row" if shares else "images, shades shares of a row"
    head = "".join(f'<th class="turned"><div>{escape(names[i])}</div>' for i in classes)
    body = "".join(
        f"<tr><th>{escape(names[i])}"
        + "".join(_entry(counts.get((i, j), 0), totals[i], i == j, shares) for j in classes)
        for i in classes
    )
    return (
        f"<h2>{words.matrix}</h2><p class=hint>Rows: {words.row}, columns: {words.column}; numbers are "
        f'{numbers}.</p><div class="scroll"><table class="matrix"><thead><tr>'
        f"<th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _entry(count: int, total: int, right: bool, as_share: bool) -> str:
    share = count / total if total else 0.0
    colour = "31,111,235" if right else "209,36,47"
    dark = ' class="dark"' if share > 0.55 else ""
    text = "" if not count else f"{share:.1%}" if as_share else f"{count:,}"
    return f'<td{dark} style="background:rgba({colour},{share:.3f})" title="{count:,}">{text}'


def _settings(evaluation: Evaluation) -> str:
    facts = {**evaluation.settings, "seconds": round(evaluation.seconds, 1)}
    rows = "".join(f"<dt>{escape(name)}<dd>{escape(value)}" for name, value in facts.items() if value is not None)
    return f"<h2>How it was measured</h2><dl>{rows}</dl>"
