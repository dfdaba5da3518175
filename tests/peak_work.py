"""Prints the peak bytes of a forward and backward by (rows, vocabulary, low_memory); run in a process of its own."""

from __future__ import annotations

import json

import potstill as ps
import torch
from potstill.bench.measure import peak_bytes

CALLS = [(1024, 25_000, True), (1024, 100_000, True), (4096, 25_000, True), (1024, 100_000, False)]


def call(rows: int, vocab: int, low_memory: bool):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 16, generator=g).bfloat16().requires_grad_()
    weight, t_weight = (torch.randn(vocab, 16, generator=g).bfloat16() for _ in range(2))
    weight.requires_grad_()
    teacher = ps.HiddenTeacher(torch.randn(rows, 16, generator=g).bfloat16(), ps.Head(t_weight))
    return lambda: ps.linear_distill_loss(hidden, weight, teacher, low_memory=low_memory, chunk_rows=512).backward()


if __name__ == "__main__":
    torch.set_num_threads(1)
    call(8, 8, True)()  # libraries and thread pools are no part of a call's memory
    call(8, 8, False)()
    print(json.dumps([peak_bytes(call(*words)) for words in CALLS]))
