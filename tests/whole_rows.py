"""The default path, chunk_rows x V at once, called as the engine of the parts is: what parts are held against."""

from __future__ import annotations

import json
from dataclasses import replace

from potstill.chunked import Task, Wanted, linear_rows


def whole_rows(hidden, weight, bias, teacher, coef, labels, spec, rows=5, backend="auto"):
    """(parts [2, N], d_hidden, d_weight, d_bias) for a teacher given as PartTeacher's fields."""
    side = spec.teacher
    numbers = [1.0, *([side.vocab_size, side.scale, side.softcap] if side else [])]
    kind = next(name for name in ("hidden", "logits", "ids") if teacher.get(name) is not None)
    names = {
        "hidden": ("hidden", "weight", "bias"),
        "logits": ("logits",),
        "ids": ("ids", "log_probs", "log_rest", "weights"),
    }[kind]
    tensors = [teacher[name] for name in names if teacher.get(name) is not None]
    places = [next((i for i, x in enumerate(tensors) if x is teacher.get(name)), None) for name in names]
    source = ["topk", *places, None, None] if kind == "ids" else [kind, *places, [1, 2, 3]]
    plan = json.dumps({"source": source, "ratio": 0, "masked": None})
    task = Task(tensors, numbers, plan, None, coef, labels, replace(spec, teacher=None), (), rows, False, backend)
    return linear_rows(hidden, weight, bias, task, Wanted(True, True, True))[:4]
