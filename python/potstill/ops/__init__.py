"""torch.ops.potstill: importing registers every op."""

from potstill.ops import extraction, losses, tokens  # noqa: F401
from potstill.ops import extraction, losses, parts  # noqa: F401
