"""Sums of a loss's parts over steps, kept on the device: nothing is read back before a log asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Tally:
    """Running sums of named numbers.

    names: in the order of every vector added. Processes that share a tally's `take` must have equal names.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._sum: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """values [..., len(names)]; leading dimensions are summed. No host synchronisation."""
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        values = values.detach().reshape(-1, len(self.names)).sum(0, dtype=wide)
        self._sum = values if self._sum is None else self._sum + values

    def take(self, device: torch.device, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The sums, averaged over processes by one gather, and back to zero. A process that added nothing adds 0."""
        wide = torch.float32 if device.type == "mps" else torch.float64
        mine = torch.zeros(len(self.names), dtype=wide, device=device) if self._sum is None else self._sum
        self._sum = None
        means = gather(mine.to(device)[None]).reshape(-1, len(self.names)).mean(0).tolist()
        return dict(zip(self.names, means, strict=True))
