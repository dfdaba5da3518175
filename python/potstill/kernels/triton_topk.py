"""Top-k with the log-sum-exp in Triton: one program per row, fp32 inside; reference/topk.py is the contract.

A logit's order is an int32 that ascends with its value, NaN above all. Memory passes over a row:
    1  the largest order in each of BLOCK columns' places: the k-th largest of these bounds the row's k-th from below
    2  columns at or above the bound go to a list, all others into the sum of exp(z - m), the mass of the rest
The list, with room for twice k or more, is sorted by order and column as 64-bit keys. Where it is too short (ties, or
the row's largest all in few places) the bound becomes the k-th order itself, at once if only ties were too many and
else by 33 counting passes; then pass 2 once more takes just k, ties by their column. Nothing depends on timing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from potstill.kernels.triton_formula import tanh
from potstill.kernels.triton_rows import _on, _unit_columns
from potstill.rows import Side

# columns a program takes at once, with 8 warps and at most 128 registers a thread; with 4096 it would need a stack
BLOCK = 2048
SHORTEST = 256  # entries of the list, at least
SCRATCH = 64 << 20  # bytes of all lists of a launch, at most
LOWEST = tl.constexpr(-(2**31))  # below the order of -inf
NAN = tl.constexpr(2**31 - 1)


@triton.jit
def _logits(p_row, o_col, mask, scale, softcap, SOFTCAP: tl.constexpr):
    b_z = tl.load(p_row + o_col, mask=mask, other=0.0).to(tl.float32) * scale
    if SOFTCAP:
        b_z = softcap * tanh(b_z / softcap)
    return tl.where(mask, b_z, float("-inf"))


@triton.jit
def _order(b_z, mask):
    bits = tl.where(b_z == 0, 0.0, b_z).to(tl.int32, bitcast=True)
    b_key = tl.where(b_z != b_z, NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(mask, b_key, LOWEST)


@triton.jit
def _value(b_key):
    return (b_key ^ ((b_key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _grow(m, s, b_z, inv_t):
    """Grow the running maximum m and s = sum exp((z - m) / T)."""
    m_new = tl.maximum(m, tl.max(b_z, 0))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, s * tl.exp((m - base) * inv_t) + tl.sum(tl.exp((b_z - base) * inv_t), 0)


@triton.jit
def _kth_of(b_key, k):
    """The k-th largest of the block, bit by bit."""
    found = tl.where(tl.sum((b_key >= 0).to(tl.int32), 0) >= k, 0, LOWEST)
    for i in range(31):
        higher = found + (1 << (30 - i))
        found = tl.where(tl.sum((b_key >= higher).to(tl.int32), 0) >= k, higher, found)
    return found


@triton.jit
def _count(p_row, vocab, least, scale, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """How many columns have an order of at least `least`."""
    count = 0
    for start in range(0, vocab, BLOCK):
        o_col = start + tl.arange(0, BLOCK)
        inside = o_col < vocab
        b_key = _order(_logits(p_row, o_col, inside, scale, softcap, SOFTCAP), inside)
        count += tl.sum((inside & (b_key >= least)).to(tl.int32), 0)
    return count


@triton.jit
def _collect(
    p_row, p_list, vocab, bound, ties, scale, softcap,
    SOFTCAP: tl.constexpr, SOME: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns at or above the bound, and if SOME only the first `ties` at it, to the list; the others are summed.

    Returns how many there were, how many above the bound, and m, s of the others.
    """
    taken, above, at = 0, 0, 0
    m, s = float("-inf"), 0.0
    for start in range(0, vocab, BLOCK):
        o_col = start + tl.arange(0, BLOCK)
        inside = o_col < vocab
        b_z = _logits(p_row, o_col, inside, scale, softcap, SOFTCAP)
        b_key = _order(b_z, inside)
        b_take = inside & (b_key >= bound)
        if SOME:
            b_tie = (inside & (b_key == bound)).to(tl.int32)
            b_take = inside & ((b_key > bound) | ((b_tie > 0) & (at + tl.cumsum(b_tie, 0) <= ties)))
            at += tl.sum(b_tie, 0)
        b_one = b_take.to(tl.int32)
        more = tl.sum(b_one, 0)
        if more > 0:
            above += tl.sum((inside & (b_key > bound)).to(tl.int32), 0)
            o_list = taken + tl.cumsum(b_one, 0) - 1
            tl.store(p_list + o_list, o_col, mask=b_take & (o_list < LIST))
            taken += more
        m, s = _grow(m, s, tl.where(b_take, float("-inf"), b_z), 1.0)
    return taken, above, m, s


