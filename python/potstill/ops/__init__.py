"""torch.ops.potstill: importing registers every op."""

from potstill.ops import extraction, losses  # noqa: F401
