"""The ops of extraction: topk, linear_topk, sample and linear_sample; no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.extraction_chunks import linear_extract, sample_rows, topk_rows
from potstill.ops.library import Op, no_second_derivative, register, side_of, wide

LINEAR = "Tensor hidden, Tensor weight, Tensor? bias"
HOW = "int chunk_rows, bool precise, str backend"
TOPK = "int k, float[] side, Tensor? tokens, float[] temperatures"
FOUND = (
    "(Tensor ids, Tensor log_probs, Tensor log_rest, Tensor lse, Tensor token_log_probs, Tensor token_ranks, "
    "Tensor log_rest_at)"
)
SAMPLE = "int n, float[] side, float temperature, int seed, int first_row"
DRAWN = "(Tensor ids, Tensor counts, Tensor log_probs, Tensor lse)"


def topk(
    logits: Tensor, k: int, side: list[float], tokens: Tensor | None, temperatures: list[float], backend: str
) -> tuple[Tensor, ...]:
    return topk_rows(logits, k, side_of(side), tokens, temperatures, backend)


def linear_topk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, side: list[float], tokens: Tensor | None,
    temperatures: list[float], chunk_rows: int, precise: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    def extract(piece: slice, logits: Tensor) -> tuple[Tensor, ...]:
        given = None if tokens is None else tokens[piece]
        return topk_rows(logits, k, side_of(side), given, temperatures, backend)

    return linear_extract(hidden, weight, bias, chunk_rows, precise, extract)


def sample(
    logits: Tensor, n: int, side: list[float], temperature: float, seed: int, first_row: int, backend: str
) -> tuple[Tensor, ...]:
    return sample_rows(logits, n, side_of(side), temperature, seed, first_row, backend)


def linear_sample(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, n: int, side: list[float], temperature: float, seed: int,
    first_row: int, chunk_rows: int, precise: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    def extract(piece: slice, logits: Tensor) -> tuple[Tensor, ...]:
        return sample_rows(logits, n, side_of(side), temperature, seed, first_row + piece.start, backend)

    return linear_extract(hidden, weight, bias, chunk_rows, precise, extract)


def _fake_topk(x: Tensor, k: int, tokens: Tensor | None, temperatures: list[float]) -> tuple[Tensor, ...]:
    n, dtype, given, more = x.shape[0], wide(x), tokens is not None, len(temperatures)
    return (
        x.new_empty(n, k, dtype=torch.int32), x.new_empty(n, k, dtype=dtype), x.new_empty(n, dtype=dtype),
        x.new_empty(n, dtype=dtype), x.new_empty(n if given else 0, dtype=dtype),
        x.new_empty(n if given else 0, dtype=torch.int32), x.new_empty(n if more else 0, more, dtype=dtype),
    )  # fmt: skip


def _fake_sample(x: Tensor, n: int) -> tuple[Tensor, ...]:
    rows, dtype = x.shape[0], wide(x)
    ids, counts = (x.new_empty(rows, n, dtype=torch.int32) for _ in range(2))
    return ids, counts, x.new_empty(rows, n, dtype=dtype), x.new_empty(rows, dtype=dtype)


for _op in (
    Op(
        "topk", f"(Tensor logits, {TOPK}, str backend) -> {FOUND}", topk,
        lambda x, k, side, tokens, temperatures, *_: _fake_topk(x, k, tokens, temperatures),
        no_second_derivative, None,
    ),
    Op(
        "linear_topk", f"({LINEAR}, {TOPK}, {HOW}) -> {FOUND}", linear_topk,
        lambda x, w, b, k, side, tokens, temperatures, *_: _fake_topk(x, k, tokens, temperatures),
        no_second_derivative, None,
    ),
    Op(
        "sample", f"(Tensor logits, {SAMPLE}, str backend) -> {DRAWN}", sample,
        lambda x, n, *_: _fake_sample(x, n), no_second_derivative, None,
    ),
    Op(
        "linear_sample", f"({LINEAR}, {SAMPLE}, {HOW}) -> {DRAWN}", linear_sample,
        lambda x, w, b, n, *_: _fake_sample(x, n), no_second_derivative, None,
    ),
):  # fmt: skip
    register(_op)
