"""ALM, ULD and the hybrid against formulas in fp64 over whole matrices, in value and gradient."""

import math

import mpmath
import potstill as ps
import pytest
import torch
from potstill.xtok import (
    Aligner,
    VocabBytes,
    alm_loss,
    first_rows,
    gold_loss,
    linear_alm_loss,
    merged_rows,
    next_token_log_probs,
    uld_loss,
)
from potstill.xtok.alm import WEIGHTS
from potstill.xtok.coins import DIVERGENCES, EPS, log1mexp
from potstill.xtok.uld import uld_full

WORDS = [bytes([97 + n]) * m for n in range(4) for m in (1, 2, 3)]  # a, aa, aaa, b, ...
LETTERS = [b"a", b"b", b"c", b"d", b"ab", b"bb", b"cc"]


def vocab(tokens):
    return VocabBytes.from_callback(len(tokens), tokens.__getitem__)


@pytest.fixture
def pair():
    """Two rows in two tokenizers, hidden states and heads: fp64."""
    generator = torch.Generator().manual_seed(4)
    students = [[0, 4, 7, 2, 10, 3], [1, 5, 8]]
    teachers = [[LETTERS.index(bytes([c])) for n in row for c in WORDS[n]] for row in students]
    alignment = Aligner(vocab(WORDS), vocab(LETTERS))(students, teachers)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    ids = [torch.tensor(sum(rows, [])) for rows in (students, teachers)]
    return alignment, ids, [normal(len(i), 5) for i in ids], [normal(len(WORDS), 5), normal(len(LETTERS), 5)]


def plain_log_probs(hidden, weight, ids, ptr):
    """log_softmax of the row before each token; 0 for a row's first."""
    table = (hidden @ weight.T).log_softmax(-1)
    rows = [
        torch.cat([table.new_zeros(1), table[a : b - 1].gather(1, ids[a + 1 : b, None])[:, 0]])
        for a, b in zip(ptr[:-1], ptr[1:], strict=True)
    ]
    return torch.cat(rows)


def coins(a, b, divergence, alpha=2.0):
    """Divergence of two coins with log-probabilities a and b of heads, written out."""
    p, q = a.exp(), b.exp()
    if divergence == "forward_kl":
        return p * (a - b) + (1 - p) * ((1 - p) / (1 - q)).log()
    if divergence == "soft_cross_entropy":
        return -(p * b + (1 - p) * (1 - q).log())
    if divergence == "reverse_kl":
        return q * (b - a) + (1 - q) * ((1 - q) / (1 - p)).log()
    if divergence == "total_variation":
        return (p - q).abs()
    if divergence == "squared":
        return (a - b) ** 2 / 2
    return (p**alpha * q ** (1 - alpha) + (1 - p) ** alpha * (1 - q) ** (1 - alpha)).log() / (alpha - 1)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tau", [1.0, 30.0])
def test_alm_equals_its_formula(pair, divergence, weights, tau):
    alignment, ids, hidden, head = pair
    student, weight = hidden[0].clone().requires_grad_(), head[0].clone().requires_grad_()
    teacher = plain_log_probs(hidden[1], head[1], ids[1], alignment.teacher_ptr)
    loss = linear_alm_loss(student, ps.Head(weight), ids[0], teacher, alignment, divergence=divergence,
                           weights=weights, tau=tau)  # fmt: skip
    got = torch.autograd.grad(loss, (student, weight))

    log_probs = plain_log_probs(student, weight, ids[0], alignment.student_ptr)
    total, norm = 0.0, 0.0
    for row in range(alignment.num_rows):
        s_at, t_at = int(alignment.student_ptr[row]), int(alignment.teacher_ptr[row])
        for s0, s1, t0, t1 in alignment.chunks(row):
            if s0 == 0:
                continue  # nothing predicts a row's first token
            b = log_probs[s_at + s0 : s_at + s1].sum() / tau - EPS
            a = teacher[t_at + t0 : t_at + t1].sum() / tau - EPS
            w = {"chunk": 1.0, "token": s1 - s0, "log": 1 + math.log(s1 - s0)}[weights]
            total = total + w * coins(a, b, divergence)
            norm += w
    want = torch.autograd.grad(total / norm, (student, weight))
    torch.testing.assert_close(loss, (total / norm).detach(), rtol=1e-9, atol=1e-12)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_alm_limit_of_tau(pair, divergence):
    alignment, ids, hidden, head = pair
    teacher = plain_log_probs(hidden[1], head[1], ids[1], alignment.teacher_ptr) - 0.3
    student = plain_log_probs(hidden[0], head[0], ids[0], alignment.student_ptr) - 0.2
    if divergence in ("soft_cross_entropy", "squared"):
        limit = alm_loss(student, teacher, alignment, divergence=divergence, tau=math.inf)
        assert torch.isfinite(limit)
        return
    tau = 1e5
    far = tau * alm_loss(student, teacher, alignment, divergence=divergence, tau=tau)
    limit = alm_loss(student, teacher, alignment, divergence=divergence, tau=math.inf)
    torch.testing.assert_close(far, limit, rtol=0.2 if divergence == "renyi" else 0.1, atol=1e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tau", [1.0, 100.0, math.inf])
@pytest.mark.parametrize(
    "student, teacher", [(0.0, 0.0), (0.0, -3.0), (-3.0, 0.0), (-1e-9, -1e-7), (-200.0, -0.1), (-0.1, -200.0)]
)
def test_alm_is_finite_at_the_edges(pair, divergence, tau, student, teacher):
    alignment, ids, _, _ = pair
    log_probs = torch.full((len(ids[0]),), student, requires_grad=True)
    loss = alm_loss(log_probs, torch.full((len(ids[1]),), teacher), alignment, divergence=divergence, tau=tau)
    (grad,) = torch.autograd.grad(loss, log_probs)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "soft_cross_entropy"])
