"""Two hundred steps of a tiny model: the fused loss follows plain PyTorch's curve."""

from __future__ import annotations

from collections.abc import Callable

import potstill as ps
import pytest
import torch
import torch.nn.functional as F

from .tiny_model import tiny_llama

STEPS, BATCH, LENGTH, K = 200, 4, 24, 16
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def teacher():
    """(batches of tokens, the teacher's last hidden states, its head, its logits)."""
    model = tiny_llama(seed=1, layers=2)
    ids = torch.randint(0, 300, (8, BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out = [model(batch, output_hidden_states=True) for batch in ids]
    return ids, [o.hidden_states[-1] for o in out], ps.Head.from_model(model).detach(), [o.logits for o in out]


def curve(ids: torch.Tensor, loss_of: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Losses [STEPS] of a student of one layer under AdamW, fp32."""
    student = tiny_llama(seed=3, layers=1).train()
    optimiser = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        batch = step % len(ids)
        hidden = student.model(ids[batch]).last_hidden_state
        labels = F.pad(ids[batch][:, 1:], (0, 1), value=-100)
        loss = loss_of(hidden, student.lm_head.weight, batch, labels)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def follows(ours: torch.Tensor, plain: torch.Tensor) -> None:
    """Within 1 % at every step, of a curve that fell by half or more: a loss that does not train fails too."""
    assert plain[-8:].mean() < plain[:8].mean() / 2
    difference = ((ours - plain).abs() / plain).max().item()
    assert difference < 0.01, f"the curves differ by {difference:.2%}"


@pytest.mark.parametrize("words", [{}, dict(divergence="jsd", temperature=2.0, scale_by_t2=True)])
def test_beside_the_teacher(teacher, words):
    ids, hidden, head, logits = teacher
    t = words.get("temperature", 1.0)

    def fused(h, w, i, labels):
        return ps.linear_distill_loss(h, w, ps.HiddenTeacher(hidden[i], head), labels, ce_weight=0.2, **words)

    def plain(h, w, i, labels):
        z = h @ w.T
        lq, lp = (z / t).log_softmax(-1), (logits[i] / t).log_softmax(-1)
        if words:
            m = torch.log((lp.exp() + lq.exp()) / 2)
            rows = ((lp.exp() * (lp - m)).sum(-1) + (lq.exp() * (lq - m)).sum(-1)) / 2 * t * t
        else:
            rows = (lp.exp() * (lp - lq)).sum(-1)
        return rows[labels != -100].mean() + 0.2 * cross_entropy(z, labels)

    follows(curve(ids, fused), curve(ids, plain))


def test_from_top_k_rows(teacher):
    ids, _, _, logits = teacher
    rows = [ps.topk(z, K) for z in logits]

    def fused(h, w, i, labels):
        return ps.linear_distill_loss(h, w, rows[i], labels, tail="bucket", ce_weight=0.2)

    def plain(h, w, i, labels):
        z = h @ w.T
        p = logits[i].softmax(-1)
        top, at = p.topk(K, -1)
        q = z.softmax(-1)
        inside = q.gather(-1, at)
        outside = torch.ones_like(q, dtype=torch.bool).scatter(-1, at, False)
        rest_p, rest_q = (p * outside).sum(-1), (q * outside).sum(-1)
        kl = (top * (top / inside).log()).sum(-1) + rest_p * (rest_p / rest_q).log()
        return kl[labels != -100].mean() + 0.2 * cross_entropy(z, labels)

    follows(curve(ids, fused), curve(ids, plain))
