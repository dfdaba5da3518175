"""The demo's picture: the loss curve, what a cached token costs, what the fused loss saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
OURS, OTHER = "#0f766e", "#c9ced6"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 22,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes `path` (PNG) from the report of `potstill.demo.run.run`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(12.5, 7.2), dpi=140, facecolor="white")
        grid = figure.add_gridspec(
            2,
            3,
            left=0.06,
            right=0.975,
            top=0.80,
            bottom=0.085,
            hspace=0.62,
            wspace=0.32,
            height_ratios=[1.15, 1],
        )
        figure.text(0.06, 0.945, "potstill demo", fontsize=19, fontweight="bold")
        figure.text(0.06, 0.905, _subtitle(report), fontsize=10.5, color=MUTED)
        _curve(figure.add_subplot(grid[0, :2]), report)
        _held_out(figure.add_subplot(grid[0, 2]), report)
        _storage(figure.add_subplot(grid[1, 0]), report)
        _pair(figure.add_subplot(grid[1, 1]), report["loss_seconds"], "Time of one loss step", report, _seconds)
        _pair(
            figure.add_subplot(grid[1, 2]),
            report["loss_peak_bytes"],
            "Peak memory of one loss step",
            report,
            _bytes,
        )
        figure.savefig(path)
        plt.close(figure)


def _subtitle(r: dict[str, Any]) -> str:
    return (
        f"{r['teacher']} ({r['teacher_layers']} layers) → its every third layer ({r['student_layers']}), "
        f"{r['teacher_tokens']:,} cached tokens, top {r['k']} of {r['vocab_size']:,}, "
        f"{r['versions']['threads']} threads"
    )


def note(axis: Any, text: str) -> None:
    axis.text(0, 1.035, text, transform=axis.transAxes, color=MUTED, fontsize=9, va="bottom")


def _curve(axis: Any, r: dict[str, Any]) -> None:
    steps = [p["step"] for p in r["loss_curve"]]
    losses = [p["loss"] for p in r["loss_curve"]]
    axis.set_title("Training from the cache")
    note(axis, "fused sparse forward KL, nats a token")
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.plot(steps, losses, color=OURS, linewidth=2.2, solid_capstyle="round")
    axis.fill_between(steps, losses, color=OURS, alpha=0.08, linewidth=0)
    mark_end(axis, steps[-1], losses[-1], f"{losses[-1]:.2f}")
    axis.set_xlim(steps[0], steps[-1])
    axis.set_ylim(0, max(losses) * 1.08)
    axis.set_xlabel("optimiser step")
    axis.spines["left"].set_visible(False)
    axis.tick_params(length=0)


def mark_end(axis: Any, x: float, y: float, text: str) -> None:
    """A dot at a curve's last point and its value to the right of it, where no curve is."""
    axis.scatter([x], [y], color=OURS, s=28, zorder=3, clip_on=False)
    beside = {"textcoords": "offset points", "va": "center", "annotation_clip": False}
    axis.annotate(text, (x, y), (7, 0), fontweight="bold", color=OURS, **beside)


def _held_out(axis: Any, r: dict[str, Any]) -> None:
    values = [r["kl_before"], r["kl_after"]]
    axis.set_title("Held-out KL to the teacher")
    note(axis, f"exact, whole vocabulary; {1 - values[1] / values[0]:.0%} lower")
    bars = axis.bar(["before", "after"], values, color=[OTHER, OURS], width=0.58)
    axis.bar_label(bars, [f"{v:.2f}" for v in values], padding=3, fontweight="bold")
    axis.set_ylim(0, max(values) * 1.15)
    bare(axis)


def _storage(axis: Any, r: dict[str, Any]) -> None:
    names = ["potstill cache", f"torch.save of top {r['k']}", "raw fp32 logits"]
    values = [r["cache_bytes_per_token"], r["list_bytes_per_token"], r["raw_bytes_per_token"]]
    axis.set_title("Bytes per teacher token")
    note(axis, f"logarithmic; raw logits are {values[2] / values[0]:,.0f} times the cache")
    at = [2, 1, 0]
    axis.barh(at, values, color=[OURS, OTHER, OTHER], height=0.42)
    axis.set_xscale("log")
    axis.set_xlim(10, max(values) * 12)
    axis.set_ylim(-0.35, 2.75)
    for y, name, value in zip(at, names, values, strict=True):
        axis.text(10, y + 0.27, name, color=INK, fontsize=9.5, va="bottom")
        axis.annotate(f"{value:,.0f}", (value, y), (5, 0), textcoords="offset points", va="center", fontweight="bold")
    axis.xaxis.set_visible(False)
    axis.yaxis.set_visible(False)
    axis.spines[["left", "bottom"]].set_visible(False)


def _pair(axis: Any, values: dict[str, float], title: str, r: dict[str, Any], show: Any) -> None:
    ratio = values["eager"] / values["fused"]
    axis.set_title(title)
    said = f"{1 - 1 / ratio:.0%} less" if ratio >= 1 else f"{1 / ratio - 1:.0%} more"
    note(axis, f"{r['loss_shape']['rows']:,} rows × {r['vocab_size']:,}: {said}")
    bars = axis.bar(["eager PyTorch", "potstill"], [values["eager"], values["fused"]], color=[OTHER, OURS], width=0.58)
    axis.bar_label(bars, [show(values["eager"]), show(values["fused"])], padding=3, fontweight="bold")
    axis.set_ylim(0, max(values.values()) * 1.18)
    bare(axis)


def bare(axis: Any) -> None:
    axis.yaxis.set_visible(False)
    axis.spines["left"].set_visible(False)
    axis.tick_params(length=0)
    axis.tick_params(axis="x", labelcolor=INK)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