def test_alm_is_zero_with_zero_gradient_at_equality(divergence):
    v = vocab(LETTERS)
    alignment = Aligner(v, v)([0, 1, 2, 3], [0, 1, 2, 3])
    student = torch.tensor([-0.5, -1e-7, -3.0, -40.0], requires_grad=True)
    loss = alm_loss(student, student.detach(), alignment, divergence=divergence, tau=10.0)
    loss.backward()
    assert loss.abs() < 1e-6 and student.grad.abs().max() < 1e-6


def test_log1mexp_near_and_far():
    x = -torch.logspace(-12, 2, 200, dtype=torch.float64)
    x.requires_grad_()
    value = log1mexp(x)
    with mpmath.workdps(60):
        exact = [float(mpmath.log(1 - mpmath.exp(mpmath.mpf(at)))) for at in x.tolist()]
    torch.testing.assert_close(value, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(slope, -1 / torch.expm1(-x.detach()), rtol=1e-12, atol=0)


def test_alm_leaves_out_what_is_not_valid_and_may_be_empty(tokens):
    a, b = tokens([b"ab", b"XX", b"cd", "</s>"]), tokens([b"ab", b"Y", b"cd", "</s>"])
    v = tokens.vocab()
    alignment = Aligner(v, v)(a, b)
    assert alignment.valid.tolist() == [True, False, True, False]
    student = torch.full((4,), -1.0, requires_grad=True)
    each = alm_loss(student, torch.full((4,), -2.0), alignment, reduction="none")
    assert (each > 0).tolist() == [True, False, True, False]
    loss = alm_loss(student, torch.full((4,), -2.0), alignment)
    torch.testing.assert_close(loss, each[0])
    loss.backward()
    assert (student.grad != 0).tolist() == [True, False, True, False]
    none = alm_loss(student, torch.full((4,), -2.0), alignment, chunk_mask=torch.zeros(4, dtype=torch.bool))
    (grad,) = torch.autograd.grad(none, student)
    assert none == 0 and (grad == 0).all()
    assert alm_loss(student, torch.full((4,), -2.0), alignment, num_items=8) == each.sum() / 8


def test_alm_boundary_log_probs_are_added_at_chunk_ends(pair):
    alignment, ids, _, _ = pair
    student, teacher = -torch.rand(len(ids[0])), -torch.rand(len(ids[1]))
    ends = -torch.rand(len(ids[0])), -torch.rand(len(ids[1]))
    by_hand = []
    for row in range(alignment.num_rows):
        s_at, t_at = int(alignment.student_ptr[row]), int(alignment.teacher_ptr[row])
        for s0, s1, t0, t1 in alignment.chunks(row):
            b = student[s_at + s0 : s_at + s1].sum() + ends[0][s_at + s1 - 1]
            a = teacher[t_at + t0 : t_at + t1].sum() + ends[1][t_at + t1 - 1]
            by_hand.append((a - b) ** 2 / 2 / 100)
    got = alm_loss(student, teacher, alignment, divergence="squared", tau=10.0, boundary_log_probs=ends)
    torch.testing.assert_close(got, torch.stack(by_hand).mean(), rtol=1e-4, atol=1e-7)


def test_pitfall_32_logits_are_read_at_the_token_before(pair):
    """The state before a token predicts it: shifted states give another value, and the last state no gradient."""
    alignment, ids, hidden, head = pair
    state = hidden[0].clone().requires_grad_()
    got = next_token_log_probs(state, head[0], ids[0], alignment.student_ptr)
    torch.testing.assert_close(got, plain_log_probs(hidden[0], head[0], ids[0], alignment.student_ptr))
    (grad,) = torch.autograd.grad(got.sum(), state)
    last = alignment.student_ptr[1:] - 1
    assert (grad[last] == 0).all() and (grad.abs().sum(1) > 0).sum() == len(grad) - len(last)
    square = torch.randn(2, 3, 5, dtype=torch.float64)
    batch = next_token_log_probs(square, head[0], torch.tensor([[0, 1, 2], [3, 4, 5]]))
    torch.testing.assert_close(batch[3:], plain_log_probs(square[1], head[0], torch.tensor([3, 4, 5]), [0, 3]))
    rows = first_rows(alignment)
    for s, t, chunk in zip(*(side.tolist() for side in rows), strict=True):
        row = int(torch.searchsorted(alignment.row_ptr, chunk, right=True)) - 1
        s0, t0 = alignment.spans[chunk, :, 0].tolist()
        assert (s, t) == (s0 - 1 + int(alignment.student_ptr[row]), t0 - 1 + int(alignment.teacher_ptr[row]))
        assert s0 > 0 and t0 > 0


def test_uld_equals_the_full_sort_when_k_is_the_vocabulary():
    torch.manual_seed(1)
    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, 20, dtype=torch.float64)
    got = uld_loss(hidden, ps.Head(weight), ps.topk(teacher, 20), reduction="none")
    want = uld_full(hidden @ weight.T, teacher)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got.sum(), (hidden, weight)), torch.autograd.grad(want.sum(), (hidden, weight)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(g, w, rtol=1e-7, atol=1e-10)
    short = uld_loss(hidden, ps.Head(weight), ps.topk(teacher, 5), reduction="none")
    assert (short <= want + 1e-12).all()
    weights = torch.tensor([0.0, 1, 2, 0, 0, 0, 0])
    mean = uld_loss(hidden, ps.Head(weight), ps.topk(teacher, 20), row_weights=weights)
    torch.testing.assert_close(mean, (want[1] + 2 * want[2]) / 3)


@pytest.mark.parametrize("merge", ["observed", "bayesian"])
def test_uld_of_merged_rows(pair, merge):
    """Rows times the probability of the chunk's other tokens, on both sides, against whole tables."""
    alignment, ids, hidden, head = pair
    states = [h.clone().requires_grad_() for h in hidden[:1]]
    tables = [(h @ w.T).log_softmax(-1) for h, w in zip((states[0], hidden[1]), head, strict=True)]
    ptrs = alignment.student_ptr, alignment.teacher_ptr
    tokens = [
        plain_log_probs(h, w, i, ptr) for h, w, i, ptr in zip((states[0], hidden[1]), head, ids, ptrs, strict=True)
    ]
    pairs = merged_rows(alignment, *tokens, merge)
    want = []
    for row in range(alignment.num_rows):
        for s0, s1, t0, t1 in alignment.chunks(row):
            if s0 == 0:
                continue
            sides = []
            for (start, end), ptr, table, own in zip(((s0, s1), (t0, t1)), ptrs, tables, tokens, strict=True):
                at = int(ptr[row])
                base = start if merge == "observed" else end - 1
                rest = [own[at + n] for n in range(start, end) if n != base]
                sides.append((table[at + base - 1] + sum(rest)).exp())
            want.append(uld_sorted(*sides))
    want = torch.stack(want)
    teacher = ps.topk(hidden[1][pairs.teacher] @ head[1].T, len(LETTERS))
    got = uld_loss(states[0][pairs.student], ps.Head(head[0]), teacher, k=len(WORDS), reduction="none",
                   scales=(pairs.student_scale, pairs.teacher_scale))  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    (g,), (w,) = (torch.autograd.grad(x.sum(), states, retain_graph=True) for x in (got, want))
    torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-8)


