"""Benchmark rows in long form: one record a measured quantity, columns as kernel benchmarks name them.

The columns hold those of Liger-Kernel's benchmark data (so its plotting works on ours), device, versions, commit.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label",
    "x_value", "y_value_20", "y_value_50", "y_value_80", "extra_benchmark_config_str", "gpu_name",
    "timestamp", "liger_version", "device", "cores",
    "torch", "triton", "driver", "python", "potstill", "commit", "threads", "repeats",
)  # fmt: skip
LABELS = {
    "rows": "rows (tokens)", "vocab": "vocabulary", "k": "k", "threads": "threads", "kl": "mean KL, nats",
    "tokens": "tokens",
}  # fmt: skip


def commit() -> str:
    """The commit of the tree that this package runs from, "-dirty" when it has changes; "" without git or a clone."""
    here = str(Path(__file__).parent)
    try:
        done = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def record(
    row: Row, kernel: str, mode: str, x: str, metric: str, unit: str, value: Any, config: tuple[str, ...]
) -> Row:
    """value: one number, or its (20th, 50th, 80th) percentiles."""
    low, middle, high = value if isinstance(value, tuple) else (value, value, value)
    extra = {name: row[name] for name in config if row.get(name) is not None and name != x}
    return {
        "kernel_name": kernel, "kernel_provider": row["variant"], "kernel_operation_mode": mode, "metric_name": metric,
        "metric_unit": unit, "x_name": x, "x_label": LABELS.get(x, x), "x_value": row[x], "y_value_20": low,
        "y_value_50": middle, "y_value_80": high, "extra_benchmark_config_str": json.dumps(extra, sort_keys=True),
        "threads": row.get("threads", ""), "repeats": row.get("repeats", ""),
    }  # fmt: skip


def milliseconds(row: Row) -> tuple[Any, ...]:
    """Percentiles; empty where a section does not keep them."""
    return tuple(1e3 * row[name] if name in row else "" for name in ("p20", "seconds", "p80"))


def of_losses(row: Row) -> Iterator[Row]:
    kernel, config = (
        f"linear_distill_loss_{row['form']}",
        ("rows", "hidden", "teacher_hidden", "vocab", "dtype", "model"),
    )
    x = row.get("x", "rows")
    yield record(row, kernel, "full", x, "speed", "ms", milliseconds(row), config)
    for metric, unit, column, scale in (
        ("memory", "MB", "peak_bytes", 1e-6),
        ("time_over_gemms", "ratio", "over_floor", 1),
        ("time_over_eager", "ratio", "over_eager", 1),
    ):
        if row.get(column) is not None:
            yield record(row, kernel, "full", x, metric, unit, row[column] * scale, config)


def of_memory(row: Row) -> Iterator[Row]:
    kernel, config = f"linear_distill_loss_{row['form']}", ("hidden", "teacher_hidden", "vocab", "dtype")
    yield record(row, kernel, "full", "rows", "memory", "MB", row["peak_bytes"] / 1e6, config)


def of_divergences(row: Row) -> Iterator[Row]:
    row = {**row, "variant": row["divergence"]}
    config = ("hidden", "teacher_hidden", "vocab", "dtype")
    for kernel, column in (("linear_distill_loss", "loss"), ("distill_loss", "kernel")):
        value = row[f"{column}_over_forward_kl"]
        yield record(row, f"{kernel}_{row['form']}", "full", "rows", "time_over_forward_kl", "ratio", value, config)


def of_precision(row: Row) -> Iterator[Row]:
    for metric in ("value_error", "hidden_gradient_error", "head_gradient_error"):
        yield record(row, "linear_distill_loss_dense", "full", "kl", metric, "relative", row[metric], ("vocab", "rows"))


def of_topk(row: Row) -> Iterator[Row]:
    kernel, config = row.get("kernel", "topk"), ("kind", "dtype", "k", "vocab", "rows")
    yield record(row, kernel, "forward", row.get("x", "vocab"), "speed", "ms", milliseconds(row), config)
    for metric, column in (("time_over_read", "over_read"), ("speed_up_over_torch", "speed_up")):
        if row.get(column) is not None:
            yield record(row, kernel, "forward", row.get("x", "vocab"), metric, "ratio", row[column], config)


def of_gpu(row: Row) -> Iterator[Row]:
    if "seconds" not in row:
        return
    config = ("vocab", "hidden", "k", "dtype", "kind")
    yield record(row, row["kernel"], row["mode"], "rows", "speed", "ms", milliseconds(row), config)
    if row.get("over_floor") is not None:
        yield record(row, row["kernel"], row["mode"], "rows", "time_over_floor", "ratio", row["over_floor"], config)
    if row.get("peak_bytes") is not None:
        yield record(row, row["kernel"], row["mode"], "rows", "memory", "MB", row["peak_bytes"] / 1e6, config)


def of_figures(kernel: str) -> Any:
    """For sections whose rows hold a "case" and one or more numbers by name."""

    def each(row: Row) -> Iterator[Row]:
        row = {"tokens": row.get("tokens", ""), **row}
        for name, value in row.items():
            if isinstance(value, (int, float)) and name not in ("tokens", "spread", "repeats"):
                unit = row.get("unit", "") if name == "value" else ""
                yield record(row, kernel, "forward", "tokens", name, unit, value, ("case",))

    return each


MAKERS = {
    "losses": of_losses, "models": of_losses, "threads": of_losses, "memory": of_memory,
    "divergences": of_divergences, "precision": of_precision, "gpu": of_gpu, "topk": of_topk, "cost": of_topk,
    "cache": of_figures("cache"), "xtok": of_figures("xtok"),
}  # fmt: skip


def records(found: Row) -> list[Row]:
    """Every section of a run as records with COLUMNS, in order."""
    machine = found["machine"]
    rivals = machine.get("rivals", {})
    common = {
        "gpu_name": machine.get("gpu", ""), "device": machine.get("gpu") or machine["cpu"], "cores": machine["cores"],
        "torch": machine["torch"], "triton": machine.get("triton", ""), "driver": machine.get("driver", ""),
        "python": machine.get("python", ""), "potstill": machine["potstill"], "commit": commit(),
        "liger_version": rivals.get("liger-kernel", ""),
        "timestamp": datetime.now(timezone.utc).isoformat("T", "seconds"),
    }  # fmt: skip
    made = [{**r, **common} for name, make in MAKERS.items() for row in found.get(name, []) for r in make(row)]
    return [{column: r[column] for column in COLUMNS} for r in made]
