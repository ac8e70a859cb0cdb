"""A report as one self-contained HTML file: no network, no fonts, no libraries; it opens from disk."""

from __future__ import annotations

import math

import numpy as np

from ..ops.table import ARITHMETIC, names_of
from ..text import html as escape
from .difference import ULP_EDGES, Difference
from .judging import Row
from .lockstep import Report
from .networks import summary
from .report_html_parts import SCRIPT, STYLE, heat_png
from .report_text import STATUS, times, verdict, worst

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 1080, 330, 58, 34, 14
HEAT_PIXELS = 230
FLOOR = 1e-9  # errors below are drawn at the foot of the plot
SERIES = (
    ("ours", "this implementation", "#1f6feb"),
    ("theirs", "yardstick", "#d97706"),
)


def html(report: Report) -> str:
    """The whole page."""
    title = f"minibeit verify: {report.candidate}"
    state = "good" if report.ok else "bad"
    rows = "\n".join(_row(i, row) for i, row in enumerate(report.rows))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="verdict {state}">{escape(verdict(report))}</p>
{_facts(report)}
<h2>Total error by depth</h2>
<p>Distance from the float64 run of the whole network, relative to the truth's root mean square. Dotted: one rounding of
float32, which no implementation can undercut for long.
Numbers below are those of the blocks; exact copies are left out.</p>
{_plot(report, "total")}
<h2>Own error by depth</h2>
<p>Distance from the float64 op fed with the implementation's own inputs: what each op adds by itself. Red marks are out
of budget.</p>
{_plot(report, "own")}
<h2>All arrays</h2>
<p><label><input type="checkbox" id="bad-only"> only what is not ok</label>
<input id="find" type="search" placeholder="name contains ..." aria-label="name contains"> A click on a row shows its
histogram and heat map.</p>
<div class="scroll"><table><thead><tr><th>array<th>shape<th>op<th>own error<th>x<th>total error<th>x<th>inherited
<th>cosine<th>verdict</tr></thead><tbody>
{rows}
</tbody></table></div>
<p class="foot">x: in units of {escape(report.yardstick)}'s error. Budget and names are explained in tutorial 04.</p>
<script>{SCRIPT}</script>
</body></html>
"""


def _facts(report: Report) -> str:
    inputs = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in report.inputs.items())
    facts = [
        ("yardstick", report.yardstick),
        ("model", f"{report.task}, {summary(report.config)}"),
        ("input", inputs),
        ("compared", f"{sum(row.own is not None for row in report.rows)} arrays in {report.seconds:.1f} s"),
    ]
    if report.origins:
        fast = sorted(op for op, origin in report.origins.items() if origin != "numpy" and op in names_of(ARITHMETIC))
        facts.append(("fast ops", ", ".join(fast) or "none"))
    return (
        "<dl>"
        + "".join(
            f"<dt>{escape(k)}<dd>{escape(v)}"
            for k, v in facts + [("note", n) for n in [*report.notes, report.blind] if n]
        )
        + "</dl>"
    )


# The plot -----------------------------------------------------------------------------------------------------------


def _plot(report: Report, which: str) -> str:
    rows = [row for row in report.rows if row.own is not None]
    if not rows:
        return "<p>Nothing was compared.</p>"
    series = {
        "ours": [_level(_errors(row, which)[0]) for row in rows],
        "theirs": [_level(_errors(row, which)[1]) for row in rows],
    }
    low, high = -9, max(-5, math.ceil(max(max(values) for values in series.values()) + 0.2))
    step = (WIDTH - LEFT - 12) / max(len(rows), 1)

    def at(i: int, level: float) -> tuple[float, float]:
        y = TOP + (high - level) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return LEFT + (i + 0.5) * step, min(max(y, TOP), HEIGHT - BOTTOM)

    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{which} error by depth">']
    for level in range(low, high + 1):
        y = at(0, level)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">1e{level}</text>')
    floor = at(0, math.log10(2.0**-24))[1]
    parts.append(f'<line class="floor" x1="{LEFT}" x2="{WIDTH - 12}" y1="{floor:.1f}" y2="{floor:.1f}"/>')
    parts += _block_marks(rows, step)
    for key, _, colour in reversed(SERIES):
        points = {i: at(i, level) for i, level in enumerate(series[key]) if level > low}  # exact copies have no error
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points.values())
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}"/>')
        for i, (x, y) in points.items():
            bad = key == "ours" and rows[i].status in ("own", "nan") if which == "own" else False
            fill, radius = ("#d1242f", 5) if bad else (colour, 2.4)
            value, ratio = _errors(rows[i], which)[0 if key == "ours" else 1], ""
            if key == "ours":
                ratio = (
                    f", {times(rows[i].own_ratio if which == 'own' else rows[i].total_ratio).strip()}x the yardstick"
                )
            hint = escape(f"{rows[i].name}: {value:.2e}{ratio}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}"><title>{hint}</title></circle>')
    parts.append("</svg>")
    names = {"ours": report.candidate, "theirs": report.yardstick}
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{escape(names[key])}</span>' for key, _, colour in SERIES
    )
    return f'<div class="legend">{legend}</div>' + "".join(parts)


def _block_marks(rows: list[Row], step: float) -> list[str]:
    """A thin line where each block begins, and its number."""
    parts, seen, free = [], set(), [0.0, 0.0]  # where each of two lines of labels is free again
    for i, row in enumerate(rows):
        part = _part(row.name)
        if not part or part in seen:
            continue
        seen.add(part)
        x = LEFT + i * step
        parts.append(f'<line class="block" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        line = 0 if free[0] <= x else 1
        free[line] = x + 7 * len(part) + 6
        y = HEIGHT - BOTTOM + 14 + 13 * line
        parts.append(f'<text class="tick" x="{min(x, WIDTH - 6 * len(part)) + 3:.1f}" y="{y}">{escape(part)}</text>')
    return parts


def _part(name: str) -> str:
    """What the plot calls the part of the network that an array belongs to: a block, a group of a tokenizer, a head."""
    words = name.split(".")
    if words[1:2] == ["groups"]:
        return f"{words[0][:3]} {words[2]}"
    return words[1] if words[0] == "encoder" else words[0] if len(words) > 1 else ""


def _errors(row: Row, which: str) -> tuple[float, float]:
    d, yard = (row.own, row.own_yard) if which == "own" else (row.total, row.total_yard)
    return (d.rms_rel if d else math.nan), (yard.shown if yard else math.nan)


def _level(error: float) -> float:
    if math.isnan(error):
        return math.log10(FLOOR)
    return math.log10(min(max(error, FLOOR), 1e3))


# The table ----------------------------------------------------------------------------------------------------------


def _row(i: int, row: Row) -> str:
    kind = "ok" if row.ok else "soft" if row.status == "total" else "hard"
    shape = "×".join(map(str, row.shape))
    if row.own is None or row.total is None:
        cells = "<td><td><td><td><td><td>"
    else:
        cells = (
            f"<td>{row.own.rms_rel:.1e}<td>{times(row.own_ratio)}<td>{row.total.rms_rel:.1e}<td>{times(row.total_ratio)}"
            f"<td>{row.inherited:.1e}<td>{row.total.cosine:.9f}"
        )
    head = (
        f'<tr class="{kind}" data-name="{escape(row.name)}" tabindex="0"><td>{escape(row.name)}<td>{shape}'
        f"<td>{escape(', '.join(row.ops))}{cells}<td>{STATUS[row.status]}</tr>"
    )
    return head + f'\n<tr class="more" hidden><td colspan="10">{_details(row)}</tr>'


def _details(row: Row) -> str:
    parts = [f"<p><b>{escape(row.note)}</b></p>"] if row.note else []
    if row.own is None or row.total is None:
        return "".join(parts) or "no numbers"
    parts.append('<div class="details">')
    parts.append(f"<div>{_numbers(row, row.own, row.total)}</div>")
    parts.append(f"<div>{_histogram(row.own)}</div>")
    if row.heat is not None and row.heat.size > 1:
        parts.append(f"<div>{_heat(row)}</div>")
    parts.append("</div>")
    return "".join(parts)


def _numbers(row: Row, own: Difference, total: Difference) -> str:
    lines = [
        ("dtype", row.dtype),
        ("budget, own", f"{row.own_limit:.1e}"),
        ("budget, total", f"{row.total_limit:.1e}"),
        ("largest own", worst(own)),
        ("largest total", worst(total)),
        ("largest relative, own", f"{own.max_rel:.1e}"),
        ("rms of the truth", f"{total.rms_truth:.3e}"),
        ("NaN, Inf", f"{own.nan_found}, {own.inf_found} here; {own.nan_truth}, {own.inf_truth} in the truth"),
    ]
    return "<table class=numbers>" + "".join(f"<tr><td>{k}<td>{escape(v)}" for k, v in lines) + "</table>"


def _histogram(d: Difference) -> str:
    """Own differences in units of the last place, as bars on a log scale."""
    labels = [*(f"≤{edge:g}" if edge < 1000 else f"≤{edge / 1024:g}k" for edge in ULP_EDGES), "more"]
    most = max(max(d.ulps), 1)
    bars = []
    for i, count in enumerate(d.ulps):
        height = 90 * math.log1p(count) / math.log1p(most)
        x = 6 + i * 34
        bars.append(
            f'<rect x="{x}" y="{100 - height:.1f}" width="26" height="{height:.1f}"><title>{count:,}</title></rect>'
            f'<text class="tick" x="{x + 13}" y="113" text-anchor="middle">{labels[i]}</text>'
        )
    svg = f'<svg class="bars" viewBox="0 0 {12 + 34 * len(d.ulps)} 120" role="img">{"".join(bars)}</svg>'
    return f"<p>own differences in units of the last place (heights logarithmic)</p>{svg}"


def _axes(row: Row) -> str:
    if row.name.endswith("probs"):
        return "query × key"
    if row.name.endswith(("query", "key", "value")):
        return "token × feature of a head"
    if row.name.endswith("bias_table"):
        return "row of the table × head"
    if row.name == "tokens":
        return "row × column"
    return {4: "row × column", 3: "token × feature", 2: "image × feature"}.get(len(row.shape), "last two axes")


def _heat(row: Row) -> str:
    heat = np.asarray(row.heat, np.float64)
    axes = _axes(row)
    scale = max(1.0, HEAT_PIXELS / max(heat.shape))
    size = f'width="{heat.shape[1] * scale:.0f}" height="{heat.shape[0] * scale:.0f}"'
    peak = float(np.nanmax(heat)) if np.isfinite(heat).any() else math.nan
    return (
        f"<p>largest own difference, {axes}; white 0, black {peak:.1e}</p>"
        f'<img {size} alt="heat map of {escape(row.name)}" src="data:image/png;base64,{heat_png(heat)}">'
    )
