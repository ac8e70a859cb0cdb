"""Results as text, markdown, JSON and a bar chart."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from typing import Any

from ..files import atomic_write
from .contestants import label, version
from .low_precision import FLOAT32
from .measure import Result, Table
from .profile import Entry

COLUMNS = (
    "", "ms", "least ms", "time / first", "images/s", "GFLOP/s", "of the roof", "peak MB", "cold start s",
)  # fmt: skip
DIRECT = "GFLOP/s of segmentation are by the direct count; minibeit's algebra does fewer, so they may pass the roof."
TRAINED = (
    "A training step is forward, loss, backward and AdamW on all parameters, without dropout; GFLOP/s count two "
    "products in the backward for each of the forward, none for what is computed twice; the outputs that agree are the "
    "gradients of the patch embedding. With one image batch norms keep their running statistics."
)
BESIDE = " (and float32 in the first row)"
FORMAT = 1


def heading(table: Table) -> str:
    """What was measured, in one line."""
    roof = "" if table.roof is None else f", roof {table.roof / 1e9:.0f} GFLOP/s"
    return f"{table.workload.name}: {table.operations / 1e9:.1f} GFLOP, {table.threads} threads{roof}"


def rows(table: Table) -> list[tuple[str, ...]]:
    """The table's cells, without the header."""
    return [_row(table, result) for result in table.results]


def _row(table: Table, result: Result) -> tuple[str, ...]:
    first, rate = table.results[0], table.rate(result)
    return (
        label(result.name),
        _milliseconds(result.median),
        _milliseconds(min(result.times)),
        f"{result.median / first.median:.2f}",
        f"{table.workload.batch_size / result.median:.3g}",
        f"{rate / 1e9:.0f}",
        "" if table.roof is None else f"{100 * rate / table.roof:.0f} %",
        _megabytes(result),
        f"{sorted(result.cold_starts)[len(result.cold_starts) // 2]:.2f}" if result.cold_starts else "",
    )


def _megabytes(result: Result) -> str:
    """Memory of the device if a GPU computes, else of the process."""
    peak = result.peak_rss_bytes if result.peak_device_bytes is None else result.peak_device_bytes
    return "" if peak is None else f"{peak / 1e6:.0f}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 0.1 else f"{1000 * seconds:.3g}"


def footer(machine: dict[str, Any], tables: Sequence[Table]) -> list[str]:
    """The machine, the versions, and what the numbers mean."""
    names = list(dict.fromkeys(r.name for table in tables for r in table.results))
    versions = dict.fromkeys(", ".join(version(name) for name in names).split(", "))
    rounds = sorted({len(table.results[0].times) for table in tables})
    load = _range(machine.get("load_averages", ["?"]))
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, load {load}; {machine['time']}",
        f"Python {machine['python']}, {', '.join(versions)}",
        f"{tables[0].dtype}{BESIDE if FLOAT32 in names else ''}, random weights, medians of {_range(rounds)} rounds in "
        "which the contestants took turns in one process, after their outputs had been found to agree.",
        "The roof is what this CPU multiplies and adds from registers, on the same threads.",
    ]
    if "gpu" in machine:
        lines[-1] = (
            f"{machine['gpu']}; times by device events, from pixels to outputs in main memory; "
            "peak MB of the device's memory, as reserved."
        )
    if any(table.workload.task == "segmentation" for table in tables):
        lines.append(DIRECT)
    if any(table.workload.training for table in tables):
        lines.append(TRAINED)
    return lines + [f"{table.workload.name}: {line}" for table in tables for line in table.skipped]


def _range(values: Sequence[Any]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def markdown(machine: dict[str, Any], tables: Sequence[Table]) -> str:
    """One table of all workloads, as in the README."""
    lines = ["| work | contestant | " + " | ".join(COLUMNS[1:]) + " |", "|---|---" + "|--:" * (len(COLUMNS) - 1) + "|"]
    for table in tables:
        for i, row in enumerate(rows(table)):
            name = f"**{row[0]}**" if i == 0 else row[0]
            lines.append(f"| {table.workload.name if i == 0 else ''} | {name} | " + " | ".join(row[1:]) + " |")
    return "\n".join([*lines, "", *footer(machine, tables)])


def to_dict(machine: dict[str, Any], tables: Sequence[Table]) -> dict[str, Any]:
    """All results, with every single time."""
    return {"minibeit_bench": FORMAT, "machine": machine, "workloads": [table.to_dict() for table in tables]}


def write_json(path: str | os.PathLike[str], machine: dict[str, Any], tables: Sequence[Table]) -> None:
    """Writes `to_dict` to a file."""
    with atomic_write(path) as file:
        file.write((json.dumps(to_dict(machine, tables), indent=1) + "\n").encode())


def profile_rows(entries: dict[str, Entry], seconds: float) -> list[tuple[str, ...]]:
    """The cells of a profile, the header first."""
    lines = [("op", "served by", "calls", "ms", "share", "GFLOP/s")]
    rest = seconds - sum(entry.seconds for entry in entries.values())
    for name, e in entries.items():
        rate = f"{e.operations / e.seconds / 1e9:.0f}" if e.operations else ""
        lines.append(
            (name, e.origin, str(e.calls), f"{1000 * e.seconds:.2f}", f"{100 * e.seconds / seconds:.1f} %", rate)
        )
    return [*lines, ("everything else", "model", "", f"{1000 * rest:.2f}", f"{100 * rest / seconds:.1f} %", "")]


def check_plot() -> None:
    """Raises ImportError, naming the extra, if no chart can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('--plot needs matplotlib: pip install "minibeit[tutorials]"') from error


def write_plot(path: str | os.PathLike[str], machine: dict[str, Any], tables: Sequence[Table]) -> None:
    """Draws milliseconds per image as bars, one panel per workload; shorter is better."""
    check_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = [len(table.results) for table in tables]
    figure = Figure(figsize=(8, 0.9 + sum(0.32 * n + 0.75 for n in bars)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tables), 1, height_ratios=[n + 0.6 for n in bars], squeeze=False)[:, 0]
    for panel, table in zip(panels, tables, strict=True):
        B = table.workload.batch_size
        values = [1000 * result.median / B for result in table.results]
        names = [label(result.name) for result in table.results]
        colours = ["#c2410c" if name.startswith("minibeit") else "#64748b" for name in names]
        drawn = panel.barh(names, values, color=colours, height=0.72)
        panel.bar_label(
            drawn, [f"{v:.3g} ms" if v < 1000 else f"{v / 1000:.3g} s" for v in values], padding=4, fontsize=9
        )
        if table.roof is not None and table.workload.task != "segmentation":
            panel.axvline(1000 * table.operations / table.roof / B, color="#0f172a", linewidth=1, linestyle=":")
        panel.invert_yaxis()
        panel.set_xlim(0, 1.18 * max(values))
        panel.set_title(table.workload.name, fontsize=10, loc="left", fontweight="bold")
        panel.tick_params(labelsize=9, length=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(
        "milliseconds per image, shorter is better; dotted: as fast as this CPU can multiply and add\n"
        f"{tables[0].dtype}, {machine.get('gpu') or str(tables[0].threads) + ' threads, ' + machine['cpu']}",
        fontsize=9,
    )
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=130)
    with atomic_write(path) as file:
        file.write(memory.getvalue())
