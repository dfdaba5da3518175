"""Row kernels in Triton: one program per row, the vocabulary in blocks, fp32 inside; rows.py is the contract.

With m = max z, log-probability = (z - m) / T - log s, s = sum exp((z - m) / T). The formula of a divergence
arrives as a constexpr device function, so no kernel knows any divergence. Memory passes over a row:
    dense    1 max and sum of both sides   2 terms and slope sum S   3 gradient (slope - q S) / T
    sparse   1 max and sum of the student  - K entries in registers  2 gradient, then the K entries over it
A program reads a student column last when it writes that column's gradient, so `grad` may be `student`.

The rest of a bucket row is summed from the columns that are not among the K: pass 1 leaves the members out
and adds them afterwards, so nothing is subtracted and log(rest) is exact down to the smallest rest. Members
are found by walking ids sorted beforehand, one comparison of the block per member: about 2 of 64 fall in a
block of 4096, and no scratch of the size of the row is needed.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from potstill.kernels.triton_formula import INTERPRETED, device_function, tanh
from potstill.rows import TAILS, RowSpec

# columns a program takes at once, with 8 warps and at most 128 registers a thread: two programs or more share
# a multiprocessor and none spills (bench/compile_gpu.py holds them to it); 32768 with 32 warps spills
DENSE_BLOCK = 2048
SPARSE_BLOCK = 4096
FAR = tl.constexpr(2**31 - 1)


@triton.jit
def _load_logits(p_row, o_col, mask, scale, softcap, SOFTCAP: tl.constexpr):
    """Logits of the columns o_col (-inf where masked) and their derivative by the raw logits."""
    b_z = tl.load(p_row + o_col, mask=mask, other=0.0).to(tl.float32) * scale
    b_chain = scale + tl.zeros_like(b_z)
    if SOFTCAP:
        b_t = tanh(b_z / softcap)
        b_z = softcap * b_t
        b_chain = scale * (1.0 - b_t * b_t)
    return tl.where(mask, b_z, float("-inf")), b_chain


@triton.jit
def _grow(m, s, s1, b_z, inv_t, BOTH: tl.constexpr):
    """Grow the running maximum m, s = sum exp((z - m) / T) and, if BOTH, s1 = sum exp(z - m)."""
    m_new = tl.maximum(m, tl.max(b_z, 0))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    s = s * tl.exp((m - base) * inv_t) + tl.sum(tl.exp((b_z - base) * inv_t), 0)
    if BOTH:
        s1 = s1 * tl.exp(m - base) + tl.sum(tl.exp(b_z - base), 0)
    return m_new, s, s1


@triton.jit
def _clear_row(p_row, columns, BLOCK: tl.constexpr):
    for start in range(0, columns, BLOCK):
        o_col = start + tl.arange(0, BLOCK)
        b_zero = tl.zeros((BLOCK,), tl.float32).to(p_row.dtype.element_ty)
        tl.store(p_row + o_col, b_zero, mask=o_col < columns)


@triton.jit
def dense_kernel(
    p_student, p_teacher, p_coef, p_labels, p_out, p_grad,  # [R, Vs], [R, Vt], [R], [R], [2, R], [R, Vs]
    student_stride, teacher_stride, grad_stride, columns, vocab,
    student_scale, student_cap, teacher_scale, teacher_cap,
    inv_t, distill_weight, ce_weight, centre, values,
    FORMULA: tl.constexpr, OUTER: tl.constexpr, STUDENT_CAP: tl.constexpr, TEACHER_CAP: tl.constexpr,
    TEMPERED: tl.constexpr, CE: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    p_student += i_row * student_stride
    p_teacher += i_row * teacher_stride
    if GRAD:
        p_grad += i_row * grad_stride
    coef = tl.load(p_coef + i_row)
    if coef == 0:
        tl.store(p_out + i_row, 0.0)
        tl.store(p_out + rows + i_row, 0.0)
        if GRAD:
            _clear_row(p_grad, columns, BLOCK)
        return

    mq, sq, sq1 = float("-inf"), 0.0, 0.0
    mp, sp, unused = float("-inf"), 0.0, 0.0
    for start in range(0, vocab, BLOCK):
        o_col = start + tl.arange(0, BLOCK)
        inside = o_col < vocab
        b_zq = _load_logits(p_student, o_col, inside, student_scale, student_cap, STUDENT_CAP)[0]
        b_zp = _load_logits(p_teacher, o_col, inside, teacher_scale, teacher_cap, TEACHER_CAP)[0]
        mq, sq, sq1 = _grow(mq, sq, sq1, b_zq, inv_t, CE and TEMPERED)
        mp, sp, unused = _grow(mp, sp, unused, b_zp, inv_t, False)
    log_sq, log_sp = tl.log(sq), tl.log(sp)
    log_sq1 = tl.log(sq1) if TEMPERED else log_sq

    b_term = tl.zeros((BLOCK,), tl.float32)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        o_col = start + tl.arange(0, BLOCK)
        inside = o_col < vocab
        b_zq = _load_logits(p_student, o_col, inside, student_scale, student_cap, STUDENT_CAP)[0]
        b_zp = _load_logits(p_teacher, o_col, inside, teacher_scale, teacher_cap, TEACHER_CAP)[0]
        b_lq = (b_zq - mq) * inv_t - log_sq
        b_lp = (b_zp - mp) * inv_t - log_sp
        term, slope = FORMULA(b_lp, b_lq, *values)
        b_term += tl.where(inside, term + centre * (tl.exp(b_lq) - tl.exp(b_lp)), 0.0)
        b_sum += tl.where(inside, slope, 0.0)
    total = tl.sum(b_sum, 0)
    value = tl.sum(b_term, 0)
    if OUTER is not None:
        value, factor = OUTER(value, total, *values)
        distill_weight *= factor
    tl.store(p_out + i_row, value)

    cross_entropy = 0.0
    label = -1
    if CE:
        label = tl.load(p_labels + i_row).to(tl.int32)
        named = (label >= 0) & (label < vocab)
        z = _load_logits(p_student, label, named, student_scale, student_cap, STUDENT_CAP)[0]
        cross_entropy = tl.where(named, log_sq1 - (z - mq), float("nan"))
    tl.store(p_out + rows + i_row, cross_entropy)

    if GRAD:
        tl.debug_barrier()  # every read of another column is done before the first write
        for start in range(0, columns, BLOCK):
            o_col = start + tl.arange(0, BLOCK)
            inside = o_col < vocab
            b_zq, b_chain = _load_logits(p_student, o_col, inside, student_scale, student_cap, STUDENT_CAP)
            b_zp = _load_logits(p_teacher, o_col, inside, teacher_scale, teacher_cap, TEACHER_CAP)[0]
            b_lq = (b_zq - mq) * inv_t - log_sq
            b_lp = (b_zp - mp) * inv_t - log_sp
            slope = FORMULA(b_lp, b_lq, *values)[1]
            b_dz = distill_weight * inv_t * (slope - tl.exp(b_lq) * total)
            if CE:
                b_dz += ce_weight * (tl.exp(b_zq - mq - log_sq1) - tl.where(o_col == label, 1.0, 0.0))
            b_dx = tl.where(inside, coef * b_dz * b_chain, 0.0)
            tl.store(p_grad + o_col, b_dx.to(p_grad.dtype.element_ty), mask=o_col < columns)


@triton.jit
def sparse_kernel(
    p_student, p_ids, p_sorted, p_log_probs, p_log_rest,  # [R, Vs], [R, K], [R, K] ascending, [R, K], [R]
    p_weights,  # [R, K]
    p_coef, p_labels, p_out, p_grad,  # [R], [R], [2, R], [R, Vs]
    student_stride, grad_stride, columns, vocab, k, scale, softcap,
    inv_t, distill_weight, ce_weight, centre, values,
    FORMULA: tl.constexpr, OUTER: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERED: tl.constexpr, CE: tl.constexpr,
    GRAD: tl.constexpr, TAIL: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    p_student += i_row * student_stride
    if GRAD:
        p_grad += i_row * grad_stride
    coef = tl.load(p_coef + i_row)
    if coef == 0:
        tl.store(p_out + i_row, 0.0)
        tl.store(p_out + rows + i_row, 0.0)
        if GRAD:
            _clear_row(p_grad, columns, BLOCK)
        return

    o_k = tl.arange(0, ENTRIES)  # the K entries, and in the first slot after them the rest of a bucket row
    b_id = tl.load(p_ids + i_row * k + o_k, mask=o_k < k, other=-1)
    given = b_id >= 0
    known = given & (b_id < vocab)
    b_lp = tl.load(p_log_probs + i_row * k + o_k, mask=given, other=float("-inf")).to(tl.float32)
    b_z, b_chain = _load_logits(p_student, b_id, known, scale, softcap, SOFTCAP)
    b_z = tl.where(given & (b_id >= vocab), float("nan"), b_z)

    m, s, s1 = float("-inf"), 0.0, 0.0
    if TAIL != "renormalize" or CE:
        i_next = tl.sum((b_id < 0).to(tl.int32) - (o_k >= k).to(tl.int32), 0)
        member = tl.load(p_sorted + i_row * k + i_next, mask=i_next < k, other=FAR)
        for start in range(0, vocab, BLOCK):
            o_col = start + tl.arange(0, BLOCK)
            b_zq = _load_logits(p_student, o_col, o_col < vocab, scale, softcap, SOFTCAP)[0]
            if TAIL == "bucket":
                while member < start + BLOCK:
                    b_zq = tl.where(o_col == member, float("-inf"), b_zq)
                    i_next += 1
                    member = tl.load(p_sorted + i_row * k + i_next, mask=i_next < k, other=FAR)
            m, s, s1 = _grow(m, s, s1, b_zq, inv_t, CE and TEMPERED)
    m_rest, log_s_rest = m, tl.log(s)
    if TAIL == "bucket":
        m, s, s1 = _grow(m, s, s1, b_z, inv_t, CE and TEMPERED)
    log_s = tl.log(s)
    log_s1 = tl.log(s1) if TEMPERED else log_s

    lq_rest = float("-inf")
    mk, log_sk = m, log_s
    if TAIL == "renormalize":
        mk, sk, unused = _grow(float("-inf"), 0.0, 0.0, b_z, inv_t, False)
        log_sk = tl.log(sk)
    b_lq = tl.where(given, (b_z - mk) * inv_t - log_sk, float("-inf"))
    if TAIL == "bucket":
        lq_rest = (m_rest - m) * inv_t + (log_s_rest - log_s)
        b_lq = tl.where(o_k == k, lq_rest, b_lq)
        b_lp = tl.where(o_k == k, tl.load(p_log_rest + i_row).to(tl.float32), b_lp)
        counted = given | (o_k == k)
    else:
        counted = given
    term, slope = FORMULA(b_lp, b_lq, *values)
    if TAIL == "sampled":
        b_weight = tl.load(p_weights + i_row * k + o_k, mask=given, other=0.0).to(tl.float32)
        term *= b_weight
        slope *= b_weight
    b_q = tl.exp(b_lq)
    b_slope = tl.where(counted, slope, 0.0)
    total = tl.sum(b_slope, 0)
    value = tl.sum(tl.where(counted, term + centre * (b_q - tl.exp(b_lp)), 0.0), 0)
    if OUTER is not None:
        value, factor = OUTER(value, total, *values)
        distill_weight *= factor
    tl.store(p_out + i_row, value)
    slope_rest = tl.sum(tl.where(o_k == k, b_slope, 0.0), 0)

    cross_entropy = 0.0
    label = -1
    if CE:
        label = tl.load(p_labels + i_row).to(tl.int32)
        named = (label >= 0) & (label < vocab)
        z = _load_logits(p_student, label, named, scale, softcap, SOFTCAP)[0]
        cross_entropy = tl.where(named, log_s1 - (z - m), float("nan"))
    tl.store(p_out + rows + i_row, cross_entropy)

    if GRAD:
        tl.debug_barrier()  # every read of another column is done before the first write
        if TAIL == "renormalize" and not CE:
            _clear_row(p_grad, columns, BLOCK)
        else:
            for start in range(0, columns, BLOCK):
                o_col = start + tl.arange(0, BLOCK)
                inside = o_col < vocab
                b_zq, b_chain_col = _load_logits(p_student, o_col, inside, scale, softcap, SOFTCAP)
                b_dz = tl.zeros((BLOCK,), tl.float32)
                if TAIL != "renormalize":
                    b_lq_col = (b_zq - m) * inv_t - log_s
                    b_dz = -total * tl.exp(b_lq_col)
                    if TAIL == "bucket":
                        b_share = tl.where(b_lq_col == float("-inf"), 0.0, tl.exp(b_lq_col - lq_rest))
                        b_dz += slope_rest * b_share
                    b_dz *= distill_weight * inv_t
                if CE:
                    b_dz += ce_weight * (tl.exp(b_zq - m - log_s1) - tl.where(o_col == label, 1.0, 0.0))
                b_dx = tl.where(inside, coef * b_dz * b_chain_col, 0.0)
                tl.store(p_grad + o_col, b_dx.to(p_grad.dtype.element_ty), mask=o_col < columns)
        tl.debug_barrier()  # the K entries go over what the loop wrote
        b_dz = distill_weight * inv_t * (b_slope - b_q * total)
        if CE:
            b_dz += ce_weight * (tl.exp(b_z - m - log_s1) - tl.where(b_id == label, 1.0, 0.0))
        tl.store(p_grad + b_id, (coef * b_dz * b_chain).to(p_grad.dtype.element_ty), mask=known)


def launch_shape(columns: int, largest: int) -> dict[str, int]:
    """BLOCK, at most `largest`, and the launch options for rows of so many columns."""
    block = min(largest, max(128, triton.next_power_of_2(columns)))
    return {"BLOCK": block, "num_warps": 8 if block >= 2048 else 4, "maxnreg": 128}


def _unit_columns(x: Tensor) -> Tensor:
    """x itself where its columns are adjacent, else a copy; any row stride is served."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _adjacent(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if INTERPRETED else torch.cuda.device(x.device)


