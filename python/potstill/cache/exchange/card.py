"""A dataset card: README.md with the YAML header that dataset hubs read, made of what the cache says of itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import potstill.cache as caches
from potstill import __version__
from potstill.cache.statistics import distributions

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
         (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip
ERRORS = {"plain": "2^-11 of each log-probability", "bf16_logits": "none: the teacher's bf16 logits, bit for bit",
          "fp16": "2^-11 of each log-probability", "fp32": "none"}  # fmt: skip


def clean(text: Any) -> str:
    """Free text for a table cell: one line, no markup that could break out of it."""
    line = "".join(c if c.isprintable() else " " for c in str(text))  # direction marks would reorder the page
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", line).strip()


def bound(values: str) -> str:
    return ERRORS.get(values) or f"at most {eval_step(values) / 2:g} nat of each log-probability"


def eval_step(values: str) -> float:
    above, _, below = values.partition("/")
    return int(above) / int(below)


def size_category(sequences: int) -> str:
    return next((name for most, name in SIZES if sequences < most), "n>1B")


def card(
    path: Path, *, title: str = "", license: str = "", language: str = "", text: str = "", rows: int = 8192
) -> str:
    """The card of the cache at `path`. title, license (a hub's identifier), language and text (Markdown, put first)
    are the author's; all else is read from the cache."""
    cache = caches.open(path)
    spec = cache.spec
    seen = distributions(cache, rows)
    header: dict[str, Any] = {"pretty_name": title or path.absolute().name}
    header |= {"license": license} if license else {}
    header |= {"language": [part.strip() for part in language.split(",")]} if language else {}
    header |= {
        "tags": ["knowledge-distillation", "teacher-log-probabilities", "potstill"],
        "size_categories": [size_category(len(cache))],
    }
    # JSON strings and lists are YAML too
    yaml = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in header.items())
    facts = {
        "teacher": spec.teacher or "not recorded",
        "teacher revision": spec.teacher_revision or "not recorded",
        "tokenizer": spec.tokenizer or "not recorded",
        "vocabulary": f"{spec.vocab_size:,}",
        "entries a row": f"{spec.k:,} at most, {seen.get('entries', {}).get('median', 0):g} in the median",
        "sequences, tokens": f"{len(cache):,}, {cache.num_tokens:,}",
        "bytes": f"{cache.num_bytes:,} ({cache.num_bytes / max(cache.num_tokens, 1):.1f} a token)",
        "values": f"{spec.values}; error: {bound(spec.values)}",
        "further columns": ", ".join(further(spec)) or "none",
        **{f"extra: {name}": json.dumps(value) for name, value in spec.extra.items()},
    }
    lines = [f"| {clean(name)} | {clean(value)} |" for name, value in facts.items()]
    shown = {
        "token_log_probs": "log-probability of a token",
        "first_probability": "probability of the first entry",
        "mass_outside": "mass outside the entries",
        "entropy": "entropy, nats",
        "mass_error": "distance of a row's mass from 1",
    }
    measured = [
        f"| {label} | " + " | ".join(f"{seen[name][q]:.3g}" for q in ("median", "p90", "p99", "max")) + " |"
        for name, label in shown.items()
        if seen.get(name)
    ]
    return "\n".join([
        "---", yaml, "---", "", f"# {clean(header['pretty_name'])}", "",
        *([text.strip(), ""] if text else []),
        *what_rows_are(spec), "Read with "
        "[potstill](https://pypi.org/project/potstill/):", "",
        "```python", "import potstill as ps", "", 'cache = ps.cache.open("PATH")',
        "rows = cache.batch(keys, tokens=token_lists)  # refuses rows of other tokens", "```", "",
        "| | |", "|---|---|", *lines, "",
        f"Over {seen['rows']:,} rows:", "",
        "| | median | p90 | p99 | max |", "|---|---|---|---|---|", *measured, "",
        "Every byte is checked when it is read; `potstill verify --deep` checks all.",
        f"Written by potstill {__version__}.", "",
    ])  # fmt: skip


def what_rows_are(spec: caches.Spec) -> list[str]:
    if spec.k == 0:
        return ["Log-probabilities of the tokens of texts under a teacher, over the full vocabulary at temperature 1.",
                "Row i is that of token i + 1 after tokens 0 to i."]  # fmt: skip
    return ["Top-k log-probabilities of a teacher, one row a token, over the full vocabulary at temperature 1, with",
            "the log mass outside them. Row i is the distribution of the token after tokens 0 to i."]  # fmt: skip


def further(spec: caches.Spec) -> list[str]:
    others = [f"log_rest at temperature {t:g}" for t in spec.temperatures if t != 1.0]
    others += ["draws of each entry"] if spec.sampled else []
    others += ["the realised token's log-probability"] if spec.token_log_probs else []
    return others + (["log-sum-exp of the logits"] if spec.values == "bf16_logits" else [])
