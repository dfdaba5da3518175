"""CPU kernels over raw addresses (csrc/bindings.cpp); use them through potstill's ops.

A side is (address, row stride in elements, dtype 0 fp32 | 1 fp64 | 2 bf16 | 3 fp16, vocab, scale, softcap or 0).
An objective is (divergence, parameters, centre, temperature, distill_weight, ce_weight). An address of 0 means absent.
"""

_Side = tuple[int, int, int, int, float, float]
_Objective = tuple[str, list[float], float, float, float, float]

def dense_rows(
    rows: int, columns: int, student: _Side, teacher: _Side, coef: int, labels: int, objective: _Objective,
    grad: int, grad_stride: int, out: int, threads: int, /,
) -> None: ...  # fmt: skip
def sparse_rows(
    rows: int, columns: int, student: _Side, ids: int, log_probs: int, log_rest: int, weights: int, k: int, tail: int,
    coef: int, labels: int, objective: _Objective, grad: int, grad_stride: int, out: int, threads: int, /,
) -> None: ...  # fmt: skip
def topk(
    rows: int, logits: _Side, k: int, ids: int, log_probs: int, log_rest: int, lse: int, tokens: int,
    token_log_probs: int, token_ranks: int, temperatures: list[float], log_rest_at: int, threads: int, /,
) -> None: ...  # fmt: skip
def token_rows(
    rows: int, columns: int, logits: _Side, tokens: int, k: int, subset: int, results: tuple[int, int, int, int],
    incoming: tuple[int, int, int], grad: int, grad_stride: int, threads: int, /,
) -> None: ...  # fmt: skip
def chunk_sums(wide: bool, values: int, chunk: int, starts: int, ends: int, count: int, sums: int, /) -> None: ...
def chunk_gradient(wide: bool, grad: int, values: int, chunk: int, tokens: int, out: int, /) -> None: ...
def sample_rows(
    rows: int, logits: _Side, n: int, temperature: float, seed: int, first_row: int, ids: int, counts: int,
    log_probs: int, lse: int, threads: int, /,
) -> None: ...  # fmt: skip
def part(
    step: int, rows: int, columns: int, student: _Side, teacher: _Side, ids: int, entries: int, k: int,
    stats: tuple[int, int, int, int, int], coef: int, labels: int, objective: _Objective, grad: int, grad_stride: int,
    sums: int, threads: int, /,
) -> None:  # fmt: skip
    """step 0 log-sum-exp | 1 dense sums | 2 dense gradient | 3 sparse gradient; stats as in csrc/kernels.h."""

def divergences() -> dict[str, int]:
    """Compiled divergences and the number of their parameters."""

def compiled_isas() -> list[str]:
    """Instruction sets in this build, best first."""

def usable_isas() -> list[str]:
    """Those of them that this processor has, best first."""

def isa() -> str:
    """The instruction set in use."""

def use_isa(name: str, /) -> None:
    """Use another one (tests and benchmarks). Raises ValueError when it is not usable here."""
