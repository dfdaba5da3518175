"""Random byte strings, cut differently on both sides: the truth is free, the boundaries are the common cuts."""

import random
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from potstill.xtok import Aligner, VocabBytes, chunk_log_probs
from potstill.xtok.alignment import INVALID, MISMATCHED, STUDENT_TRUNCATED, TEACHER_TRUNCATED

# few different bytes, so that wrong places often look right; é, €, 😊 in pieces, and bytes that are no UTF-8
PIECES = [
    b"a",
    b"b",
    b" ",
    b"  ",
    b"\n",
    b"ab",
    b"the ",
    "é".encode(),
    "€".encode(),
    "😊".encode(),
    b"\xff",
    b"\xe2\x82",
]
text_bytes = st.lists(st.sampled_from(PIECES), max_size=60).map(b"".join)
valid_bytes = st.lists(st.sampled_from(PIECES[:-2]), max_size=60).map(b"".join)


@st.composite
def cuts(draw, data):
    """`data` cut into tokens of 1 to 20 bytes."""
    out, at = [], 0
    while at < len(data):
        n = draw(st.one_of(st.integers(1, 4), st.integers(1, 20)))
        out.append(data[at : at + n])
        at += n
    return out


@st.composite
def cut_twice(draw, data=text_bytes):
    whole = draw(data)
    return whole, draw(cuts(whole)), draw(cuts(whole))


def numbered(*rows):
    """(VocabBytes, ids of each row) over the tokens that occur; str names special tokens."""
    ids = {}
    numbers = [[ids.setdefault(token, len(ids)) for token in row] for row in rows]
    raw = [token.encode() if isinstance(token, str) else token for token in ids] or [b"x"]
    named = [id for token, id in ids.items() if isinstance(token, str)]
    return VocabBytes.from_callback(len(raw), raw.__getitem__, specials=named), numbers


def align(student, teacher, **options):
    (s, (a,)), (t, (b,)) = numbered(student), numbered(teacher)
    return Aligner(s, t, **options)(a, b)


def ends(tokens):
    at, out = 0, {}
    for n, token in enumerate(tokens):
        at += len(token)
        out[at] = n + 1
    return out


def truth(student, teacher):
    a, b = ends(student), ends(teacher)
    out, last = [], (0, 0)
    for end in sorted(a.keys() & b.keys()):
        out.append((last[0], a[end], last[1], b[end]))
        last = (a[end], b[end])
    return out


def check(found, student, teacher):
    """What holds for every alignment, whatever the sides are."""
    last = (0, 0)
    for (s0, s1, t0, t1), flags, num_bytes in zip(
        found.chunks(0), found.flags.tolist(), found.num_bytes.tolist(), strict=True
    ):
        assert last[0] <= s0 <= s1 and last[1] <= t0 <= t1 and (s1 > s0 or t1 > t0)
        last = (s1, t1)
        if not flags:
            assert b"".join(student[s0:s1]) == b"".join(teacher[t0:t1])
            assert num_bytes == sum(map(len, student[s0:s1])) > 0
    for maps, side in ((found.student_chunk, 0), (found.teacher_chunk, 1)):
        for chunk, (start, end) in enumerate(found.spans[:, side].tolist()):
            inside = maps[start:end]
            assert ((inside == chunk) | (inside == -1)).all()
        assert (maps[maps >= 0].diff() >= 0).all()


@settings(max_examples=150, deadline=None)
@given(cut_twice())
def test_chunks_are_the_common_cuts(sample):
    _, student, teacher = sample
    found = align(student, teacher)
    assert found.chunks(0) == truth(student, teacher)
    assert not found.flags.any() and not found.row_flags.any() and not found.mismatches.any()
    assert (found.student_chunk >= 0).all() and (found.teacher_chunk >= 0).all()
    check(found, student, teacher)
    values = -torch.rand(len(teacher), dtype=torch.float64)
    torch.testing.assert_close(chunk_log_probs(values, found, "teacher").sum(), values.sum())
    swapped = align(teacher, student)
    assert [(s0, s1, t0, t1) for t0, t1, s0, s1 in swapped.chunks(0)] == found.chunks(0)
    assert torch.equal(swapped.num_bytes, found.num_bytes)


