"""Losses between hidden states, beside a loss on tokens: distances of rows, projectors, masks, layers.

    loss = hidden_loss(student, teacher, distance="cosine", teacher_projector=w, token_weights=mask)
    loss = over_layers(normalized_mse, student_layers, teacher_layers, uniform_pairs(4, 12), eps=1e-6)

The teacher's states never receive a gradient; a projector on either side does. Row i of both sides is the same token.
A row of weight 0 may hold anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from potstill.arguments import check_choice, row_coefficients
from potstill.teachers import describe

Projector = Callable[[Tensor], Tensor] | Tensor
Pairs = Sequence[tuple[int, int]]

FEATURES = ("mean", "sum")


def hidden_loss(
    student: Tensor, teacher: Tensor, *, distance: str | Callable[[Tensor, Tensor], Tensor] = "mse",
    features: str = "mean", beta: float = 1.0, axis: str = "features", student_projector: Projector | None = None,
    teacher_projector: Projector | None = None, token_weights: Tensor | None = None, reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The distance of two hidden states s and t, row by row, reduced over the rows.

    student: [..., D_s] fp64, fp32, bf16 or fp16.  teacher: [..., D_t], the same leading shape.
    distance: a function of s and t [..., D] in fp32 (fp64) that gives [...], or a name:
        "mse"                 (s - t)^2, mean or sum over D as `features` says: `(s - t).square().mean(-1)`
        "l1"                  |s - t|, likewise
        "smooth_l1"           `F.smooth_l1_loss(s, t, reduction="none", beta=beta)`, likewise
        "cosine"              1 - cos(s, t); 1 where one side is 0
        "log_sigmoid_cosine"  -log sigmoid(cos(s, t)) = `F.softplus(-F.cosine_similarity(s, t, -1))` (DM-Codec,
                              arXiv:2410.15017)
    axis: "features", a number a token; or "time": a number a feature, over the positions of a sequence [..., L, D] that
        have weight (any weight but 0 counts 1); the reduction is then over features and sequences.
    student_projector, teacher_projector: a module, or a weight [D, D_side], applied first; both may learn.
    token_weights: [...] multiplies the row; a bool mask leaves rows out.
    reduction, num_items: as in `linear_distill_loss`.

    Returns a scalar, [...] for "none" (with axis="time" [..., D]), in fp32 (fp64 for fp64). 16-bit states are widened
    after the projector. Raises ValueError or TypeError on shapes that do not fit, naming them.
    """
    check_choice("features", features, FEATURES)
    check_choice("axis", axis, ("features", "time"))
    s, t, weights = prepared(student, teacher, student_projector, teacher_projector, token_weights)
    if axis == "time":
        if s.dim() < 2:
            raise ValueError(f"axis='time' needs states [..., L, D]; they have shape {list(s.shape)}")
        s, t = s.transpose(-1, -2), t.transpose(-1, -2)
        weights = (weights != 0).any(-1, keepdim=True).to(s.dtype).expand(s.shape[:-1])
    rows = row_distance(s, t, distance, features, beta)
    return reduced(rows, weights, reduction, num_items)


