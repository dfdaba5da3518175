"""Losses across tokenizers on one thread: ULD beside full sorts, ALM beside whole logits, merged groups by length."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from potstill.bench import fidelity
from potstill.bench.measure import Variant, in_turns, peak_in_process, spread
from potstill.extraction import topk
from potstill.teachers import Head
from potstill.xtok import Aligner, VocabBytes, alm, merged_rows, next_token_log_probs, uld

Row = dict[str, Any]
KEPT = 128  # entries of each side that ULD sorts


def figure(case: str, variant: str, unit: str, value: float, seconds: list[float]) -> Row:
    return {"case": case, "variant": variant, "value": value, "unit": unit, "spread": spread(seconds)}


def states(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The student's last hidden states [rows, D], its head [V, D], and the teacher's logits [rows, V]: SmolLM2 with and
    without two layers, on held-out text (`fidelity`)."""
    heads = []

    def run(model: Any, ids: Tensor) -> Tensor:
        heads.append(model.lm_head.weight.detach())
        return model.model(input_ids=ids).last_hidden_state

    teacher, student = fidelity.both(run, rows)
    return student, heads[0], teacher @ heads[0].T


def drawn(rows: int, vocab: int, hidden: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """The same in random numbers."""
    g = torch.Generator().manual_seed(0)
    state, weight = torch.randn(rows, hidden, generator=g), torch.randn(vocab, hidden, generator=g) / hidden**0.5
    return state, 3 * weight, 3 * torch.randn(rows, vocab, generator=g)


def uld_rows(repeats: int, state: Tensor, weight: Tensor, teacher: Tensor, what: str) -> list[Row]:
    """The loss of given logits, and forward and backward from hidden states: top-128 against full sorts."""
    student = state @ weight.T
    x, w = state.clone().requires_grad_(), weight.clone().requires_grad_()

    def given() -> Tensor:
        q, p = (topk(z, KEPT).log_probs.exp() for z in (student, teacher))
        return (q - p).abs().sum(-1) + (q.sum(-1) - p.sum(-1)).abs()

    def ours() -> Tensor:
        loss = uld.uld_loss(x, Head(w), topk(teacher, KEPT), reduction="sum")
        torch.autograd.grad(loss, (x, w))
        return loss.detach()

    def sorts() -> Tensor:
        loss = uld.uld_full(x @ w.T, teacher).sum()
        torch.autograd.grad(loss, (x, w))
        return loss.detach()

    full = uld.uld_full(student, teacher)
    off = float((given() - full).abs().mean() / full.mean())
    apart = abs(float(ours() / given().sum()) - 1)
    if off > 0.05 or apart > 1e-3:
        raise AssertionError(f"ULD is {off:.2g} off the full sort and {apart:.2g} off itself; nothing was timed")
    out = []
    cases: dict[str, dict[str, Variant]] = {
        "loss of given logits": {"full sort": lambda: uld.uld_full(student, teacher), "potstill": given},
        "forward + backward through the head": {"full sort": sorts, "potstill": ours},
    }
    for case, calls in cases.items():
        seconds = in_turns(calls, repeats)
        base = median(seconds["full sort"])
        out += [figure(f"ULD, {what}, {case}", n, "x full sort", base / median(t), t) for n, t in seconds.items()]
    return [*out, figure(f"ULD, {what}", f"top-{KEPT}, relative error", "", off, [1.0])]


def alm_calls(rows: int, vocab: int, hidden: int) -> dict[str, Any]:
    """ALM forward and backward from hidden states, and by whole logits; one chunk for every two tokens."""
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(rows, hidden, generator=generator).requires_grad_()
    weight = (torch.randn(vocab, hidden, generator=generator) / hidden**0.5).requires_grad_()
    ids = torch.randint(vocab, (rows,), generator=generator)
    tokens = VocabBytes.from_callback(3, [b"a", b"aa", b"b"].__getitem__)
    n = rows // 2
    alignment = Aligner(tokens, tokens)([0, 0] * n, [1] * n)
    teacher = -torch.rand(n, generator=generator)

    def ours() -> float:
        loss = alm.linear_alm_loss(state, Head(weight), ids, teacher, alignment)
        torch.autograd.grad(loss, (state, weight))
        return float(loss.detach())

    def plain() -> float:
        table = (state @ weight.T).log_softmax(-1)
        found = torch.cat([table.new_zeros(1), table[:-1].gather(1, ids[1:, None])[:, 0]])
        loss = alm.alm_loss(found, teacher, alignment, chunk_mask=alm.predicted_chunks(alignment))
        torch.autograd.grad(loss, (state, weight))
        return float(loss.detach())

    return {"potstill": ours, "whole logits": plain}


def alm_rows(repeats: int, rows: int, vocab: int, hidden: int) -> list[Row]:
    calls = alm_calls(rows, vocab, hidden)
    values = {name: call() for name, call in calls.items()}
    if abs(values["potstill"] - values["whole logits"]) > 1e-4 * abs(values["whole logits"]):
        raise AssertionError(f"ALM gives {values}; nothing was timed")
    seconds = in_turns(calls, repeats)
    case, base = f"ALM, {rows:,} tokens, V={vocab:,}, forward + backward", median(seconds["whole logits"])
    return [figure(case, name, "x whole logits", base / median(taken), taken) for name, taken in seconds.items()]


def alm_memory(lengths: tuple[int, ...], vocab: int, hidden: int) -> list[Row]:
    """Peak beside inputs and gradients, as a share of the [tokens, V] fp32 logits that are never held."""
    out = []
    for rows in lengths:
        shape = dict(rows=rows, vocab=vocab, hidden=hidden, choose="potstill")
        peak = peak_in_process("potstill.bench.xtok_losses:alm_calls", shape, 1)
        share = (peak - 4 * hidden * (rows + vocab)) / (4 * rows * vocab)
        case = f"ALM, {rows:,} tokens, V={vocab:,}, memory"
        out.append(figure(case, "potstill", "% of one logits buffer", 100 * share, [1.0]))
    return out


def groups(tokens: int, vocab: int, hidden: int) -> tuple[Any, ...]:
    """(alignment, student states, head, ids, teacher logits, teacher's token log-probabilities): chunks of 3 student
    tokens and 2 of the teacher's."""
    g = torch.Generator().manual_seed(0)
    pieces = VocabBytes.from_callback(3, [b"a", b"aa", b"aaa"].__getitem__)
    n = tokens // 3
    alignment = Aligner(pieces, pieces)([0, 1, 1] * n, [1, 2] * n)
    ids = torch.randint(vocab, (3 * n,), generator=g)
    state, weight = torch.randn(3 * n, hidden, generator=g), torch.randn(vocab, hidden, generator=g)
    logits = torch.randn(2 * n, vocab, generator=g)
    return alignment, state.requires_grad_(), Head(weight), ids, logits, -torch.rand(2 * n, generator=g)


def merged(alignment: Any, state: Tensor, head: Head, ids: Tensor, logits: Tensor, teacher: Tensor) -> Tensor:
    """Forward and backward of ULD over merged rows; [M]."""
    log_probs = next_token_log_probs(state, head, ids, alignment.student_ptr)
    assert isinstance(log_probs, Tensor)
    pairs = merged_rows(alignment, log_probs, teacher)
    scales = pairs.student_scale, pairs.teacher_scale
    rows = topk(logits[pairs.teacher], KEPT)
    loss = uld.uld_loss(state[pairs.student], head, rows, scales=scales, reduction="none")  # type: ignore[arg-type]
    torch.autograd.grad(loss.sum(), state)
    return loss.detach()


def merged_figures(repeats: int, lengths: tuple[int, ...], vocab: int, hidden: int = 32) -> list[Row]:
    """Time a token of the loss over merged groups, at several lengths of one row."""
    alignment, state, head, ids, logits, teacher = groups(30, vocab, hidden)
    with torch.no_grad():
        q, p = (z.double().log_softmax(-1) for z in (state @ head.weight.T, logits))
        own = torch.cat([q.new_zeros(1), q[:-1].gather(1, ids[1:, None])[:, 0]])
        want = []
        for s0, s1, t0, t1 in alignment.chunks(0)[1:]:
            sides = (q[s0 - 1] + own[s0 + 1 : s1].sum(), p[t0 - 1] + teacher[t0 + 1 : t1].double().sum())
            a, b = (side.exp().sort(descending=True).values for side in sides)
            want.append((a[:KEPT] - b[:KEPT]).abs().sum() + (a[KEPT:].sum() - b[KEPT:].sum()).abs())
    got = merged(alignment, state, head, ids, logits, teacher)
    if (got - torch.stack(want)).abs().max() > 1e-4:
        raise AssertionError("the loss over merged groups is not that of its formula; nothing was timed")
    sizes = {tokens: groups(tokens, vocab, hidden) for tokens in lengths}
    seconds = in_turns({str(n): partial(merged, *given) for n, given in sizes.items()}, repeats)
    each = {n: median(taken) / int(n) for n, taken in seconds.items()}
    first = each[str(lengths[0])]
    case = f"ULD over merged groups, V={vocab:,}, forward + backward"
    return [
        figure(case, f"{int(n):,} tokens", f"us a token, {each[n] / first:.2f}x of the first", 1e6 * each[n], taken)
        for n, taken in seconds.items()
    ]


def figures(*, smoke: bool, repeats: int, note: Any) -> list[Row]:
    """All rows; the models' and the memory's are left out of a smoke run."""
    if smoke:
        out = uld_rows(repeats, *drawn(4, 4_000), "4 drawn rows, V=4,000")
        return out + alm_rows(repeats, 64, 2_000, 16) + merged_figures(repeats, (30, 60), 300, 8)
    out = []
    if reason := fidelity.missing():
        note(f"xtok: ULD on real rows skipped, {reason}")
    else:
        state, weight, teacher = states(128)
        out = uld_rows(repeats, state[:32], weight, teacher[:32], "32 rows of SmolLM2, V=49,152")
    out += alm_rows(repeats, 4_096, 32_768, 64) + alm_memory((8_192, 16_384), 32_768, 64)
    return out + merged_figures(repeats, (1_536, 6_144, 24_576), 512)
