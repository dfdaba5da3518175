"""Every op in plain torch: the oracle of the tests and the last-ranked backend, on any device.

In fp64 it is the truth that the other backends are held to.
"""

from potstill.reference import chunks, parts, rows, sample, tokens, topk  # noqa: F401