@triton.jit
def topk_kernel(
    p_logits, p_list, p_ids, p_log_probs, p_log_rest, p_lse,  # [R, V], [R, LIST], [R, k], [R, k], [R], [R]
    logits_stride, vocab, k, scale, softcap,
    SOFTCAP: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    p_logits += i_row * logits_stride
    p_list += i_row * LIST

    b_most = tl.full((BLOCK,), LOWEST, tl.int32)
    for start in range(0, vocab, BLOCK):
        o_col = start + tl.arange(0, BLOCK)
        inside = o_col < vocab
        b_most = tl.maximum(b_most, _order(_logits(p_logits, o_col, inside, scale, softcap, SOFTCAP), inside))
    bound = _kth_of(b_most, k)
    taken, above, m, s = _collect(p_logits, p_list, vocab, bound, 0, scale, softcap, SOFTCAP, False, LIST, BLOCK)
    if taken > LIST:
        if above >= k:
            # from the first bound up: the highest order that k columns reach, and how many exceed it
            step = 1 << 30
            above = 0
            for i in range(33):
                higher = tl.where(bound > NAN - step, NAN, bound + step)
                reached = _count(p_logits, vocab, higher, scale, softcap, SOFTCAP, BLOCK)
                above = tl.where(reached >= k, above, reached)
                bound = tl.where(reached >= k, higher, bound)
                step = tl.where(i < 2, step, step >> 1)
        tl.debug_barrier()  # the list is written anew
        taken, above, m, s = _collect(
            p_logits, p_list, vocab, bound, k - above, scale, softcap, SOFTCAP, True, LIST, BLOCK
        )
    tl.debug_barrier()  # the list is read by other threads than wrote it

    o_list = tl.arange(0, LIST)
    listed = o_list < taken
    o_col = tl.load(p_list + o_list, mask=listed, other=0)
    b_key = _order(_logits(p_logits, o_col, listed, scale, softcap, SOFTCAP), listed)
    b_sorted = tl.sort((b_key.to(tl.int64) << 32) | (0x7FFFFFFF - o_col).to(tl.int64), descending=True)
    b_id = 0x7FFFFFFF - (b_sorted & 0x7FFFFFFF).to(tl.int32)
    b_z = tl.where(listed, _value((b_sorted >> 32).to(tl.int32)), float("-inf"))
    chosen = o_list < k
    m, s = _grow(m, s, tl.where(listed & (o_list >= k), b_z, float("-inf")), 1.0)

    best = _value(tl.max((b_sorted >> 32).to(tl.int32), 0))
    finite = (best > float("-inf")) & (best < float("inf"))
    top = tl.sum(tl.where(chosen, tl.exp(b_z - best), 0.0), 0)
    log_total = tl.where(finite, tl.log(top + tl.where(s == 0, 0.0, s * tl.exp(m - best))), 0.0)
    rest = tl.where(s == 0, float("-inf") - log_total, (m - best) + (tl.log(s) - log_total))
    rest = tl.where((s == 0) & (best == float("-inf")), float("nan"), rest)
    tl.store(p_ids + i_row * k + o_list, b_id, mask=chosen)
    tl.store(p_log_probs + i_row * k + o_list, tl.where(best != best, best, (b_z - best) - log_total), mask=chosen)
    tl.store(p_log_rest + i_row, tl.where(best != best, best, rest))
    tl.store(p_lse + i_row, best + log_total)


@triton.jit
def more_kernel(
    p_logits, p_ids, p_lse, p_tokens, p_token_log_probs, p_ranks, p_rest,  # [R, V], [R, k], then [R]
    logits_stride, vocab, k, scale, softcap, inv_t,
    SOFTCAP: tl.constexpr, TOKENS: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With TOKENS a token's log-probability and rank, with REST the log-mass outside the k at temperature 1 / inv_t."""
    i_row = tl.program_id(0).to(tl.int64)
    p_logits += i_row * logits_stride
    token = 0
    given = 0.0
    known = True
    if TOKENS:
        token = tl.load(p_tokens + i_row).to(tl.int32)
        known = (token >= 0) & (token < vocab)
        given = _logits(p_logits, token, known, scale, softcap, SOFTCAP)
    last = tl.load(p_ids + i_row * k + k - 1)  # the k chosen are those at or before it in the order of the ids
    last_key = _order(_logits(p_logits, last, last >= 0, scale, softcap, SOFTCAP), last >= 0)
    rank = 0
    m, s = float("-inf"), 0.0
    mk, sk = float("-inf"), 0.0
    for start in range(0, vocab, BLOCK):
        o_col = start + tl.arange(0, BLOCK)
        inside = o_col < vocab
        b_z = _logits(p_logits, o_col, inside, scale, softcap, SOFTCAP)
        if TOKENS:
            rank += tl.sum((inside & (b_z > given)).to(tl.int32), 0)
        if REST:
            b_key = _order(b_z, inside)
            b_in = (b_key > last_key) | ((b_key == last_key) & (o_col <= last))
            m, s = _grow(m, s, tl.where(b_in, float("-inf"), b_z), inv_t)
            mk, sk = _grow(mk, sk, tl.where(b_in, b_z, float("-inf")), inv_t)
    if TOKENS:
        missing = tl.where(token < 0, float("-inf"), float("nan"))
        tl.store(p_token_log_probs + i_row, tl.where(known, given - tl.load(p_lse + i_row), missing))
        tl.store(p_ranks + i_row, tl.where(known, rank, -1))
    if REST:
        finite = (mk > float("-inf")) & (mk < float("inf"))
        total = sk + tl.where(s == 0, 0.0, s * tl.exp((m - mk) * inv_t))
        log_total = tl.where(finite, tl.log(total), 0.0)
        rest = tl.where(s == 0, float("-inf") - log_total, (m - mk) * inv_t + (tl.log(s) - log_total))
        rest = tl.where((s == 0) & (mk == float("-inf")), float("nan"), rest)
        lse = tl.load(p_lse + i_row)
        tl.store(p_rest + i_row, tl.where(lse != lse, lse, rest))


def launch_shape(vocab: int, k: int) -> dict[str, int]:
    """BLOCK, LIST and the launch options for rows of so many columns."""
    block = min(BLOCK, max(128, triton.next_power_of_2(vocab)))
    block = max(block, triton.next_power_of_2(k))  # as many places as entries are wanted
    length = max(SHORTEST, triton.next_power_of_2(2 * k))
    return {"BLOCK": block, "LIST": length, "num_warps": 8 if block >= 2048 else 4, "maxnreg": 128}


def topk(logits: Tensor, k: int, side: Side) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [R, V] -> (ids [R, k] int32, log_probs [R, k], log_rest [R], lse [R]), fp32."""
    x = _unit_columns(logits)
    shape, rows = launch_shape(side.vocab_size, k), len(x)
    ids = torch.empty(rows, k, dtype=torch.int32, device=x.device)
    log_probs = torch.empty(rows, k, dtype=torch.float32, device=x.device)
    log_rest, lse = log_probs.new_empty(rows), log_probs.new_empty(rows)
    at_once = max(1, min(rows, SCRATCH // (4 * shape["LIST"])))
    scratch = torch.empty(at_once, shape["LIST"], dtype=torch.int32, device=x.device)
    with _on(x):
        for start in range(0, rows, at_once):
            part = slice(start, start + at_once)
            topk_kernel[(len(x[part]),)](
                x[part], scratch, ids[part], log_probs[part], log_rest[part], lse[part],
                x.stride(0), side.vocab_size, k, float(side.scale), float(side.softcap),
                SOFTCAP=side.softcap != 0, **shape,
            )  # fmt: skip
    return ids, log_probs, log_rest, lse


def topk_with(
    logits: Tensor, k: int, side: Side, tokens: Tensor | None, temperatures: Sequence[float]
) -> tuple[Tensor, ...]:
    """topk, then the token's log-probability [R] and rank [R] int32, and log_rest_at [R, T]: a pass more for each T."""
    x = _unit_columns(logits)
    ids, log_probs, log_rest, lse = topk(x, k, side)
    rows, given = len(x), tokens is not None
    token_log_probs, ranks = lse.new_empty(rows if given else 0), ids.new_empty(rows if given else 0)
    at = lse.new_empty(len(temperatures), rows if temperatures else 0)
    named = ids if tokens is None else tokens.long().contiguous()
    shape = {name: value for name, value in launch_shape(side.vocab_size, k).items() if name != "LIST"}
    with _on(x):
        for i in range(max(len(temperatures), int(given)) if rows else 0):
            more_kernel[(rows,)](
                x, ids, lse, named, token_log_probs, ranks, at[i] if i < len(temperatures) else lse,
                x.stride(0), side.vocab_size, k, float(side.scale), float(side.softcap),
                1.0 / temperatures[i] if i < len(temperatures) else 1.0,
                SOFTCAP=side.softcap != 0, TOKENS=given and i == 0, REST=i < len(temperatures), **shape,
            )  # fmt: skip
    return ids, log_probs, log_rest, lse, token_log_probs, ranks, at.t().contiguous()