def _common(spec: RowSpec) -> dict[str, object]:
    return {
        "inv_t": 1.0 / spec.temperature, "distill_weight": float(spec.distill_weight),
        "ce_weight": float(spec.ce_weight), "centre": float(spec.centre), "values": spec.divergence.values,
        "FORMULA": device_function(spec.divergence.formula),
        "OUTER": spec.divergence.outer and device_function(spec.divergence.outer), "TEMPERED": spec.temperature != 1.0,
        "CE": spec.ce_weight != 0,
    }  # fmt: skip


def dense_rows(
    student: Tensor, teacher: Tensor, coef: Tensor, labels: Tensor | None, spec: RowSpec, grad: Tensor | None
) -> Tensor:
    """See rows.py. student [R, Vs], teacher [R, Vt], coef [R], labels [R] -> [2, R] fp32."""
    assert spec.teacher is not None
    rows, columns = student.shape
    out = torch.empty(2, rows, dtype=torch.float32, device=student.device)
    if not rows:
        return out
    student, teacher = _unit_columns(student), _unit_columns(teacher)
    written = student if grad is None else _unit_columns(grad)
    with _on(student):
        dense_kernel[(rows,)](
            student, teacher, coef.float().contiguous(), _adjacent(labels), out, written,
            student.stride(0), teacher.stride(0), written.stride(0), columns, spec.student.vocab_size,
            float(spec.student.scale), float(spec.student.softcap),
            float(spec.teacher.scale), float(spec.teacher.softcap), **_common(spec),
            STUDENT_CAP=spec.student.softcap != 0, TEACHER_CAP=spec.teacher.softcap != 0,
            GRAD=grad is not None, **launch_shape(columns, DENSE_BLOCK),
        )  # fmt: skip
    if grad is not None and written is not grad:
        grad.copy_(written)
    return out


