"""Losses on CPU: checked against fp64, then forward and backward in turns with rivals and the matrix products alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch

from potstill.bench import rivals
from potstill.bench.cases import WIDENED, Case, Loss, Shape, eager_gather_first
from potstill.bench.measure import Variant, in_turns, peak_in_process, timing

Row = dict[str, Any]
Note = Callable[[str], Any]
SHAPES = [
    Shape("dense", 512, 1024, 2048, 151_936),
    Shape("sparse", 512, 1024, 0, 151_936),
    Shape("dense", 512, 1024, 2048, 151_936, "bfloat16"),
    Shape("sparse", 512, 1024, 0, 151_936, "bfloat16"),
]
SMOKE = [
    Shape("dense", 64, 32, 48, 4_001),
    Shape("sparse", 64, 32, 0, 4_001),
    Shape("dense", 64, 32, 48, 4_001, "bfloat16"),
]
CHECKED = Shape("", 300, 48, 64, 33_001)  # rows over a chunk, V over a tile of everybody's


def title(shape: Shape) -> str:
    form = "dense teacher" if shape.form == "dense" else "cached top-64"
    dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[shape.dtype]
    return f"{form}, {dtype}, V={shape.vocab:,}, {shape.rows:,} rows"


def all_losses(case: Case, compiled: bool, gather_first: bool = False) -> tuple[dict[str, Loss], dict[str, str]]:
    """({name: loss} of ours, eager PyTorch and the rivals, {name: why it is absent})."""
    losses, skipped = rivals.found(case, compiled)
    mine = case.losses()
    if gather_first:
        assert case.th is None
        mine["eager, gather first"] = lambda: eager_gather_first(case.h, case.w, case.teacher)
    return {**mine, **losses}, skipped


def variants(compiled: bool = False, gather_first: bool = False, **shape: Any) -> dict[str, Variant]:
    """name -> forward and backward of one loss, returning its value; the gradients are dropped after each call.

    "floor" runs the matrix products alone.
    """
    case = Case(Shape(**shape))
    losses, _ = all_losses(case, compiled, gather_first)

    def step(loss: Loss) -> Variant:
        def run() -> float:
            value = loss()
            value.backward()
            case.h.grad = case.w.grad = None
            return float(value.detach())

        return run

    return {**{name: step(loss) for name, loss in losses.items()}, **case.floors()}


def errors(case: Case, loss: Loss, truth: tuple[torch.Tensor, ...]) -> tuple[float, float, float]:
    """Relative errors of (value, gradient by h, gradient by w) against the truth; gradients by norm."""
    value = loss()
    got = (value.detach(), *torch.autograd.grad(value, (case.h, case.w)))
    off = [float(((a.double() - b).norm() / b.norm()).detach()) for a, b in zip(got, truth, strict=True)]
    return off[0], off[1], off[2]


def check(shape: Shape, compiled: bool) -> dict[str, str]:
    """{name: what is wrong} of the variants whose value or gradients are off, on a smaller case of the same kind.

    Right is: within 3 times eager PyTorch's own error against fp64 in the same dtype, plus 1e-5 (16 bits: 8 roundings).
    """
    case = Case(replace(CHECKED, form=shape.form, dtype=shape.dtype), seed=1)
    losses, _ = all_losses(case, compiled)
    truth = case.truth()
    plain = errors(case, losses["eager"], truth)
    floor = max(1e-5, 8 * torch.finfo(case.h.dtype).eps) if shape.dtype != "float32" else 1e-5
    wrong = {}
    for name, loss in losses.items():
        try:
            off = errors(case, loss, truth)
        except Exception as error:  # a rival that fails is reported, not timed
            wrong[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        bad = [
            f"{part} off by {e:.1e}, allowed {3 * p + floor:.1e}"
            for part, e, p in zip(("value", "gradient of h", "gradient of the head"), off, plain, strict=True)
            if not e <= 3 * p + floor
        ]
        if bad:
            wrong[name] = "; ".join(bad)
    return wrong


def estimates(shape: Shape, compiled: bool, wrong: Collection[str] = ()) -> dict[str, float]:
    """{name: about how many seconds one call takes}, a line through the times at 8 and 16 rows of a quarter of V.

    No more than a guard: one product in 16 bits that has no kernel of its own takes minutes at the whole size.
    """
    few, more, part = 8, 16, 4
    if shape.rows <= more or shape.vocab < part:
        return {}
    taken: dict[str, list[float]] = {}
    for rows in (few, more):
        calls = variants(compiled, **asdict(replace(shape, rows=rows, vocab=shape.vocab // part)))
        for name, seconds in in_turns({n: f for n, f in calls.items() if n not in wrong}, repeats=1).items():
            taken.setdefault(name, []).append(min(seconds))
    return {n: part * (a + (b - a) * (shape.rows - few) / (more - few)) for n, (a, b) in taken.items()}


def rows(shape: Shape, *, repeats: int, compiled: bool, limit: float, peaks: bool, note: Note) -> list[Row]:
    """One row a variant: seconds, spread, ratios to the floor and the faster eager form, peak bytes without gradients.

    A variant whose check is red, or one call of which takes longer than `limit` seconds, is noted and has no row.
    """
    case = title(shape)
    _, skipped = all_losses(Case(replace(shape, rows=8, vocab=128)), compiled)
    for name, why in skipped.items():
        note(f"{case}: {name} skipped: {why}")
    wrong = check(shape, compiled)
    for name, why in wrong.items():
        note(f"{case}: {name} is RED and is not timed: {why}")
    left_out = {name: guess for name, guess in estimates(shape, compiled, wrong).items() if guess > 3 * limit}
    for name, guess in left_out.items():
        note(f"{case}: {name} not timed: about {guess:,.0f} s a call, from a few rows of it")
    dropped = wrong.keys() | left_out.keys()
    calls = {name: f for name, f in variants(compiled, **asdict(shape)).items() if name not in dropped}
    seconds = in_turns(calls, repeats, limit=limit, whole=30.0)
    for name in calls.keys() - seconds.keys():
        note(f"{case}: {name} not timed: one call takes more than {limit:.0f} s")
    del calls
    floors = [median(s) for name, s in seconds.items() if name.startswith("floor")]
    floor = min(floors) if floors else None
    eager = min((median(seconds[name]) for name in ("eager", WIDENED) if name in seconds), default=None)
    found = []
    for name, taken in seconds.items():
        if name.startswith("floor"):
            continue
        middle = median(taken)
        found.append({
            "case": case, "variant": name, **timing(taken), "threads": torch.get_num_threads(),
            "over_floor": middle / floor if floor else None, "over_eager": middle / eager if eager else None,
            "peak_bytes": extra_peak(shape, name, compiled) if peaks else None, **asdict(shape),
        })  # fmt: skip
    return found


def extra_peak(shape: Shape, name: str, compiled: bool) -> int:
    """Peak bytes of one call in a fresh process above what was resident before, less the two gradients it returns."""
    arguments = {**asdict(shape), "compiled": compiled and "compile" in name, "choose": name}
    size = getattr(torch, shape.dtype).itemsize
    outputs = size * shape.hidden * (shape.rows + shape.vocab)
    return peak_in_process("potstill.bench.losses:variants", arguments, torch.get_num_threads()) - outputs
