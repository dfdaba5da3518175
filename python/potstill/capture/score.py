"""`potstill score`: a build that keeps the realised tokens' log-probabilities alone."""

from __future__ import annotations

import sys
from typing import Any

import click

from .command import _run
from .command import build as build_command

_FIXED = {"k": 0, "values": "fp32", "min_mass": 1.0, "temperatures": (), "token_log_probs": True, "xtok": False}


def _score(model: str, data: tuple[str, ...], out: str, **options: Any) -> None:
    try:
        finished = _run(model, data, out, {**options, **_FIXED})
        if finished:
            _summary(out)
    except (ValueError, TypeError, OSError) as e:
        raise click.ClickException(str(e)) from e
    if not finished:
        sys.exit(130)


def _summary(out: str) -> None:
    import numpy as np

    from .. import cache
    from ..methods.scoring import sequence_scores

    scored = cache.open(out)
    tokens = scored.num_tokens - len(scored)
    mean = sequence_scores(scored).sum() / max(1, tokens)
    click.echo(f"{tokens:,} predicted tokens: {mean:.4f} nats each, perplexity {np.exp(-mean):,.2f}")


score = click.Command(
    "score",
    callback=_score,
    params=[p for p in build_command.params if p.name not in _FIXED],
    help="""Write the log-probability of each token of DATA under MODEL, given those before it, into the cache OUT.

    The sums of sequences are read by potstill.methods.scoring: data selection, references of preference losses,
    perplexities. MODEL, DATA and stopping and continuing are as in `potstill build`.
    """,
)
