"""The sections of a benchmark as Markdown tables."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(x) + " |" for x in [head, ["---"] * len(head), *rows]])


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:,.0f} MB"


def losses(rows: list[Row]) -> str:
    head = ["loss, forward + backward", "variant", "time / GEMMs alone", "time / eager", "spread", "peak memory"]
    return table(head, [
        [r["case"], r["variant"], ratio(r["over_floor"]), ratio(r["over_eager"]), f"{r['spread']:.0%}",
         megabytes(r["peak_bytes"])]
        for r in rows
    ])  # fmt: skip


def divergences(rows: list[Row]) -> str:
    head = ["time over forward KL's", "divergence", "whole loss", "spread", "row kernel alone", "spread"]
    return table(head, [
        [r["case"], r["divergence"], ratio(r["loss_over_forward_kl"]), f"{r['loss_spread']:.0%}",
         ratio(r["kernel_over_forward_kl"]), f"{r['kernel_spread']:.0%}"]
        for r in rows
    ])  # fmt: skip


def precision(rows: list[Row]) -> str:
    head = [
        f"bf16 inputs, mean KL {rows[0]['kl']:.3f}",
        "error of the value",
        "of the hidden's gradient",
        "of the head's",
    ]
    return table(head, [
        [r["variant"], *(f"{r[x]:.1e}" for x in ("value_error", "hidden_gradient_error", "head_gradient_error"))]
        for r in rows
    ])  # fmt: skip


def memory(rows: list[Row]) -> str:
    head = ["memory beside inputs and gradients", "variant", "peak", "over the logit buffers of 256 rows"]
    return table(head, [[r["case"], r["variant"], megabytes(r["peak_bytes"]), ratio(r["over_buffers"])] for r in rows])


def topk(rows: list[Row]) -> str:
    """The rivals of the first case only; empty where a ratio does not apply."""
    head = ["top-k with log-sum-exp, one thread", "variant", "faster than torch", "time / one read",
            "time / Gaussian rows", "time / GEMM", "spread"]  # fmt: skip
    return table(head, [
        [r["case"], r["variant"], f"{r['speed_up']:.1f}x", ratio(r["over_read"]), ratio(r["over_gaussian"]),
         ratio(r["over_gemm"]), f"{r['spread']:.0%}"]
        for r in rows
        if r["variant"] == "potstill" or (r["variant"] != "read" and r["case"] == rows[0]["case"])
    ])  # fmt: skip


def xtok(rows: list[Row]) -> str:
    return table(["two tokenizers, one thread", "variant", "figure", "spread"], [
        [r["case"], r["variant"], f"{r['value']:.3g} {r['unit']}".strip(), f"{r['spread']:.0%}"] for r in rows
    ])  # fmt: skip


def cache(rows: list[Row]) -> str:
    return table(["cache", "variant", "bytes a token", "tokens/s decoded, one thread"], [
        [r["case"], r["variant"], f"{r['bytes_per_token']:.0f}",
         "" if r["tokens_per_second"] is None else f"{r['tokens_per_second'] / 1e6:.2f} M"]
        for r in rows
    ])  # fmt: skip


def tables(found: Row) -> str:
    """Every section that has rows, and what they were made on."""
    makers = dict(
        losses=losses, divergences=divergences, precision=precision, memory=memory, topk=topk, cache=cache, xtok=xtok
    )
    parts = [make(found[name]) for name, make in makers.items() if found.get(name)]
    m = found["machine"]
    made = f"Made on {m['cpu']}, {m['cores']} cores ({m['capability']}), torch {m['torch']}, potstill {m['potstill']}"
    others = "".join(f", {name} {version}" for name, version in m.get("rivals", {}).items())
    return "\n\n".join([*parts, made + others + "."])
