"""`potstill plan`: what a cache of a large teacher over much text costs, from parameters that are all arguments.

FLOPs a token = 2 * parameters + 2 * layers * hidden * length      (causal attention, half of the square on average)
tokens/s of a node = accelerators * peak * utilisation / FLOPs a token
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

# bytes of JSON a token at k = 64 (docs/servers.md), which grow with k
WIRE = {"vllm": 5296 / 64, "sglang": 2297 / 64}


@dataclass(frozen=True)
class Assumed:
    """One line of docs/scale.md each; rates are per process of one core unless they say otherwise."""

    tokens: float = 100e9
    parameters: float = 70e9
    layers: int = 80
    hidden: int = 8192
    length: int = 4096
    k: int = 64
    accelerators: int = 8  # a node
    peak: float = 989e12  # FLOP/s of one, dense bf16
    utilisation: float = 0.4
    bytes_per_token: float = 120.0
    shard_mb: int = 1024
    tokenised: float = 300e3  # tokens/s
    written: float = 125e3  # tokens/s
    decoded: float = 3e6  # tokens/s
    parsed: float = 4000.0  # tokens/s of a server's JSON
    server: str = "vllm"

    @property
    def flops(self) -> float:
        return 2 * self.parameters + 2 * self.layers * self.hidden * self.length

    @property
    def node_rate(self) -> float:
        """Tokens/s of the teacher on one node."""
        return self.accelerators * self.peak * self.utilisation / self.flops


def estimate(a: Assumed, nodes: int) -> dict[str, str]:
    """Row name -> what it is on so many nodes."""
    rate = nodes * a.node_rate
    seconds = a.tokens / rate
    bytes_ = a.tokens * a.bytes_per_token
    processes = nodes * a.accelerators
    wire = WIRE[a.server] * a.k
    return {
        "teacher, tokens/s": f"{rate:,.0f}",
        "time of the teacher": _time(seconds),
        "accelerator hours": f"{seconds / 3600 * processes:,.0f}",
        "cache": _bytes(bytes_),
        "files": f"{bytes_ / (a.shard_mb * 2**20):,.0f}",
        "sequences": f"{a.tokens / a.length:,.0f}",
        "written by a process": f"{_bytes(bytes_ / seconds / processes)}/s",
        "share of a core that encodes and writes": f"{rate / processes / a.written:.0%}",
        "time in which a process tokenises its share": _time(a.tokens / a.tokenised / processes),
        "from a server: requests/s": f"{rate / a.length:,.1f}",
        "from a server: JSON received": f"{_bytes(rate * wire)}/s",
        "from a server: processes that parse it": f"{rate / a.parsed:,.0f}",
        "read back in training: core hours an epoch": f"{a.tokens / a.decoded / 3600:,.1f}",
    }


def table(a: Assumed, nodes: tuple[int, ...]) -> str:
    """Markdown: a line a quantity, a column a number of nodes."""
    columns = [estimate(a, n) for n in nodes]
    heads = [f"{n} node{'s'[: n > 1]}" for n in nodes]
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(nodes)]
    lines += ["| " + " | ".join([name, *(c[name] for c in columns)]) + " |" for name in columns[0]]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds / 86400:,.1f} days" if seconds > 2 * 86400 else f"{seconds / 3600:,.1f} hours"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _options(command: Any) -> Any:
    for name, value in reversed(Assumed().__dict__.items()):
        kind: Any = click.Choice(list(WIRE)) if name == "server" else type(value)
        command = click.option(f"--{name.replace('_', '-')}", default=value, type=kind, show_default=True)(command)
    return command


@click.command()
@click.option("--nodes", multiple=True, type=click.IntRange(1), default=(1, 8, 64), show_default=True)
@_options
def plan(nodes: tuple[int, ...], **assumed: Any) -> None:
    """Say what a cache costs in time, bytes, files and requests; every assumption is an option."""
    if bad := [name for name, value in assumed.items() if not isinstance(value, str) and value <= 0]:
        raise click.ClickException(f"--{bad[0].replace('_', '-')} is {assumed[bad[0]]}: it must be above 0")
    click.echo(table(Assumed(**assumed), nodes))
