"""The teacher's rows in the student's vocabulary, against a dense product with the map."""

import math

import potstill as ps
import pytest
import torch
from potstill.xtok import VocabBytes, project_topk

TEACHER = [b"ab", b"abc", b"c", b"zz", b"b", b" x", b"cab", b"</s>"]
STUDENT = [b"a", b"b", b"c", b" x", b"ab", b"ca"]


@pytest.fixture(scope="module")
def vocabularies():
    teacher = VocabBytes.from_callback(len(TEACHER), TEACHER.__getitem__, specials=[7])
    return teacher, VocabBytes.from_callback(len(STUDENT), STUDENT.__getitem__)


def dense_map(csr):
    row_ptr, columns, weights = csr
    out = torch.zeros(len(TEACHER), len(STUDENT), dtype=torch.float64)
    for row in range(len(TEACHER)):
        for n in range(row_ptr[row], row_ptr[row + 1]):
            out[row, columns[n]] += float(weights[n])
    return out


@pytest.mark.parametrize("decay", [0.0, 0.25])
@pytest.mark.parametrize("k", [None, 2, 6])
def test_projection_is_the_product_with_the_map(vocabularies, decay, k):
    csr = vocabularies[0].projection(vocabularies[1], 3, decay=decay)
    logits = torch.randn(5, len(TEACHER), dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    top = ps.topk(logits, 5)
    found = project_topk(top, csr, k=k)
    kept = torch.zeros(5, len(TEACHER), dtype=torch.float64).scatter(1, top.ids.long(), top.log_probs.exp())
    dense = kept @ dense_map(csr)
    for row in range(5):
        given = found.ids[row] >= 0
        ids, p = found.ids[row][given].long(), found.log_probs[row][given].exp()
        assert len(set(ids.tolist())) == len(ids) and (found.log_probs[row][~given] == -math.inf).all()
        torch.testing.assert_close(p, dense[row, ids], rtol=1e-6, atol=1e-12)
        order = dense[row].sort(descending=True).values[: len(ids)]
        torch.testing.assert_close(p.sort(descending=True).values, order, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(p.sum() + found.log_rest[row].exp(), torch.ones((), dtype=torch.float64))


def test_projected_kl_is_a_loss_like_any_other(vocabularies):
    csr = vocabularies[0].projection(vocabularies[1], 3, decay=0.0)
    g = torch.Generator().manual_seed(2)
    teacher = torch.randn(2, 4, len(TEACHER), dtype=torch.float64, generator=g)
    state = torch.randn(2, 4, 3, dtype=torch.float64, generator=g, requires_grad=True)
    weight = torch.randn(len(STUDENT), 3, dtype=torch.float64, generator=g)
    target = project_topk(ps.topk(teacher, len(TEACHER)), csr, k=len(STUDENT))
    assert target.ids.shape == (2, 4, len(STUDENT))
    got = ps.linear_distill_loss(state, ps.Head(weight), target, tail="drop")
    p, lq = teacher.softmax(-1) @ dense_map(csr), (state @ weight.T).log_softmax(-1)
    want = (torch.where(p > 0, p * (p.clamp(min=1e-300).log() - lq), 0.0)).sum(-1).mean()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    for a, b in zip(torch.autograd.grad(got, state), torch.autograd.grad(want, state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_refusals(vocabularies):
    csr = vocabularies[0].projection(vocabularies[1], 3)
    with pytest.raises(ValueError, match="needs TopK.log_rest"):
        project_topk(ps.TopK(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1)), csr)
    with pytest.raises(ValueError, match="the teacher has id 9, the map 8 rows"):
        project_topk(ps.TopK(torch.full((1, 1), 9, dtype=torch.int32), torch.zeros(1, 1), torch.zeros(1)), csr)
