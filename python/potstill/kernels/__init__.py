"""Kernels: one backend x one op family a file. Each registers itself with potstill.dispatch."""
