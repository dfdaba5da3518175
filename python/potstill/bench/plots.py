"""Plots of a benchmark run, from its JSON: `python -m potstill.bench.plots out/bench docs/plots` draws them again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from potstill.bench.cases import FRESH

Row = dict[str, Any]
INK, GRID = "#1f2933", "#d9dee3"
COLOURS = {
    "potstill": "#b3541e", "eager": "#52606d", "torch": "#52606d", "torch.compile": "#3e7cb1",
    "Liger chunked": "#5b8c5a", "Liger chunked, compiled": "#98b06f", "TRL chunked": "#8f6bb3",
}  # fmt: skip
TAILS = {"bucket": "#b3541e", "drop": "#3e7cb1", "renormalize": "#52606d", "sampled": "#5b8c5a"}
MARKERS = dict(zip(COLOURS, "osD^v<>", strict=True))


def style(name: str) -> dict[str, Any]:
    return {"color": COLOURS.get(name, "#9aa5b1"), "marker": MARKERS.get(name, "x")}


COPIES = " on fp32 copies"


def finish(axes: Any, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def logarithmic(axes: Any) -> None:
    """Both axes: x in powers of two, y in decades, their ticks as plain numbers (512, 4k, 0.05)."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def lines(axes: Any, rows: list[Row], x: str, y: str, scale: float = 1.0) -> None:
    """One line a variant; percentiles as bars where the rows have them."""
    for name in dict.fromkeys(r["variant"] for r in rows):
        mine = sorted((r for r in rows if r["variant"] == name and r.get(y) is not None), key=lambda r: r[x])
        if not mine:
            continue
        xs, ys = [r[x] for r in mine], [r[y] * scale for r in mine]
        axes.plot(xs, ys, label=name, linewidth=1.5, markersize=4, **style(name))
        if y == "seconds" and "p20" in mine[0]:
            low, high = ([r[p] * scale for r in mine] for p in ("p20", "p80"))
            axes.fill_between(xs, low, high, color=style(name)["color"], alpha=0.15, linewidth=0)
    axes.legend(frameon=False, fontsize=8)


def bars(axes: Any, rows: list[Row], column: str) -> None:
    """Groups by case, one bar a variant."""
    cases, names = (list(dict.fromkeys(r[c] for r in rows)) for c in ("case", "variant"))
    there = {c: [n for n in names if any(r["case"] == c and r["variant"] == n for r in rows)] for c in cases}
    width = 0.8 / max(map(len, there.values()))
    for name in names:
        mine = {r["case"]: r[column] for r in rows if r["variant"] == name and r[column] is not None}
        at = [
            j + (there[case].index(name) - (len(there[case]) - 1) / 2) * width
            for j, case in enumerate(cases)
            if case in mine
        ]
        heights = [mine[case] for case in cases if case in mine]
        look = {"color": style(name.removesuffix(COPIES))["color"], "edgecolor": "white", "linewidth": 0}
        drawn = axes.bar(at, heights, width * 0.92, label=name, hatch="///" if name.endswith(COPIES) else None, **look)
        axes.bar_label(drawn, fmt="%.2f", fontsize=6, color=INK, padding=1)
    axes.set_xticks(range(len(cases)), [c.replace(", ", "\n", 1) for c in cases], fontsize=8)
    axes.legend(frameon=False, fontsize=8, ncols=min(4, len(names)), loc="upper center", bbox_to_anchor=(0.5, -0.12))
    axes.margins(y=0.1)


def over_gemms(section: str, title: str) -> Callable[[Any, Row], bool]:
    """Time over the matrix products alone, by case and variant of one section."""

    def make(figure: Any, found: Row) -> bool:
        rows = [r for r in found.get(section, []) if r["over_floor"] is not None and r["variant"] != FRESH]
        if not rows:
            return False
        axes = figure.subplots()
        bars(axes, rows, "over_floor")
        axes.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
        finish(axes, "", "time / matrix products alone", title)
        axes.grid(False, axis="x")
        return True

    return make


def memory(figure: Any, found: Row) -> bool:
    rows = found.get("memory", [])
    if not rows:
        return False
    forms = list(dict.fromkeys(r["form"] for r in rows))
    for axes, form in zip(figure.subplots(1, len(forms), squeeze=False)[0], forms, strict=True):
        lines(axes, [r for r in rows if r["form"] == form], "rows", "peak_bytes", 1e-9)
        axes.set_ylim(bottom=0)
        finish(axes, "rows (tokens)", "GB beside inputs and gradients", f"Peak memory, {form} teacher")
    return True


def topk(figure: Any, found: Row) -> bool:
    rows = [r for r in found.get("cost", []) if r["variant"] != "read"]
    if not rows:
        return False
    for axes, x in zip(figure.subplots(1, 2), ("vocab", "k"), strict=True):
        lines(axes, [r for r in rows if r["x"] == x], x, "over_read")
        logarithmic(axes)
        fixed = "k = 64" if x == "vocab" else "V = 151,936"
        finish(
            axes,
            {"vocab": "vocabulary"}.get(x, x),
            "time / one read of the logits",
            f"Top-k and log-sum-exp, {fixed}, fp32",
        )
    return True


def threads(figure: Any, found: Row) -> bool:
    rows = found.get("threads", [])
    if len({r["threads"] for r in rows}) < 2:
        return False
    axes = figure.subplots()
    for name in dict.fromkeys(r["variant"] for r in rows):
        mine = sorted((r for r in rows if r["variant"] == name), key=lambda r: r["threads"])
        xs, one = [r["threads"] for r in mine], mine[0]["seconds"]
        axes.plot(xs, [one / r["seconds"] for r in mine], label=name, linewidth=1.5, markersize=4, **style(name))
    counts = sorted({r["threads"] for r in rows})
    axes.plot(counts, counts, color=INK, linewidth=0.8, linestyle=":", label="ideal")
    axes.legend(frameon=False, fontsize=8)
    axes.set_xticks(counts)
    finish(axes, "threads", "times as fast as on one", "Scaling of the loss, cached top-64, SmolLM2's shape")
    return True


