"""The picture of the demo across tokenizers: the chunk loss, and the bits a byte of held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from potstill.demo.plot import INK, MUTED, OTHER, OURS, STYLE, bare, mark_end, note


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes `path` (PNG) from the report of `potstill.demo.xtok.run`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(12.5, 4.6), dpi=140, facecolor="white")
        grid = figure.add_gridspec(1, 3, left=0.06, right=0.975, top=0.68, bottom=0.13, wspace=0.38)
        figure.text(0.06, 0.91, "potstill demo --xtok", fontsize=19, fontweight="bold")
        figure.text(0.06, 0.845, _subtitle(report), fontsize=10.5, color=MUTED)
        _curve(figure.add_subplot(grid[0, 0]), report["loss_curve"], "loss", "Training from the cache",
               "chunk likelihoods (ALM), forward KL of coins")  # fmt: skip
        _curve(figure.add_subplot(grid[0, 1]), report["bits_curve"], "bits_per_byte", "Held-out text",
               f"bits a byte, {report['held_out_bytes']:,} bytes")  # fmt: skip
        _bars(figure.add_subplot(grid[0, 2]), report)
        figure.savefig(path)
        plt.close(figure)


def _subtitle(r: dict[str, Any]) -> str:
    return (
        f"{r['teacher']} ({r['teacher_vocabulary']:,} tokens) → a model of bytes with "
        f"{r['student_parameters'] / 1e6:.1f} M parameters; {r['teacher_tokens']:,} cached tokens at "
        f"{r['cache_bytes_per_token']:.1f} bytes, {r['total_seconds']:.0f} s"
    )


def _curve(axis: Any, points: list[dict[str, float]], name: str, title: str, said: str) -> None:
    steps, values = [p["step"] for p in points], [p[name] for p in points]
    axis.set_title(title)
    note(axis, said)
    axis.plot(steps, values, color=OURS, linewidth=2.0)
    mark_end(axis, steps[-1], values[-1], f"{values[-1]:.3g}")
    axis.set_xlim(steps[0], steps[-1])
    axis.set_ylim(0, max(values) * 1.08)
    axis.set_xlabel("optimiser step")
    axis.tick_params(length=0)


def _bars(axis: Any, r: dict[str, Any]) -> None:
    names = ["before", "after", "teacher"]
    values = [r["bits_per_byte_before"], r["bits_per_byte_after"], r["teacher_bits_per_byte"]]
    axis.set_title("Bits a byte, held out")
    note(axis, "the teacher reads tokens, the student bytes")
    bars = axis.bar(names, values, color=[OTHER, OURS, INK], width=0.58)
    axis.bar_label(bars, [f"{v:.2f}" for v in values], padding=3, fontweight="bold")
    axis.set_ylim(0, max(values) * 1.15)
    bare(axis)
