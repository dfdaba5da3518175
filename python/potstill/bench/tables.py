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


def millions(row: Row, what: str) -> str:
    rate, width = row.get(f"{what}_tokens_per_second"), row.get(f"{what}_spread")
    return "" if rate is None or width is None else f"{rate / 1e6:.2f} M ({width:.0%})"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def cache(rows: list[Row]) -> str:
    head = ["cache, one thread (spread)", "variant", "bytes a token", "mean KL", "largest error", "tokens/s decoded",
            "at random, us for 1,000 tokens", "tokens/s of 40,000 written, synced", "two threads",
            "of two million written, synced", "two threads"]  # fmt: skip
    return table(head, [
        [r["case"], r["variant"], f"{r['bytes_per_token']:.1f}", f"{r['mean_kl']:.1e}", f"{r['max_error']:.3f}",
         millions(r, "decode"),
         f"{1e9 / r['random_tokens_per_second']:,.0f} ({r['random_spread']:.0%})",
         millions(r, "write"), times(r.get("two_threads_write")),
         millions(r, "long"), times(r.get("two_threads_long"))]
        for r in rows
    ])  # fmt: skip


def cost(rows: list[Row]) -> str:
    head = ["top-k by size, fp32, one thread", "faster than torch", "time / one read", "spread"]
    return table(head, [
        [r["case"], f"{r['speed_up']:.1f}x", ratio(r["over_read"]), f"{r['spread']:.0%}"]
        for r in rows if r["variant"] == "potstill"
    ])  # fmt: skip


def ceilings(rows: list[Row]) -> str:
    return table(["ceilings of the machine", "Gflop/s of fp32 products", "GB/s of a copy"], [
        [f"{r['threads']} threads", f"{r['flops_per_second'] / 1e9:.0f}", f"{r['bytes_per_second'] / 1e9:.1f}"]
        for r in rows
    ])  # fmt: skip


def fidelity(rows: list[Row]) -> str:
    """Gradient errors by k and tail, then bytes and errors by step."""
    by_k = [r for r in rows if r["case"] == "k and tail"]
    tails = list(dict.fromkeys(r["variant"] for r in by_k))
    errors = {(r["k"], r["variant"]): r["gradient_error"] for r in by_k}
    masses = {r["k"]: (r["mass_outside"], r["mass_outside_p90"]) for r in by_k if r.get("mass_outside") is not None}
    first = table(["k", "mass outside, mean", "90th percentile", *(f"gradient error, {tail}" for tail in tails)], [
        [str(k), *(f"{mass:.4f}" for mass in masses[k]), *(f"{errors[k, tail]:.3f}" for tail in tails)] for k in masses
    ])  # fmt: skip
    head = ["step, k = 64, bucket", "bytes a token", "KL to the exact rows", "largest error, nat", "gradient error"]
    second = table(head, [
        [r["variant"], f"{r['bytes_per_token']:.0f}", f"{r['stored_kl']:.1e}", f"{r['largest_error']:.4f}",
         f"{r['gradient_error']:.4f}"]
        for r in rows if r["case"] != "k and tail"
    ])  # fmt: skip
    return first + "\n\n" + second


def fidelity_tables(found: Row) -> str:
    rows = found["fidelity"]
    about = f"{rows[0]['rows']:,} rows, V = {rows[0]['vocab']:,}, KL to the student {rows[0]['kl']:.2f}."
    return f"{fidelity(rows)}\n\n{about}"


def tables(found: Row) -> str:
    """Every section that has rows, and what they were made on."""
    makers = dict(
        losses=losses, models=losses, threads=losses, ceilings=ceilings, divergences=divergences, precision=precision,
        memory=memory, topk=topk, cost=cost, cache=cache, xtok=xtok, fidelity=fidelity,
    )  # fmt: skip
    return "\n\n".join([*(make(found[name]) for name, make in makers.items() if found.get(name)), made_on(found)])


def made_on(found: Row) -> str:
    m = found["machine"]
    made = f"Made on {m['cpu']}, {m['cores']} cores ({m['capability']}), torch {m['torch']}, potstill {m['potstill']}"
    return made + "".join(f", {name} {version}" for name, version in m.get("rivals", {}).items()) + "."
