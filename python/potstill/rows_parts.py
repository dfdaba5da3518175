"""What a kernel is asked to do where the vocabulary is cut in parts: tiles over time, shards over processes, or both.

The rows of rows.py, seen a part of the columns at a time. A part is C columns of consecutive ids; ids and labels here
count from its first column, and one that is < 0 or >= C lies in another part. Sides are the part's:
`Side.vocab_size` is its number of real columns. A loss takes three steps, and parts are combined between them:

    part_lse(x [R, C], side, temperature, ids [R, K] | None) -> [R]
        log-sum-exp of z / temperature, over the columns that are not among `ids`.
        Parts combine by log-add-exp.
    dense_part_sums(student [R, C], teacher [R, C'], lse_s [R], lse_t [R], coef [R], spec) -> [2, R]
        sums of term + centre * (q - p) and of slope, with lq = z_s / T - lse_s and lp = z_t / T - lse_t.
        Parts combine by addition.
    dense_part_grad(student, teacher, lse_s, lse_t, total [R], weight [R], coef [R], labels [R] | None, lse_1 [R],
                    spec, grad [R, C]) -> None
        grad = coef * (weight * (slope - q * total) + ce_weight * (exp(z_s - lse_1) - [label])) * dz_s/dx;
        `total` is the slope's sum over all parts, `weight` holds distill_weight, 1 / T and the outer function's
        derivative, `lse_1` is the student's log-sum-exp at T = 1.
    sparse_part_grad(student, ids [R, K], entries [R, K], lse_s, lse_rest [R], outside [R], rest [R], coef, labels,
                     lse_1, spec, grad) -> None
        the same with `entries` at the columns `ids` and elsewhere
        rest * exp(z_s / T - lse_rest) - outside * exp(z_s / T - lse_s) in the place of weight * (slope - q * total).
        With K = 0, outside = rest = 0 this is the cross-entropy alone.

Log-sum-exps, sums, `total`, `weight`, `outside` and `rest` are fp64 whatever the logits are, so that the number of
parts does not show in the result. `entries` and `coef` are fp64 for fp64 logits, else fp32. `grad` may be `student`
itself; its columns from vocab_size on become 0. A row whose coef is exactly 0 gives sums 0 and gradient 0.
"""

from __future__ import annotations

from dataclasses import replace

from potstill.rows import RowSpec


def part_of(spec: RowSpec, columns: int) -> RowSpec:
    """The objective on a part with that many real columns."""
    teacher = None if spec.teacher is None else replace(spec.teacher, vocab_size=columns)
    return replace(spec, student=replace(spec.student, vocab_size=columns), teacher=teacher)
