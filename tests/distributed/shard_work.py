"""What each process does in test_shards.py."""

from __future__ import annotations

import potstill as ps
import pytest
import torch
import torch.distributed as dist
from potstill import divergences, parts
from potstill.chunked import Wanted
from potstill.parts_inputs import PartTeacher, Shard
from potstill.rows import TAILS, RowSpec, Side
from whole_rows import whole_rows

N, D, DT, V, K = 11, 8, 6, 101, 9
NAMES = ("forward_kl", "jsd", "renyi", "total_variation")


def make(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bounds(rank: int, world: int) -> tuple[int, int]:
    """Ceiling division: 51 + 50 of 101 rows, or 34 + 34 + 33."""
    size = -(-V // world)
    return rank * size, min(V, (rank + 1) * size)


def engine(rank: int, world: int) -> None:
    hidden, weight, bias = make(N, D, seed=1), make(V, D, seed=2), make(V, seed=3)
    t_hidden, t_weight = make(N, DT, seed=4), make(V, DT, seed=5)
    logits = t_hidden @ t_weight.T
    labels = torch.arange(N) * 9 % V
    coef = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(6)) + 0.1
    coef[4] = 0
    log_probs, ids = logits.log_softmax(-1).topk(K)  # over all shards
    log_rest = logits.log_softmax(-1).scatter(1, ids, -torch.inf).logsumexp(-1)
    a, b = bounds(rank, world)
    want = Wanted(True, True, True)
    sparse = dict(ids=ids, log_probs=log_probs)
    forms = {
        "hidden": (dict(hidden=t_hidden, weight=t_weight), dict(hidden=t_hidden, weight=t_weight[a:b])),
        "logits": (dict(logits=logits), dict(logits=logits[:, a:b])),
        "bucket": (dict(**sparse, log_rest=log_rest),) * 2,
        "renormalize": (sparse, sparse),
        "drop": (sparse, sparse),
    }
    group = dist.group.WORLD.group_name
    for name in NAMES:
        for form, (whole, part) in forms.items():
            d = divergences.get(name)
            if d.outer and form == "drop":
                continue
            dense = form in ("hidden", "logits")
            spec = RowSpec(
                d, Side(V, 1.2, 9.0), Side(V) if dense else None, form if form in TAILS else "bucket",
                2.0 if dense else 1.0, 0.7, 0.4,
            )  # fmt: skip
            expected = whole_rows(hidden, weight, bias, whole, coef, labels, spec, 4)
            for tiled in (False, True):
                parts.CPU_TILE = 13
                args = (hidden, weight[a:b], bias[a:b], PartTeacher(**part), coef, labels)
                shard = Shard(V, a, group, tiled)
                out, stats, entries = parts.linear_parts(*args, spec, shard, 4, False, "auto")
                same = [torch.empty_like(out) for _ in range(world)]
                dist.all_gather(same, out)
                assert all(torch.equal(x, out) for x in same), "the loss differs between processes"
                got = parts.linear_parts_backward(*args, stats, entries, spec, shard, want, 4, False, "auto")
                where = f"{name} {form} tiled={tiled}"
                torch.testing.assert_close(out, expected[0], rtol=1e-10, atol=1e-12, msg=where)
                torch.testing.assert_close(got[0], expected[1], rtol=1e-9, atol=1e-12, msg=where)
                torch.testing.assert_close(got[1], expected[2][a:b], rtol=1e-9, atol=1e-12, msg=where)
                torch.testing.assert_close(got[2], expected[3][a:b], rtol=1e-9, atol=1e-12, msg=where)


def public(rank: int, world: int) -> None:
    """The public loss with a Head in shards: ids, labels and the padding of the last shard in one call each."""
    a, b = bounds(rank, world)
    last = rank == world - 1
    hidden = make(2, 6, D, seed=1).requires_grad_()
    weight, bias, t_weight = make(V, D, seed=2), make(V, seed=3), make(V, DT, seed=5)
    t_hidden = make(2, 6, DT, seed=4)
    labels = torch.arange(12).view(2, 6) * 9 % V
    labels[0, :2] = -100
    weights = torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(8)).requires_grad_()
    logits = t_hidden @ t_weight.T

    def shard(w: torch.Tensor, *more: torch.Tensor) -> ps.Head:
        pads = [torch.cat([x[a:b], x[:3] * 50]) if last else x[a:b].clone() for x in (w, *more)]
        pads = [x.requires_grad_() for x in pads]
        return ps.Head(*pads, softcap=9.0, vocab_size=V, vocab_start=a, group=dist.group.WORLD)

    whole = ps.Head(weight.clone().requires_grad_(), bias.clone().requires_grad_(), softcap=9.0)
    teachers = {
        "hidden": (
            ps.HiddenTeacher(t_hidden, ps.Head(t_weight, softcap=9.0)),
            ps.HiddenTeacher(t_hidden, shard(t_weight)),
        ),
        "logits": (ps.LogitsTeacher(logits),) * 2,
        "topk": (ps.topk(logits, K),) * 2,
        "none": (None, None),
    }
    for form, (one, ours) in teachers.items():
        for reduction in ("mean", "none"):
            words = dict(ce_weight=0.3, distill_weight=0.0 if form == "none" else 0.7, token_weights=weights)
            words |= dict(reduction=reduction, divergence="jsd", return_metrics=True)
            expected, metrics = ps.linear_distill_loss(hidden, whole, one, labels, **words)
            grads = torch.autograd.grad(expected.square().sum(), (hidden, weights, whole.weight, whole.bias))
            for low_memory in (False, True):
                head = shard(weight, bias)
                got, found = ps.linear_distill_loss(
                    hidden, head, ours, labels, chunk_rows=4, low_memory=low_memory, **words
                )
                torch.testing.assert_close(got, expected)
                torch.testing.assert_close(found, metrics)
                g = torch.autograd.grad(got.square().sum(), (hidden, weights, head.weight, head.bias))
                torch.testing.assert_close(g[:2], grads[:2])
                for x, y in zip(g[2:], grads[2:], strict=True):
                    torch.testing.assert_close(x[: b - a], y[a:b])
                    assert (x[b - a :] == 0).all(), "padding received a gradient"