def roofline(figure: Any, found: Row) -> bool:
    """Achieved rate against arithmetic intensity of the matrix products, under the machine's measured ceilings."""
    ceiling = found.get("ceilings")
    rows = [r for name in ("losses", "models", "threads") for r in found.get(name, []) if r["dtype"] == "float32"]
    rows = [
        r for r in rows if r["variant"] in ("potstill", "eager") and r["threads"] == (ceiling or [{}])[0].get("threads")
    ]
    if not ceiling or not rows:
        return False
    peak, bandwidth = ceiling[0]["flops_per_second"], ceiling[0]["bytes_per_second"]
    axes = figure.subplots()
    reach = sorted([*(2.0**i for i in range(-2, 13)), peak / bandwidth])
    axes.plot(
        reach, [min(peak, i * bandwidth) / 1e9 for i in reach], color=INK, linewidth=1.2, label="measured ceilings"
    )
    for name in ("eager", "potstill"):
        points = [(*work(r), r["seconds"]) for r in rows if r["variant"] == name]
        xs, ys = [f / b for f, b, _ in points], [f / s / 1e9 for f, _, s in points]
        axes.plot(xs, ys, linestyle="", markersize=6, label=name, **style(name))
    logarithmic(axes)
    axes.legend(frameon=False, fontsize=8)
    finish(axes, "flop a byte of inputs and gradients", "Gflop/s", "Roofline of the loss, fp32")
    return True


def fidelity(figure: Any, found: Row) -> bool:
    rows = [r for r in found.get("fidelity", []) if r["case"] == "k and tail"]
    if not rows:
        return False
    axes = figure.subplots()
    for (name, colour), marker in zip(TAILS.items(), "osD^", strict=True):
        mine = [r for r in rows if r["variant"] == name]
        errors = [r["gradient_error"] for r in mine]
        axes.plot([r["k"] for r in mine], errors, label=name, color=colour, marker=marker, linewidth=1.5, markersize=4)
    logarithmic(axes)
    axes.legend(frameon=False, fontsize=8, title="tail", title_fontsize=8)
    finish(axes, "k", "error of the gradient / gradient", "Kept rows against whole ones, SmolLM2-135M, forward KL")
    return True


def gpu(figure: Any, found: Row) -> bool:
    """Time over the floor: a panel a kernel family, a horizontal bar a variant, below the name of its case."""
    rows = [r for r in found.get("gpu", []) if r.get("over_floor") is not None]
    if not rows:
        return False
    families = [[r for r in rows if r["kernel"] == kernel] for kernel in dict.fromkeys(r["kernel"] for r in rows)]
    heights = [len(family) + len({r["case"] for r in family}) for family in families]
    figure.set_size_inches(8, 0.19 * sum(heights) + 0.7 * len(families))
    panels = figure.subplots(len(families), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, family in zip(panels, families, strict=True):
        lines_: list[Row] = []
        for case in dict.fromkeys(r["case"] for r in family):
            lines_ += [{"variant": case}, *(r for r in family if r["case"] == case)]
        drawn = [(-i, r) for i, r in enumerate(lines_) if "over_floor" in r]
        bar = axes.barh([i for i, _ in drawn], [r["over_floor"] for _, r in drawn], 0.8, color="#9aa5b1")
        for patch, (_, r) in zip(bar, drawn, strict=True):
            patch.set_color(style(r["variant"])["color"])
        axes.bar_label(bar, fmt="%.2f", fontsize=6, color=INK, padding=2)
        axes.set_yticks([-i for i in range(len(lines_))], [r["variant"] for r in lines_], fontsize=6)
        for label, r in zip(axes.get_yticklabels(), lines_, strict=True):
            label.set_fontweight("normal" if "over_floor" in r else "bold")
        axes.axvline(1.0, color=INK, linewidth=0.8, linestyle=":")
        axes.margins(x=0.1)
        axes.set_ylim(0.5 - len(lines_), 0.5)
        finish(axes, "time / floor", "", family[0]["kernel"])
        axes.grid(False, axis="y")
    return True


def work(row: Row) -> tuple[float, float]:
    """(flop of the matrix products, bytes of inputs and gradients read or written once)."""
    t, d, teacher, v = (row[x] for x in ("rows", "hidden", "teacher_hidden", "vocab"))
    return 2.0 * t * v * (3 * d + teacher), 4.0 * (2 * d * (t + v) + teacher * (t + v))


FIGURES: dict[str, tuple[Callable[[Any, Row], bool], tuple[float, float]]] = {
    "losses": (over_gemms("losses", "Loss, forward and backward (1.00: the matrix products alone)"), (8, 3.6)),
    "models": (over_gemms("models", "Loss on the shapes of real models, 128 rows"), (8, 3.6)),
    "memory": (memory, (8, 3.2)), "topk": (topk, (8, 3.2)),
    "threads": (threads, (4.5, 3.4)), "roofline": (roofline, (5.5, 3.6)),
    "fidelity": (fidelity, (5.5, 3.6)), "gpu": (gpu, (9, 14)),
}  # fmt: skip


def draw(found: Row, folder: Path) -> list[Path]:
    """A PNG a figure whose section has rows; the files written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (make, size) in FIGURES.items():
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        if make(figure, found):
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1])
    return written


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    print(*draw(json.loads((source / "bench.json").read_text()), target), sep="\n")
