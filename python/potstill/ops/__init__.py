"""torch.ops.potstill: importing registers every op."""

from potstill.ops import chunks, extraction, losses, parts, tokens  # noqa: F401
