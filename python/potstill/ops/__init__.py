"""torch.ops.potstill: importing registers every op."""

from potstill.ops import extraction, losses, tokens  # noqa: F401
