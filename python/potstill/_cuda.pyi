"""CUDA kernels over raw device addresses (csrc/cuda_bindings.cpp); use them through potstill's ops.

Sides and objectives are those of _cpp.pyi; a gradient is (address, row stride in elements, dtype). An address of 0
means absent. coef, log_probs, log_rest and out are fp32, ids and labels int64. A launch that fails raises RuntimeError.
"""

_Side = tuple[int, int, int, int, float, float]
_Objective = tuple[str, list[float], float, float, float, float]
_Grad = tuple[int, int, int]

def dense_rows(
    rows: int, columns: int, student: _Side, teacher: _Side, coef: int, labels: int, objective: _Objective,
    grad: _Grad, out: int, stream: int, /,
) -> None: ...  # fmt: skip
def sparse_rows(
    rows: int, columns: int, student: _Side, ids: int, log_probs: int, log_rest: int, weights: int, k: int, tail: int,
    coef: int, labels: int, objective: _Objective, grad: _Grad, out: int, stream: int, /,
) -> None: ...  # fmt: skip
def topk(
    rows: int, logits: _Side, k: int, ids: int, log_probs: int, log_rest: int, lse: int, tokens: int,
    token_log_probs: int, token_ranks: int, temperatures: list[float], log_rest_at: int, stream: int, /,
) -> None:  # fmt: skip
    """ids and token_ranks are int32, tokens int64, the rest fp32; log_rest_at is [temperatures, rows], of at most 4."""

def divergences() -> dict[str, int]:
    """Compiled divergences and the number of their parameters."""

def architectures() -> list[tuple[int, int]]:
    """Compute capabilities whose machine code is in this build."""
