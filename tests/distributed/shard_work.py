"""What each process does in test_shards.py."""

from __future__ import annotations

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
