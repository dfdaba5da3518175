"""What a row kernel is asked to do: the one contract between the losses and every backend.

A row kernel takes logits of R rows and returns, per row, the divergence and the cross-entropy in nats, and on request
writes the gradient by the student's raw logits. Raw logits `x` become logits `z = softcap * tanh(scale * x / softcap)`
(or `scale * x`), and columns from `vocab_size` on are padding: no mass, gradient 0.

    dense_rows(student [R, Vs], teacher [R, Vt], coef [R], labels [R] | None, spec, grad [R, Vs] | None) -> [2, R]
    sparse_rows(student [R, Vs], ids [R, K], log_probs [R, K], log_rest [R] | None, coef [R], labels [R] | None, spec,
                grad [R, Vs] | None, weights [R, K] | None = None) -> [2, R]

Result row 0 is the divergence between softmax(z_teacher / T) and softmax(z_student / T), row 1 the cross-entropy of
`labels` (int64, 0 when ce_weight is 0) at T = 1, both unweighted, in fp32 (fp64 when student is fp64). The gradient is
    grad = coef * (distill_weight * d divergence / dx + ce_weight * d cross_entropy / dx)
in grad's dtype; `grad` may be `student` itself. A row whose coef is exactly 0 is not looked at: results 0, gradient 0.
Sparse teachers come at the loss's temperature already; `ids` is -1 and `log_probs` -inf for a missing entry.
    tail "bucket"       the K entries and one rest entry: log_rest against log(1 - sum of the student's K)
    tail "renormalize"  both sides over the K entries only, each summing to 1 (the student's sum over the support)
    tail "drop"         the K entries, teacher's true probabilities against the student's full distribution
    tail "sampled"      as "drop", with `weights` on each entry's term and slope
With slope_j and S = sum(slope) the gradient of the divergence is `(slope_j - q_j * S) / T`, times the derivative of the
divergence's `outer` at the summed terms where it has one.
"""

from __future__ import annotations

from dataclasses import dataclass

from potstill.divergences import Divergence

TAILS = ("bucket", "renormalize", "drop", "sampled")
COMPLETE = ("bucket", "renormalize")  # both sides sum to 1


@dataclass(frozen=True)
class Side:
    """How one side's raw logits become logits: scale, softcap (0.0 = none), number of real vocabulary entries."""

    vocab_size: int
    scale: float = 1.0
    softcap: float = 0.0


@dataclass(frozen=True)
class RowSpec:
    """The row's objective. `distill_weight` holds T squared already where it was asked for."""

    divergence: Divergence
    student: Side
    teacher: Side | None = None  # None for a sparse teacher
    tail: str = "bucket"
    temperature: float = 1.0
    distill_weight: float = 1.0
    ce_weight: float = 0.0

    @property
    def centre(self) -> float:
        """The divergence's centre where both sides are complete distributions, else 0."""
        return 0.0 if self.teacher is None and self.tail not in COMPLETE else self.divergence.centre
