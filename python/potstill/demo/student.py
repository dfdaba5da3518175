"""The demo's student, and how far a student is from its teacher."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from potstill.capture.hidden import teacher_hidden
from potstill.losses import linear_distill_loss
from potstill.teachers import Head, HiddenTeacher


def every_nth_layer(teacher: Any, n: int) -> Any:
    """A copy of a Llama-like model with one layer in `n`: the last of each group, so that the final layer
    stays.
    """
    picked = list(range(n - 1, teacher.config.num_hidden_layers, n))
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(picked)
    layers, teacher.model.layers = (
        teacher.model.layers,
        nn.ModuleList(),
    )  # the copy below is of the student alone
    try:
        student = copy.deepcopy(teacher)
    finally:
        teacher.model.layers = layers
    student.config = student.model.config = config
    student.model.layers = nn.ModuleList(copy.deepcopy(layers[i]) for i in picked)
    for index, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = index
        layer.self_attn.config = config
    return student.requires_grad_(True)


@dataclass(frozen=True)
class HeldOut:
    """Sequences nobody trained on: ids int64 [B, L], and the teacher's hidden states [B, L, D]."""

    ids: torch.Tensor
    teacher: HiddenTeacher


def held_out(teacher: Any, batches: list[torch.Tensor]) -> list[HeldOut]:
    """The teacher's side of `divergence_between`, computed once."""
    head = Head.from_model(teacher, hidden="head_input")
    return [HeldOut(ids, HiddenTeacher(teacher_hidden(teacher, ids), head)) for ids in batches]


@torch.no_grad()
def divergence_between(student: Any, batches: list[HeldOut]) -> float:
    """Mean KL(teacher || student) in nats a token, exact over the whole vocabulary.

    The last row of each sequence counts too: both sides predict a token after it.
    """
    was_training = student.training
    student.eval()
    head, total, rows = Head.from_model(student, hidden="head_input"), 0.0, 0
    for batch in batches:
        hidden = teacher_hidden(student, batch.ids)
        total += float(linear_distill_loss(hidden, head, batch.teacher, reduction="sum"))
        rows += batch.ids.numel()
    student.train(was_training)
    return total / rows
