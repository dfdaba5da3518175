"""The vocabulary in parts against the whole one: tiles of any size give the same numbers and the same gradients."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import potstill as ps
import pytest
import torch
from potstill import divergences, parts
from potstill.arguments import Call
from potstill.chunked import Wanted
from potstill.parts_inputs import PartTeacher, Shard
from potstill.rows import TAILS, RowSpec, Side
from torch.library import opcheck

from .whole_rows import whole_rows

N, D, DT, V, PADDED, K = 13, 8, 6, 101, 107, 7
WANT = Wanted(True, True, True)


class Rows:
    """A student and every teacher; two rows do not count and hold NaN."""

    def __init__(self, seed=0, dtype=torch.float64):
        g = torch.Generator().manual_seed(seed)

        def make(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        self.hidden, self.weight, self.bias = make(N, D), make(PADDED, D), make(PADDED)
        self.t_hidden, self.t_weight, self.t_bias = make(N, DT), make(PADDED, DT), make(PADDED)
        self.logits = self.t_hidden @ self.t_weight.T + self.t_bias
        self.labels = torch.randint(0, V, (N,), generator=g)
        self.coef = torch.rand(N, generator=g, dtype=torch.float64).to(dtype) + 0.1
        self.coef[3:5] = 0
        self.hidden[3:5] = self.t_hidden[3:5] = float("nan")
        lp = self.logits[:, :V].log_softmax(-1)
        self.log_probs, self.ids = lp.topk(K)
        self.log_rest = lp.scatter(1, self.ids, -torch.inf).logsumexp(-1)
        self.ids[1, -2:], self.log_probs[1, -2:] = -1, -torch.inf
        self.weights = torch.rand(N, K, generator=g, dtype=torch.float64).to(dtype) + 0.2

    def teacher(self, form):
        if form == "hidden":
            return dict(hidden=self.t_hidden, weight=self.t_weight, bias=self.t_bias)
        if form == "logits":
            return dict(logits=self.logits)
        return dict(
            ids=self.ids,
            log_probs=self.log_probs if form != "renormalize" else self.log_probs.log_softmax(-1),
            log_rest=self.log_rest if form == "bucket" else None,
        )

    def whole(self, form, spec, rows=5, backend="torch"):
        teacher = dict(self.teacher(form), weights=self.weights if form == "sampled" else None)
        return whole_rows(self.hidden, self.weight, self.bias, teacher, self.coef, self.labels, spec, rows, backend)

    def tiled(self, form, spec, rows=5, backend="torch", tiled=True):
        teacher = PartTeacher(**self.teacher(form), weights=self.weights if form == "sampled" else None)
        args = (self.hidden, self.weight, self.bias, teacher, self.coef, self.labels)
        shard = Shard(V, tiled=tiled)
        out, stats, entries = parts.linear_parts(*args, spec, shard, rows, False, backend)
        return out, *parts.linear_parts_backward(*args, stats, entries, spec, shard, WANT, rows, False, backend)


def spec_for(form, name, temperature=1.0, ce=0.0, softcap=0.0, scale=1.0):
    teacher = Side(V, 1.1, 9.0 if softcap else 0.0) if form in ("hidden", "logits") else None
    tail = form if form in TAILS else "bucket"
    return RowSpec(divergences.TABLE[name], Side(V, scale, softcap), teacher, tail, temperature, 0.6, ce)


CASES = [(1.0, 0.0, 0.0, 1.0), (2.0, 0.3, 0.0, 0.7), (1.0, 0.5, 8.0, 1.3), (0.7, 0.4, 8.0, -0.5)]


@pytest.mark.parametrize("name", divergences.names())
@pytest.mark.parametrize("form", ["hidden", "logits", "bucket", "renormalize", "drop"])
def test_tiles_give_what_the_whole_vocabulary_gives(form, name, monkeypatch, poisoned):
    """Every divergence, teacher, tail; temperatures, cross-entropy, softcap, scale, padding and ignored rows."""
    rows = Rows()
    modes = itertools.cycle([("torch", True), ("auto", True), ("auto", False)])
    for (temperature, ce, softcap, scale), tile in zip(CASES, (17, 40, 100, 64), strict=True):
        monkeypatch.setattr(parts, "CPU_TILE", tile)
        spec = spec_for(form, name, temperature, ce, softcap, scale)
        if spec.divergence.outer and form == "drop":
            continue
        expected = rows.whole(form, spec, backend="auto")
        for backend, tiled in itertools.islice(modes, 2):
            for a, b in zip(rows.tiled(form, spec, backend=backend, tiled=tiled), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tile", [1, V - 1, V, 4096])
def test_any_tile_and_chunk(tile, monkeypatch):
    rows = Rows()
    monkeypatch.setattr(parts, "CPU_TILE", tile)
    for form, chunk in (("hidden", 1), ("bucket", 100), ("logits", 4)):
        spec = spec_for(form, "jsd", 1.0, 0.3)
        expected = rows.whole(form, spec)
        for a, b in zip(rows.tiled(form, spec, chunk, "auto"), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["forward_kl", "k1", "k2", "k3"])
def test_sampled_entries(name, monkeypatch):
    rows = Rows()
    monkeypatch.setattr(parts, "CPU_TILE", 30)
    spec = spec_for("sampled", name, 1.0, 0.5)
    for a, b in zip(rows.tiled("sampled", spec, backend="auto"), rows.whole("sampled", spec), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_cross_entropy_alone(monkeypatch):
    """No teacher: labels only."""
    rows = Rows()
    monkeypatch.setattr(parts, "CPU_TILE", 30)
    args = (rows.hidden, rows.weight, rows.bias, PartTeacher(), rows.coef, rows.labels)
    spec, shard = spec_for("drop", "forward_kl", 2.0, 0.5, 6.0), Shard(V)
    out, stats, entries = parts.linear_parts(*args, spec, shard, 4, False, "auto")
    grads = parts.linear_parts_backward(*args, stats, entries, spec, shard, WANT, 4, False, "auto")
    live = rows.coef != 0
    leaves = [x.clone().requires_grad_() for x in (rows.hidden, rows.weight, rows.bias)]
    z = 6.0 * torch.tanh((leaves[0][live] @ leaves[1].T + leaves[2])[:, :V] / 6.0)
    ce = torch.nn.functional.cross_entropy(z, rows.labels[live], reduction="none")
    torch.testing.assert_close(out[:, live], torch.stack([0 * ce, ce]))
    for a, b in zip(grads, torch.autograd.grad((rows.coef[live] * 0.5 * ce).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["hidden", "bucket"])
def test_narrow_inputs_are_no_worse_than_the_default_path(form, dtype, monkeypatch, no_worse):
    rows, narrow = Rows(), Rows(dtype=dtype)
    for name in ("hidden", "weight", "bias", "t_hidden", "t_weight", "t_bias", "coef"):
        setattr(rows, name, getattr(narrow, name).double())
    for name in ("log_probs", "log_rest"):
        setattr(narrow, name, getattr(rows, name).float())
    narrow.coef = rows.coef.float()
    monkeypatch.setattr(parts, "CPU_TILE", 37)
    spec = spec_for(form, "reverse_kl", 1.0 if form == "bucket" else 2.0, 0.4)
    truth, plain = rows.whole(form, spec), narrow.whole(form, spec, backend="auto")
    for a, b, t in zip(narrow.tiled(form, spec, backend="auto"), plain, truth, strict=True):
        assert a.dtype == b.dtype
        no_worse(a, b, t, 4e-6)


def test_a_weights_gradient_is_summed_in_fp32_over_chunks(bf16_products):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(512, 32, generator=g).bfloat16(), torch.randn(90, 32, generator=g).bfloat16()
    teacher = PartTeacher(logits=torch.randn(512, 90, generator=g) * 3)
    spec, shard, coef = RowSpec(divergences.get("forward_kl"), Side(90), Side(90)), Shard(90), torch.ones(512) / 512
    grads = {}
    for rows in (1, 512):
        args = (hidden, weight, None, teacher, coef, None)
        _, stats, entries = parts.linear_parts(*args, spec, shard, rows, False, "auto")
        grads[rows] = parts.linear_parts_backward(*args, stats, entries, spec, shard, WANT, rows, False, "auto")[1]
    apart = ((grads[1] - grads[512]).float().norm() / grads[512].float().norm()).item()
    if bf16_products == "native":  # each chunk's product is rounded, once; a sum in bf16 would be 1e-2 apart
        assert apart < 3e-3
        return
    torch.testing.assert_close(grads[1], grads[512], rtol=1e-2, atol=1e-6)
    assert apart < 1e-3


# ---- the public loss


def low_memory(hidden, weight, bias, teacher, labels, **words):
    head = ps.Head(weight, bias, softcap=7.0, logit_scale=0.8, vocab_size=V)
    return ps.linear_distill_loss(hidden, head, teacher, labels, low_memory=True, chunk_rows=4, **words)


@pytest.mark.parametrize("form", ["hidden", "topk", "none"])
def test_gradcheck_of_low_memory(form, monkeypatch):
    monkeypatch.setattr(parts, "CPU_TILE", 23)
    rows = Rows()
    live = rows.coef != 0
    teacher = {
        "hidden": ps.HiddenTeacher(rows.t_hidden[live], ps.Head(rows.t_weight, rows.t_bias, vocab_size=V)),
        "topk": ps.topk(rows.logits[live][:, :V], K),
        "none": None,
    }[form]
    leaves = [x.clone().requires_grad_() for x in (rows.hidden[live], rows.weight, rows.bias)]
    for reduction, name in (("mean", "forward_kl"), ("none", "jsd"), ("mean", "renyi")):
        words = dict(divergence=name, ce_weight=0.3, reduction=reduction, distill_weight=float(form != "none"))
        torch.autograd.gradcheck(
            lambda *x, words=words: low_memory(*x, teacher, rows.labels[live], **words),
            leaves,
            fast_mode=True,
            atol=1e-6,
        )


@pytest.mark.parametrize("form", ["hidden", "topk", "none"])
def test_opcheck_and_compile(form):
    hidden, weight = torch.randn(6, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    logits, labels = torch.randn(6, V), torch.randint(0, V, (6,))
    labels[2] = -100
    teacher = {
        "hidden": ps.HiddenTeacher(torch.randn(6, DT), ps.Head(torch.randn(V, DT))), "topk": ps.topk(logits, K),
        "none": None,
    }[form]  # fmt: skip
    call = Call(
        hidden.shape[:1], hidden, Side(V), teacher, labels, divergence="jsd", temperature=1.0,
        teacher_temperature=None, tail="bucket", scale_by_t2=False, distill_weight=float(form != "none"),
        ce_weight=0.3, token_weights=None, ignore_index=-100, reduction="sum", num_items=None, return_metrics=False,
        backend="auto", chunk_rows=4, precise=False,
    )  # fmt: skip
    op = torch.ops.potstill.linear_distill_parts.default
    opcheck(op, (hidden, weight, None, *call.arguments(call.live()), 0, "", True, True, True, False))

    def loss(h, w):
        return ps.linear_distill_loss(
            h, w, teacher, labels, ce_weight=0.3, distill_weight=float(form != "none"), low_memory=True
        )

    a, b = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight), loss(hidden, weight)
    torch.testing.assert_close(a, b)
    for x, y in zip(torch.autograd.grad(a, (hidden, weight)), torch.autograd.grad(b, (hidden, weight)), strict=True):
        torch.testing.assert_close(x, y)


def test_low_memory_refuses_what_needs_whole_rows():
    hidden, weight, teacher = torch.randn(6, D), torch.randn(V, D), ps.LogitsTeacher(torch.randn(6, V))
    words = dict(low_memory=True)
    with pytest.raises(ValueError, match="low_memory=True takes.*not a Mix; leave low_memory out"):
        ps.linear_distill_loss(hidden, weight, ps.Mix([(0.5, ps.Student()), (0.5, teacher)]), **words)
    with pytest.raises(ValueError, match="sums, not 'adaptive_kl'"):
        ps.linear_distill_loss(hidden, weight, teacher, divergence="adaptive_kl", **words)
    with pytest.raises(ValueError, match="'distill' and 'ce' only, not 'acceptance'"):
        ps.linear_distill_loss(hidden, weight, teacher, return_metrics=("acceptance",), **words)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        h = hidden.clone().requires_grad_()
        (g,) = torch.autograd.grad(ps.linear_distill_loss(h, weight, teacher, **words), h, create_graph=True)
        g.sum().backward()


def test_the_peak_grows_neither_with_the_rows_nor_with_the_vocabulary():
    """Peak resident bytes beyond the inputs; outputs are 3 MB, the default path's two buffers of 512 x V 400 MB."""
    script = Path(__file__).with_name("peak_work.py")
    # blocks from a megabyte on go back when they are freed: kept ones would be counted, or not, by chance
    allocator = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 17)}
    done = subprocess.run([sys.executable, script], env=os.environ | allocator, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, wide, tall, default = (x / 2**20 for x in json.loads(done.stdout))
    assert small < 60, "two tiles of 512 x 4096 are 16 MB"
    assert wide < small + 8 and tall < small + 8, (small, wide, tall)
    assert default > 5 * wide, (default, wide)