def sparse_rows(
    student: Tensor, ids: Tensor, log_probs: Tensor, log_rest: Tensor | None, coef: Tensor,
    labels: Tensor | None, spec: RowSpec, grad: Tensor | None,
    weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See rows.py. student [R, Vs], ids, log_probs and weights [R, K], log_rest, coef, labels [R] -> [2, R] fp32."""
    assert spec.tail in TAILS
    rows, columns = student.shape
    out = torch.empty(2, rows, dtype=torch.float32, device=student.device)
    if not rows:
        return out
    student = _unit_columns(student)
    written = student if grad is None else _unit_columns(grad)
    k = ids.shape[1]
    ids = ids.to(torch.int32).contiguous()
    in_order = ids.sort(dim=-1).values if spec.tail == "bucket" else ids
    with _on(student):
        sparse_kernel[(rows,)](
            student, ids, in_order, log_probs.contiguous(), _adjacent(log_rest), _adjacent(weights),
            coef.float().contiguous(), _adjacent(labels), out, written,
            student.stride(0), written.stride(0), columns, spec.student.vocab_size, k,
            float(spec.student.scale), float(spec.student.softcap), **_common(spec),
            SOFTCAP=spec.student.softcap != 0, GRAD=grad is not None, TAIL=spec.tail,
            ENTRIES=triton.next_power_of_2(k + 1), **launch_shape(columns, SPARSE_BLOCK),
        )  # fmt: skip
    if grad is not None and written is not grad:
        grad.copy_(written)
    return out