def refused(rank: int, world: int) -> None:
    """Shards with a gap are an error in every process; so is what shards cannot serve."""
    group = dist.group.WORLD
    hidden, rows = make(3, D, seed=1), make(40, D, seed=2)
    teacher = ps.topk(make(3, 90, seed=3), 5)
    with pytest.raises(ValueError, match=r"\(0, 40\), \(50, 90\).*0..89"):
        ps.linear_distill_loss(hidden, ps.Head(rows, vocab_size=90, vocab_start=50 * rank, group=group), teacher)
    head = ps.Head(rows, vocab_size=80, vocab_start=40 * rank, group=group)
    teacher = ps.topk(make(3, 80, seed=3), 5)
    assert ps.linear_distill_loss(hidden, head, teacher) > 0
    with pytest.raises(ValueError, match="whole head"):
        ps.linear_topk(hidden, head, 3)
    with pytest.raises(ValueError, match="cut both vocabularies alike"):
        ps.linear_distill_loss(hidden, head, ps.HiddenTeacher(hidden, ps.Head(make(80, D, seed=4))))
    with pytest.raises(ValueError, match="whole head"):
        ps.linear_distill_loss(hidden, ps.Head(make(80, D, seed=4)), ps.HiddenTeacher(hidden, head))
    with pytest.raises(ValueError, match="vocab_start, group.*vocab_size is None"):
        ps.Head(rows, vocab_start=0, group=group)
    with pytest.raises(ValueError, match="a head in shards.*not a Mix.*materialized_head"):
        mix = ps.Mix([(0.5, ps.Student()), (0.5, ps.LogitsTeacher(make(3, 80, seed=5)))])
        ps.linear_distill_loss(hidden, head, mix)
