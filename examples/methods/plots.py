"""One picture a miniature."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLOURS = ("#0f766e", "#c2410c", "#4f46e5", "#9ca3af", "#a16207")


def draw_picture(path: Path, title: str, fill: Callable[[Any], None], *, dpi: int = 110) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {
        "font.size": 9, "axes.edgecolor": GRID, "axes.labelcolor": MUTED, "axes.spines.top": False, "text.color": INK,
        "axes.spines.right": False, "xtick.color": MUTED, "ytick.color": MUTED, "legend.frameon": False,
    }  # fmt: skip
    with plt.rc_context(style):
        figure, axis = plt.subplots(figsize=(6.2, 3.4), dpi=dpi, layout="constrained")
        axis.grid(axis="y", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.set_title(title, fontsize=9, loc="left", wrap=True)
        fill(axis)
        figure.savefig(path)
        plt.close(figure)


def curves(axis: Any, runs: Sequence[dict[str, Any]], names: dict[str, str], x: str, y: str) -> None:
    """The mean over seeds of each curve [(x, y), ...], and every seed's in a thin line. names: curve -> label."""
    for colour, (name, label) in zip(COLOURS, names.items(), strict=False):
        places = [point[0] for point in runs[0][name]]
        for run in runs:
            axis.plot(places, [point[1] for point in run[name]], color=colour, alpha=0.25, linewidth=0.7)
        means = [statistics.fmean(run[name][i][1] for run in runs) for i in range(len(places))]
        axis.plot(places, means, color=colour, linewidth=1.8, label=label)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.legend()


def bars(axis: Any, runs: Sequence[dict[str, Any]], names: dict[str, str], y: str) -> None:
    """The mean over seeds of each number, and every seed's as a dot. names: number -> label."""
    for i, (name, label) in enumerate(names.items()):
        values = [run[name] for run in runs]
        axis.bar(i, statistics.fmean(values), width=0.6, color=COLOURS[i % len(COLOURS)], label=label)
        axis.scatter([i] * len(values), values, color=INK, s=8, zorder=3)
    axis.set_xticks(range(len(names)), list(names.values()))
    axis.set_ylabel(y)