def uld_sorted(q, p):
    """The larger side's entries beyond the other's size are taken together, as uld_loss does."""
    q, p = (side.sort(descending=True).values for side in (q, p))
    width = min(len(q), len(p))
    return (q[:width] - p[:width]).abs().sum() + (q[width:].sum() - p[width:].sum()).abs()


def between(p, q, divergence):
    """One entry's part of a divergence of q from p."""
    if divergence == "forward_kl":
        return p * (p / q).log()
    if divergence == "reverse_kl":
        return q * (q / p).log()
    w = divergence.values[0]
    m = w * p + (1 - w) * q
    return w * p * (p / m).log() + (1 - w) * q * (q / m).log()


def dense_gold(alignment, student, teacher, ids, matched, merge, divergence):
    """The hybrid from whole tables of log-probabilities, one chunk after another."""
    own = dict(zip(matched[1].tolist(), matched[0].tolist(), strict=True))
    losses = []
    for row in range(alignment.num_rows):
        s_at, t_at = int(alignment.student_ptr[row]), int(alignment.teacher_ptr[row])
        for s0, s1, t0, t1 in alignment.chunks(row):
            if s0 == 0:
                continue
            at, scaled = ((s0, t0), ((s0 + 1, s1), (t0 + 1, t1)))
            if merge == "bayesian":
                at, scaled = ((s1 - 1, t1 - 1), ((s0, s1 - 1), (t0, t1 - 1)))
            lq, lp = student[s_at + at[0] - 1], teacher[t_at + at[1] - 1]
            if merge:
                lq = lq + sum(student[s_at + n - 1, ids[0][s_at + n]] for n in range(*scaled[0]))
                lp = lp + sum(teacher[t_at + n - 1, ids[1][t_at + n]] for n in range(*scaled[1]))
            q, p = lq.exp(), lp.exp()
            both = [(p[t], q[s]) for t, s in own.items()]
            rest = (1 - sum(x for x, _ in both), 1 - sum(y for _, y in both))
            kl = sum(between(x, y, divergence) for x, y in [*both, rest])
            alone_q = torch.stack([q[n] for n in range(len(q)) if n not in own.values()] or [q.new_zeros(())])
            alone_p = torch.stack([p[n] for n in range(len(p)) if n not in own] or [p.new_zeros(())])
            width = max(len(alone_q), len(alone_p))
            pad = [
                torch.nn.functional.pad(x.sort(descending=True).values, (0, width - len(x))) for x in (alone_q, alone_p)
            ]
            losses.append(kl + (pad[0] - pad[1]).abs().sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", ps.divergences.jsd(teacher_weight=0.3)], ids=str)
@pytest.mark.parametrize("merge", ["observed", "bayesian", None])
def test_gold_equals_its_formula(pair, merge, divergence):
    alignment, ids, hidden, head = pair
    # the same number of entries on both sides, so that top-k with k = V is everything
    weight = head[0][: len(LETTERS)].clone().requires_grad_()
    student_vocab, teacher_vocab = vocab(WORDS[: len(LETTERS)]), vocab(LETTERS)
    students = [[0, 3, 6, 1], [4, 2]]
    teachers = [[LETTERS.index(bytes([c])) for n in row for c in WORDS[n]] for row in students]
    alignment = Aligner(student_vocab, teacher_vocab)(students, teachers)
    ids = [torch.tensor(sum(rows, [])) for rows in (students, teachers)]
    torch.manual_seed(2)
    state = torch.randn(len(ids[0]), 5, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(len(ids[1]), len(LETTERS), dtype=torch.float64)
    table = logits.log_softmax(-1)
    teacher_log_probs = torch.cat([table.new_zeros(1), table[:-1].gather(1, ids[1][1:, None])[:, 0]])
    matched = student_vocab.matched(teacher_vocab)
    assert len(matched[0]) == 4  # a, b, bb, c
    got = gold_loss(state, ps.Head(weight), ids[0], ps.topk(logits, len(LETTERS)), alignment, matched, merge=merge,
                    divergence=divergence, teacher_log_probs=teacher_log_probs)  # fmt: skip
    want = dense_gold(alignment, (state @ weight.T).log_softmax(-1), table, ids, matched, merge, divergence)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    for g, w in zip(torch.autograd.grad(got, (state, weight)), torch.autograd.grad(want, (state, weight)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-8)


def test_gold_is_forward_kl_for_equal_vocabularies():
    v = vocab(LETTERS)
    ids = [0, 1, 4, 2, 5]
    alignment = Aligner(v, v)(ids, ids)
    torch.manual_seed(3)
    state, weight, logits = torch.randn(5, 4), torch.randn(7, 4), torch.randn(5, 7)
    got = gold_loss(state, ps.Head(weight), torch.tensor(ids), ps.topk(logits, 7), alignment, v.matched(v), merge=None)
    want = ps.distill_loss((state @ weight.T)[:-1], ps.LogitsTeacher(logits[:-1]))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_gold_leaves_out_missing_entries():
    """A short row of the teacher (id -1) adds nothing, whatever the last id is matched to."""
    v = vocab(LETTERS)
    ids = [0, 1, 4, 2, 5]
    alignment, matched = Aligner(v, v)(ids, ids), v.matched(v)
    torch.manual_seed(5)
    state, weight, logits = torch.randn(5, 4), torch.randn(7, 4), torch.randn(5, 7)
    short = ps.topk(logits, 3)
    padded = ps.TopK(
        torch.cat([short.ids, torch.full((5, 2), -1, dtype=torch.int32)], 1),
        torch.cat([short.log_probs, torch.full((5, 2), -math.inf)], 1), short.log_rest,
    )  # fmt: skip
    values = [
        gold_loss(state, ps.Head(weight), torch.tensor(ids), top, alignment, matched, merge=None)
        for top in (short, padded)
    ]
    torch.testing.assert_close(*values)


def test_gold_refuses_what_is_no_sum():
    with pytest.raises(ValueError, match="is no sum over the vocabulary"):
        gold_loss(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1), None, None, None, divergence="renyi")


@pytest.mark.parametrize("merge_below", [None, 0.2])
def test_linear_alm_with_debiased_ends(pair, merge_below):
    """Each chunk times the probability that a word ends behind it, on both sides, in value and gradient."""
    alignment, ids, hidden, head = pair
    starts = torch.tensor([word.startswith((b"a", b"c")) for word in WORDS])  # stands for whitespace
    student, weight = hidden[0].clone().requires_grad_(), head[0].clone().requires_grad_()
    teacher = plain_log_probs(hidden[1], head[1], ids[1], alignment.teacher_ptr)
    teacher_ends = (hidden[1] @ head[1].T).log_softmax(-1)[:, :2].logsumexp(-1)
    loss = linear_alm_loss(student, ps.Head(weight), ids[0], teacher, alignment, tau=1.0, word_starts=starts,
                           teacher_boundary=teacher_ends, merge_below=merge_below)  # fmt: skip
    got = torch.autograd.grad(loss, (student, weight))

    log_probs = plain_log_probs(student, weight, ids[0], alignment.student_ptr)
    ends = (student @ weight.T).log_softmax(-1)[:, starts].logsumexp(-1)
    terms = []
    for row in range(alignment.num_rows):
        s_at, t_at = int(alignment.student_ptr[row]), int(alignment.teacher_ptr[row])
        chunks, opened = [], None
        for s0, s1, t0, t1 in alignment.chunks(row):
            opened = opened or (s0, t0)
            least = min(ends[s_at + s1 - 1].item(), teacher_ends[t_at + t1 - 1].item())
            likely = least >= math.log(merge_below or 1e-9)
            if likely or (s1, t1) == alignment.chunks(row)[-1][1::2]:
                chunks.append((opened[0], s1, opened[1], t1))
                opened = None
        for s0, s1, t0, t1 in chunks:
            if s0 > 0:
                b = log_probs[s_at + s0 : s_at + s1].sum() + ends[s_at + s1 - 1] - EPS
                a = teacher[t_at + t0 : t_at + t1].sum() + teacher_ends[t_at + t1 - 1] - EPS
                terms.append(coins(a, b, "forward_kl"))
    assert (len(terms) < int((alignment.spans[:, 0, 0] > 0).sum())) == (merge_below is not None)
    want = torch.stack(terms).mean()
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-12)
    for g, w in zip(got, torch.autograd.grad(want, (student, weight)), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-12)


def test_debiasing_needs_both_sides(pair):
    alignment, ids, hidden, head = pair
    args = hidden[0], ps.Head(head[0]), ids[0], torch.zeros(len(ids[1])), alignment
    with pytest.raises(ValueError, match="word_starts and teacher_boundary go together"):
        linear_alm_loss(*args, word_starts=torch.ones(len(WORDS), dtype=torch.bool))
    with pytest.raises(ValueError, match="merge_below needs word_starts"):
        linear_alm_loss(*args, merge_below=0.1)


def test_losses_import_without_the_extension():
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['potstill._rust'] = None\n"
        "import potstill.xtok as x; x.alm_loss, x.uld_loss, x.gold_loss, x.Alignment\n"
        "try:\n    x.Aligner\nexcept ImportError as e:\n    print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "potstill.xtok.Aligner needs the Rust extension" in done.stdout