def normalized_mse(
    student: Tensor, teacher: Tensor, *, eps: float, student_projector: Projector | None = None,
    teacher_projector: Projector | None = None, token_weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """mean (s - t)^2 / (mean t^2 + eps), one ratio for the whole tensor: a layer's loss whatever its scale.

    student: [..., D_s].  teacher: [..., D_t].  token_weights: [...], both means are over rows with these weights.
    eps: has no default, papers differ: 1e-6 (Puzzle, arXiv:2411.19146), 2^-7, the bf16 epsilon (SquareHead,
        arXiv:2310.06927); both read in the authors' code.
    Equals `F.mse_loss(s, t) / (t.square().mean() + eps)`. Returns a fp32 (fp64) scalar; 0 without a row.
    """
    if not eps >= 0:
        raise ValueError(f"eps={eps} must be at least 0")
    s, t, weights = prepared(student, teacher, student_projector, teacher_projector, token_weights)
    coef = row_coefficients(weights, "mean")
    return _weighted_sum((s - t).square().mean(-1), coef) / (_weighted_sum(t.square().mean(-1), coef) + eps)


def frobenius(
    student: Tensor, teacher: Tensor, *, student_projector: Projector | None = None,
    teacher_projector: Projector | None = None, token_weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """sqrt(sum over rows and features of (s - t)^2), the norm and not its square; slope 0 where both are equal.

    student: [..., D_s].  teacher: [..., D_t].  token_weights: [...] multiplies a row's squares.
    Equals `(s - t).norm()`: MaTVLM's block loss, arXiv:2503.13440 (read in the authors' code). The square is
    `hidden_loss(distance="mse", features="sum", reduction="sum")`. Returns a fp32 (fp64) scalar.
    """
    s, t, weights = prepared(student, teacher, student_projector, teacher_projector, token_weights)
    square = _weighted_sum((s - t).square().sum(-1), weights)
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)


def uniform_pairs(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Student layer i beside teacher layer (i + 1) k - 1, k = teacher_layers // student_layers: last beside last.

    Both count from 0. Raises ValueError unless teacher_layers is a multiple of student_layers.
    """
    if student_layers < 1 or teacher_layers % student_layers:
        raise ValueError(
            f"{teacher_layers} teacher layers are no multiple of {student_layers} student layers; give the pairs"
        )
    k = teacher_layers // student_layers
    return [(i, (i + 1) * k - 1) for i in range(student_layers)]


def over_layers(
    loss: Callable[..., Tensor], student_layers: Sequence[Tensor], teacher_layers: Sequence[Tensor],
    pairs: Pairs | None = None, *, weights: Sequence[float] | Tensor | None = None, total: str = "mean",
    student_projectors: Sequence[Projector] | None = None, teacher_projectors: Sequence[Projector] | None = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """A loss summed or averaged over pairs of layers.

    loss: a function of (student, teacher, **options): hidden_loss, normalized_mse, frobenius, gram_loss, ...
    student_layers, teacher_layers: tensors; a model's `hidden_states` begins with the embeddings.
    pairs: (student index, teacher index); None pairs equal numbers of layers in order.
    weights: one number a pair; a tensor may learn.  total: "sum", or "mean": divided by the number of pairs.
    student_projectors, teacher_projectors: one a pair.
    """
    check_choice("total", total, FEATURES)
    if pairs is None:
        if len(student_layers) != len(teacher_layers):
            raise ValueError(
                f"{len(student_layers)} student and {len(teacher_layers)} teacher layers: say which belong together by "
                "pairs=[(student, teacher), ...] or uniform_pairs(student, teacher)"
            )
        pairs = [(i, i) for i in range(len(student_layers))]
    for name, given in (("weights", weights), ("student_projectors", student_projectors),
                        ("teacher_projectors", teacher_projectors)):  # fmt: skip
        if given is not None and len(given) != len(pairs):
            raise ValueError(f"{name} has {len(given)} entries for {len(pairs)} pairs of layers; give one a pair")
    if not pairs:
        raise ValueError("there are no pairs of layers; give at least one")
    found = []
    for n, (i, j) in enumerate(pairs):
        if student_projectors is not None:
            options["student_projector"] = student_projectors[n]
        if teacher_projectors is not None:
            options["teacher_projector"] = teacher_projectors[n]
        value = loss(student_layers[i], teacher_layers[j], **options)
        found.append(value if weights is None else weights[n] * value)
    summed = torch.stack(found).sum(0)
    return summed if total == "sum" else summed / len(pairs)


def nearest_layers(
    student: Tensor, teacher_layers: Sequence[Tensor], k: int, *, distance: str = "mse", features: str = "mean",
    beta: float = 1.0, teacher_projector: Projector | None = None, weights: Sequence[float] | Tensor | None = None,
    token_weights: Tensor | None = None, reduction: str = "mean", num_items: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The sum, for each token, of its distances to the k teacher layers that are nearest to it.

    student: [..., D_s], one layer.  teacher_layers: L tensors [..., D_t].  k: 1..L, chosen anew for each token; the
    gradient reaches the chosen layers' terms alone.
    teacher_projector: one, shared by all teacher layers (may learn).
    weights: k numbers, the nearest layer's first; a tensor may learn. None: all 1.
    Other arguments as in `hidden_loss`. Equals, with d [L, ...] the distances,
    `d.topk(k, dim=0, largest=False).values.sum(0)`, reduced.
    Multi-level distillation for OOD detection in text, arXiv:2211.11300 (read in the authors' code).
    """
    if not 1 <= k <= len(teacher_layers):
        raise ValueError(f"k={k} is outside 1..{len(teacher_layers)}, the number of teacher layers")
    if weights is not None and len(weights) != k:
        raise ValueError(f"weights has {len(weights)} entries; give k={k}, the nearest layer's first")
    found, rows = torch.empty(0), []
    for layer in teacher_layers:
        s, t, found = prepared(student, layer, None, teacher_projector, token_weights)
        rows.append(row_distance(s, t, distance, features, beta))
    nearest = torch.stack(rows, -1).topk(k, largest=False).values
    if weights is not None:
        nearest = nearest * torch.as_tensor(weights, dtype=nearest.dtype, device=nearest.device)
    return reduced(nearest.sum(-1), found, reduction, num_items)


def row_distance(
    s: Tensor, t: Tensor, distance: str | Callable[[Tensor, Tensor], Tensor], features: str, beta: float
) -> Tensor:
    """[...] of s, t [..., D]."""
    if callable(distance):
        return distance(s, t)
    if distance == "cosine":
        u, v = unit(s), unit(t)
        some = (s != 0).any(-1) & (t != 0).any(-1)
        return torch.where(some, (u - v).square().sum(-1) / 2, 1.0)  # 1 - u.v without its cancellation
    if distance == "log_sigmoid_cosine":
        return F.softplus(-cosine(s, t))
    if distance == "mse":
        each = (s - t).square()
    elif distance == "l1":
        each = (s - t).abs()
    elif distance == "smooth_l1":
        each = F.smooth_l1_loss(s, t, reduction="none", beta=beta)
    else:
        check_choice("distance", distance, ("mse", "l1", "smooth_l1", "cosine", "log_sigmoid_cosine"))
    return each.mean(-1) if features == "mean" else each.sum(-1)


def unit(x: Tensor) -> Tensor:
    """x [..., D] divided by its length in fp32 (fp64); 0 stays 0, with gradient 0."""
    x = wide(x)
    square = x.square().sum(-1, keepdim=True)
    return x * torch.where(square > 0, torch.where(square > 0, square, 1.0).rsqrt(), 0.0)


def cosine(s: Tensor, t: Tensor) -> Tensor:
    """cos(s, t) over the last dimension; 0, with gradient 0, where one side is 0."""
    return (unit(s) * unit(t)).sum(-1)


def wide(x: Tensor) -> Tensor:
    """x in fp64 where it is, else in fp32."""
    return x if x.dtype == torch.float64 else x.float()


def prepared(
    student: Tensor, teacher: Tensor, student_projector: Projector | None, teacher_projector: Projector | None,
    token_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(s [..., D], t [..., D], weights [...]) in fp32 (fp64), projected, rows of weight 0 cleared."""
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.dim():
            raise TypeError(f"{name} must be a floating-point tensor [..., D], not {describe(x)}")
    lead = student.shape[:-1]
    if teacher.shape[:-1] != lead:
        raise ValueError(
            f"teacher has shape {list(teacher.shape)}, student {list(student.shape)}; all but the last size must agree"
            ": row i of both is the same token"
        )
    teacher = teacher.detach()
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    if token_weights is None:
        weights = torch.ones(lead, dtype=dtype, device=student.device)
    else:
        if token_weights.shape != lead:
            raise ValueError(f"token_weights has shape {list(token_weights.shape)}; the rows have {list(lead)}")
        weights = token_weights.to(dtype)
        live = (weights != 0)[..., None]
        student, teacher = torch.where(live, student, 0.0), torch.where(live, teacher, 0.0)
    s, t = projected(student, student_projector), projected(teacher, teacher_projector)
    if s.shape[-1] != t.shape[-1]:
        raise ValueError(
            f"student states have {s.shape[-1]} features and the teacher's {t.shape[-1]}; give student_projector or "
            f"teacher_projector, a module or a weight [{t.shape[-1]}, {s.shape[-1]}] for the student's side"
        )
    return s.to(dtype), t.to(dtype), weights


def projected(x: Tensor, projector: Projector | None) -> Tensor:
    if projector is None:
        return x
    return F.linear(x, projector) if isinstance(projector, Tensor) else projector(x)


def reduced(rows: Tensor, weights: Tensor, reduction: str, num_items: int | Tensor | None) -> Tensor:
    """rows [...] by weights [...] as the reduction says."""
    coef = row_coefficients(weights, reduction, num_items)
    return torch.where(coef != 0, coef * rows, 0.0) if reduction == "none" else _weighted_sum(rows, coef)


def _weighted_sum(rows: Tensor, coef: Tensor) -> Tensor:
    return torch.where(coef != 0, coef * rows, 0.0).sum()