@settings(max_examples=100, deadline=None)
@given(cut_twice())
def test_identity_and_refinement(sample):
    whole, student, teacher = sample
    assert align(student, student).chunks(0) == [(n, n + 1, n, n + 1) for n in range(len(student))]
    by_byte = align(student, [whole[n : n + 1] for n in range(len(whole))]).chunks(0)
    assert [(s0, s1) for s0, s1, _, _ in by_byte] == [(n, n + 1) for n in range(len(student))]
    # a chunk of the coarser pair is a union of chunks of a finer one
    fine = {s1 for _, s1, _, _ in by_byte}
    assert {s1 for _, s1, _, _ in align(student, teacher).chunks(0)} <= fine


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_padding_batch_and_threads_change_nothing(data):
    samples = data.draw(st.lists(cut_twice(), min_size=1, max_size=5))
    (s, a), (t, b) = numbered(*(x[1] for x in samples)), numbered(*(x[2] for x in samples))
    whole = Aligner(s, t, threads=1)(a, b)
    alone = [Aligner(s, t)(x, y).chunks(0) for x, y in zip(a, b, strict=True)]
    assert [whole.chunks(n) for n in range(len(a))] == alone
    width = (max(map(len, a)) + 2, max(map(len, b)) + 3)
    left = data.draw(st.booleans())

    def pad(rows, width):
        out, mask = torch.full((len(rows), width), -100), torch.zeros(len(rows), width)
        for n, row in enumerate(rows):
            at = slice(width - len(row), width) if left else slice(0, len(row))
            out[n, at] = torch.tensor(row, dtype=torch.int64)
            mask[n, at] = 1
        return out, mask

    (pa, ma), (pb, mb) = pad(a, width[0]), pad(b, width[1])
    padded = Aligner(s, t)(pa, pb, student_mask=ma, teacher_mask=mb)
    shift = [((width[0] - len(x)) * left, (width[1] - len(y)) * left) for x, y in zip(a, b, strict=True)]
    moved = [
        [(s0 - i, s1 - i, t0 - j, t1 - j) for s0, s1, t0, t1 in padded.chunks(n)] for n, (i, j) in enumerate(shift)
    ]
    assert moved == alone
    assert torch.equal(padded.student_chunk[ma.flatten() > 0], whole.student_chunk)
    assert torch.equal(padded.teacher_chunk[mb.flatten() > 0], whole.teacher_chunk)


def test_threads_give_what_one_gives():
    generator = torch.Generator().manual_seed(0)
    words = [bytes([97 + n]) * m for n in range(5) for m in (1, 2, 3)]
    s = VocabBytes.from_callback(len(words), words.__getitem__)
    rows = [
        torch.randint(len(words), (int(n),), generator=generator)
        for n in torch.randint(0, 900, (100,), generator=generator)
    ]
    singles = [b"".join(words[i] for i in row.tolist()) for row in rows]
    letters = VocabBytes.from_callback(256, lambda n: bytes([n]))
    others = [list(single) for single in singles]
    one, three = (Aligner(s, letters, threads=n)(rows, others) for n in (1, 3))
    for name in ("student_chunk", "teacher_chunk", "spans", "row_ptr", "flags", "num_bytes", "row_flags", "mismatches"):
        assert torch.equal(getattr(one, name), getattr(three, name)), name
    assert len(one) == sum(map(len, rows))


@settings(max_examples=150, deadline=None)
@given(cut_twice(), st.data())
def test_damage_on_one_side(sample, data):
    """Bytes that are no UTF-8 in one side: what is before them is aligned as ever, and no chunk holds them."""
    whole, student, teacher = sample
    if len(whole) < 2:
        return
    where = data.draw(st.integers(0, len(whole)))
    stray = data.draw(st.sampled_from([b"\xff", b"\xc0\xaf", b"\xf5"]))
    broken = data.draw(cuts(whole[:where] + stray + whole[where:]))
    found = align(broken, teacher)
    check(found, broken, teacher)
    ends_of_broken, ends_of_teacher = ends(broken), ends(teacher)
    before = [(ends_of_broken[at], ends_of_teacher[at]) for at in ends_of_broken.keys() & ends_of_teacher.keys()
              if at <= where]  # fmt: skip
    assert {(s1, t1) for _, s1, _, t1 in found.chunks(0)} >= set(before)
    swapped = align(teacher, broken)
    assert [(s0, s1, t0, t1) for t0, t1, s0, s1 in swapped.chunks(0)] == found.chunks(0)
    assert torch.equal(swapped.flags, found.flags)


