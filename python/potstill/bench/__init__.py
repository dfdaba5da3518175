"""`potstill bench`: the kernels beside their rivals in one process, checked before they are timed."""
