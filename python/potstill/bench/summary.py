"""The figures of a benchmark on one screen, as README.md shows them: ours, and beside it every rival's."""

from __future__ import annotations

from collections.abc import Callable

from potstill.bench.cases import FRESH
from potstill.bench.tables import Row, megabytes, ratio, table

Figure = tuple[
    str, Callable[[Row], float | None], Callable[[float], str], bool
]  # label, value, its print, more is better


def millions(rate: float) -> str:
    return f"{rate / 1e6:.2f} M"


SECTIONS: dict[str, tuple[Figure, ...]] = {
    "losses": (
        ("{case}: time over its matrix products alone", lambda r: r["over_floor"], ratio, False),
        ("its peak memory", lambda r: r["peak_bytes"], megabytes, False),
    ),
    "topk": (
        ("top-k with log-sum-exp, {case}: time over one read of the logits", lambda r: r["over_read"], ratio, False),
    ),
    "cache": (
        ("cache, {case}: bytes a token", lambda r: r["bytes_per_token"], "{:.0f}".format, False),
        ("its tokens/s decoded", lambda r: r["decode_tokens_per_second"], millions, True),
        ("at random, us for 1,000 tokens", lambda r: 1e9 / r["random_tokens_per_second"], "{:,.0f}".format, False),
        ("its tokens/s of two million written, synced", lambda r: r.get("long_tokens_per_second"), millions, True),
    ),
    "xtok": (("two tokenizers, {case}: M tokens/s a side", lambda r: r["value"], "{:.3g}".format, True),),
}


def summary(found: Row) -> str:
    """A line for each figure and case; every case of the losses, the first one of each other section."""
    lines = []
    for section, figures in SECTIONS.items():
        rows = [r for r in found.get(section, []) if r["variant"] not in (FRESH, "read")]
        cases = list(dict.fromkeys(r["case"] for r in rows))
        for case in cases if section == "losses" else cases[:1]:
            for label, value, say, up in figures:
                found_here = {r["variant"]: value(r) for r in rows if r["case"] == case}
                known = {name: x for name, x in found_here.items() if x is not None}
                ours = [x for name, x in known.items() if name.startswith("potstill")]
                others = {name: x for name, x in known.items() if not name.startswith("potstill")}
                ranked = sorted(others, key=lambda name: others[name], reverse=up)
                if ours:
                    beside = "; ".join(f"{name} {say(others[name])}" for name in ranked)
                    lines.append([label.format(case=case), say(ours[0]), beside])
    return table(["figure", "potstill", "others in the same run, best first"], lines)