@settings(max_examples=150, deadline=None)
@given(text_bytes, text_bytes, st.booleans(), st.data())
def test_stretches_are_what_the_walk_gives(left, right, same, data):
    """Chunks of at least one byte are all chunks, found token by token and not by stretches."""
    student, teacher = data.draw(cuts(left)), data.draw(cuts(left if same else left[: len(left) // 2] + right))
    for side in (student, teacher):
        for _ in range(data.draw(st.integers(0, 2))):
            side.insert(data.draw(st.integers(0, len(side))), data.draw(st.sampled_from(["</s>", b""])))
    (s, (a,)), (t, (b,)) = numbered(student), numbered(teacher)
    by_stretch, by_walk = Aligner(s, t)(a, b), Aligner(s, t, granularity=1)(a, b)
    for name in ("student_chunk", "teacher_chunk", "spans", "flags", "num_bytes", "row_flags", "mismatches"):
        assert torch.equal(getattr(by_stretch, name), getattr(by_walk, name)), name


@pytest.mark.parametrize("lengths", [(1, 6), (1, 40), (1, 1), (30, 60)], ids=str)
def test_long_rows(lengths):
    """Rows beyond one stretch, tokens beyond one word, one token beyond a stretch's bytes, and a place that differs."""
    generator = random.Random(str(lengths))
    whole = bytes(generator.choice(b"abc \n") for _ in range(30_000))

    def cut(data, low, high):
        out, at = [], 0
        while at < len(data):
            at += (n := generator.randint(low, high))
            out.append(data[at - n : at])
        return out

    head, long, tail = whole[:12_000], whole[12_000:21_500], whole[21_500:]
    student = [*cut(head, 1, 7), long, *cut(tail, 1, 7)]
    teacher = [*cut(head, *lengths), *cut(long, *lengths), *cut(tail, *lengths)]
    found = align(student, teacher)
    assert found.chunks(0) == truth(student, teacher) and not found.mismatches.any()
    place = len(teacher) - 3
    broken = [*teacher[:place], b"\xff", *teacher[place:]]
    kept = [chunk for chunk in align(student, broken).chunks(0) if chunk[3] <= place]
    assert kept == [chunk for chunk in truth(student, teacher) if chunk[3] <= place]


def test_words_end_where_either_side_begins_one():
    """Texts that part where one of them begins a word: which side is the student's does not matter."""
    left, right = [b"a", b"a"], [b"a", b" "]
    found = align(left, right, granularity="word").chunks(0)
    assert found == align(right, left, granularity="word").chunks(0) == [(0, 1, 0, 1), (1, 2, 1, 2)]


@settings(max_examples=150, deadline=None)
@given(text_bytes, text_bytes, st.data())
def test_any_two_byte_strings(left, right, data):
    student, teacher = data.draw(cuts(left)), data.draw(cuts(right))
    for granularity in ("byte", "char", "word", 5):
        found = align(student, teacher, granularity=granularity)
        check(found, student, teacher)
        swapped = align(teacher, student, granularity=granularity)
        assert [(s0, s1, t0, t1) for t0, t1, s0, s1 in swapped.chunks(0)] == found.chunks(0)
        assert bool(found.row_flags[0] & MISMATCHED) == (found.mismatches.item() > 0)
        assert found.mismatches.item() >= int(((found.flags & INVALID) != 0).sum())
        if left.startswith(right) or right.startswith(left):
            assert not found.mismatches.any()
    dropped = align(student, teacher, on_mismatch="drop")
    if found.mismatches.any():
        assert len(dropped) == 0 and (dropped.student_chunk == -1).all()
        with pytest.raises(ValueError, match="bytes differ from student token"):
            align(student, teacher, on_mismatch="error")
    else:
        assert dropped.chunks(0) == align(student, teacher).chunks(0)


@settings(max_examples=100, deadline=None)
@given(cut_twice(), st.data())
def test_truncation_drops_only_the_open_chunk(sample, data):
    _, student, teacher = sample
    keep = data.draw(st.integers(0, len(teacher)))
    found = align(student, teacher[:keep])
    full = truth(student, teacher)
    assert found.chunks(0) == [chunk for chunk in full if chunk[3] <= keep]
    cut = sum(map(len, teacher[keep:])) > 0
    assert found.row_flags.item() == (TEACHER_TRUNCATED if cut else 0)
    assert align(teacher[:keep], student).row_flags.item() == (STUDENT_TRUNCATED if cut else 0)


@settings(max_examples=100, deadline=None)
@given(cut_twice(), st.data())
def test_special_tokens_anywhere(sample, data):
    """Special tokens of no role in the other side change no chunk of text; they are in none."""
    _, student, teacher = sample
    plain = align(student, teacher).chunks(0)

    def strewn(tokens, name):
        out, kept = [], []
        for token in tokens:
            out += [name] * data.draw(st.integers(0, 2))
            kept.append(len(out))
            out.append(token)
        return out + [name] * data.draw(st.integers(0, 2)), kept

    (a, kept_a), (b, kept_b) = strewn(student, "<x>"), strewn(teacher, "<y>")
    found = align(a, b)
    by_text = [
        (chunk[0], chunk[-1] + 1)
        for maps, kept in ((found.student_chunk, kept_a), (found.teacher_chunk, kept_b))
        for number in range(len(plain))
        for chunk in [[n for n, at in enumerate(kept) if maps[at] == number]]
    ]
    assert by_text == [chunk[:2] for chunk in plain] + [chunk[2:] for chunk in plain]
    for maps, kept in ((found.student_chunk, kept_a), (found.teacher_chunk, kept_b)):
        others = torch.ones(len(maps), dtype=torch.bool)
        others[kept] = False
        assert (maps[others] == -1).all()
    assert len(found) == len(plain)


@settings(max_examples=150, deadline=None)
@given(text_bytes, text_bytes, st.booleans(), st.sampled_from(["byte", "char", "word", 4]), st.data())
def test_streaming_gives_what_the_whole_row_gives(left, right, same, granularity, data):
    student, teacher = data.draw(cuts(left)), data.draw(cuts(left if same else left[: len(left) // 2] + right))
    for side in (student, teacher):
        for _ in range(data.draw(st.integers(0, 2))):
            side.insert(data.draw(st.integers(0, len(side))), "</s>")
    (s, (a,)), (t, (b,)) = numbered(student), numbered(teacher)
    aligner = Aligner(s, t, granularity=granularity)
    whole = aligner(a, b)
    stream, spans = aligner.stream(), []
    while a or b:
        n, m = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
        spans += stream.push(a[:n], b[:m]).tolist()
        a, b = a[n:], b[m:]
    found = stream.finish()
    assert spans == found.spans.tolist()[: len(spans)]
    for name in ("student_chunk", "teacher_chunk", "spans", "flags", "num_bytes", "row_flags", "mismatches"):
        assert torch.equal(getattr(found, name), getattr(whole, name)), name


@settings(max_examples=100, deadline=None)
@given(cut_twice(valid_bytes))
def test_granularity(sample):
    whole, student, teacher = sample
    all_ends = [sum(map(len, student[:s1])) for _, s1, _, _ in truth(student, teacher)]

    def found_ends(granularity):
        return [
            sum(map(len, student[:s1])) for _, s1, _, _ in align(student, teacher, granularity=granularity).chunks(0)
        ]

    starts = {len(whole[:n].decode(errors="ignore").encode()) for n in range(len(whole) + 1)}
    assert found_ends("char") == [end for end in all_ends if end in starts]
    words = {m.start() for m in re.finditer(rb"(?<=[^ \n])[ \n]", whole)} | {len(whole)}
    assert found_ends("word") == [end for end in all_ends if end in words]
    last, expected = 0, []
    for end in all_ends:
        if end - last >= 5 or end == len(whole):
            expected.append(end)
            last = end
    assert found_ends(5) == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(cut_twice(), min_size=1, max_size=4), st.data())
def test_chunks_never_cross_message_spans(messages, data):
    """Messages inside different templates align as they do alone; the templates have no chunks."""
    a, b, spans = [], [], ([], [])
    for _, student, teacher in messages:
        a += [b"<user>"] * data.draw(st.integers(0, 2))
        b += [b"[INST] "] * data.draw(st.integers(0, 2))
        spans[0].append((len(a), len(a) + len(student)))
        spans[1].append((len(b), len(b) + len(teacher)))
        a += student
        b += teacher
    (s, (ids_a,)), (t, (ids_b,)) = numbered(a), numbered(b)
    found = Aligner(s, t)(ids_a, ids_b, student_spans=[spans[0]], teacher_spans=[spans[1]])
    expected = [
        (s0 + i, s1 + i, t0 + j, t1 + j)
        for (_, student, teacher), (i, _), (j, _) in zip(messages, *spans, strict=True)
        for s0, s1, t0, t1 in truth(student, teacher)
    ]
    assert found.chunks(0) == expected
    outside = torch.ones(len(ids_a), dtype=torch.bool)
    for start, end in spans[0]:
        outside[start:end] = False
    assert (found.student_chunk[outside] == -1).all() and not found.mismatches.any()


@settings(max_examples=60, deadline=None)
@given(st.lists(cut_twice(), min_size=1, max_size=5))
def test_every_form_of_ids_gives_the_same(samples):
    """Lists, arrays of any integer type and layout, tensors, and flat ids with row pointers."""
    (s, a), (t, b) = numbered(*(x[1] for x in samples)), numbered(*(x[2] for x in samples))
    aligner = Aligner(s, t)
    want = aligner(a, b)

    def ptr(rows):
        return np.cumsum([0, *map(len, rows)])

    def flat(rows, dtype=np.int32):
        return np.concatenate([np.asarray(row, dtype) for row in rows])

    forms = [
        lambda rows: [np.asarray(row, np.int32) for row in rows],
        lambda rows: [np.asarray(row, np.uint16) for row in rows],
        lambda rows: [np.repeat(np.asarray(row, np.int64), 2)[::2] for row in rows],
        lambda rows: [torch.tensor(row, dtype=torch.int64) for row in rows],
        lambda rows: [tuple(row) for row in rows],
        lambda rows: [np.asarray(row, np.int32) if n % 2 else row for n, row in enumerate(rows)],
    ]
    found = [aligner(form(a), form(b)) for form in forms]
    found.append(aligner(flat(a), flat(b), student_ptr=ptr(a), teacher_ptr=ptr(b)))
    found.append(aligner(flat(a, np.int64), torch.from_numpy(flat(b)), student_ptr=want.student_ptr,
                         teacher_ptr=ptr(b)))  # fmt: skip
    for other in found:
        for name in ("student_chunk", "teacher_chunk", "student_ptr", "teacher_ptr", "spans", "row_ptr", "flags"):
            assert torch.equal(getattr(other, name), getattr(want, name)), name


@pytest.mark.parametrize(
    "ids, message",
    [
        ([[0, 1 << 32]], "row 0: student token 1 is 4294967296; ids are integers below 2\\^31"),
        ([[0], [1.5]], "row 1: student token 0 is 1.5"),
        ([np.array([0, 2**40])], "row 0: student token 1 is 1099511627776"),
        (np.array([[0, 2**33]]), "row 0: student token 1 is 8589934592"),
        ([torch.zeros(2)], r"row 0: student ids have shape \[2\] of float32"),
        ([[0], torch.zeros(1, 2, dtype=torch.int64)], r"row 1: student ids have shape \[1, 2\] of int64"),
        (torch.zeros(1, 2), r"student_ids have shape \[1, 2\] of float32"),
        ([["a"]], "row 0: student token 0 is 'a'"),
    ],
)
def test_what_is_no_id_is_refused(ids, message):
    vocab = VocabBytes.from_callback(2, [b"a", b"b"].__getitem__)
    with pytest.raises(ValueError, match=message):
        Aligner(vocab, vocab)(ids, [[0]] * len(ids))


def test_row_pointers_that_do_not_fit_are_refused():
    vocab = VocabBytes.from_callback(2, [b"a", b"b"].__getitem__)
    ids = np.array([0, 1, 0], np.int32)
    for ptr in ([0, 2], [1, 3], [], [[0, 3]]):
        with pytest.raises(ValueError, match=r"student_ptr is .* it goes with flat ids \[n\], here 3 in 1 rows"):
            Aligner(vocab, vocab)(ids, ids, student_ptr=ptr, teacher_ptr=[0, 3])
    with pytest.raises(ValueError, match="student_ptr falls at row 1"):
        Aligner(vocab, vocab)(ids, ids, student_ptr=[0, 2, 1, 3], teacher_ptr=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="rows by student_ptr, have no padding"):
        Aligner(vocab, vocab)(ids, ids, student_ptr=[0, 3], teacher_ptr=[0, 3], student_mask=np.ones(3))
