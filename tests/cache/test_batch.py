"""Batches as torch tensors, and the tie between rows and tokens."""

from __future__ import annotations

import pytest
from potstill import cache

torch = pytest.importorskip("torch")


@pytest.fixture
def stored(tmp_path, lab):
    given = lab.write(tmp_path / "c", {"a": 5, "b": 9, "c": 2})
    return cache.open(tmp_path / "c"), given


def test_getitem(stored, lab):
    store, given = stored
    got = store["b"]
    assert got.key == "b" and got.topk.ids.dtype == torch.int32 and got.topk.log_probs.dtype == torch.float32
    lab.same((got.tokens, *(x.numpy() for x in (got.topk.ids, got.topk.log_probs, got.topk.log_rest))), given["b"])


def test_batch_pads(stored, lab):
    store, given = stored
    top = store.batch(["c", "b"])
    assert tuple(top.ids.shape) == tuple(top.log_probs.shape) == (2, 9, 8) and tuple(top.log_rest.shape) == (
        2,
        9,
    )
    lab.same_ids(top.ids[0, :2], top.log_probs[0, :2], given["c"].ids)
    lab.same_ids(top.ids[1], top.log_probs[1], given["b"].ids)
    assert (
        (top.ids[0, 2:] == -1).all() and (top.log_probs[0, 2:] == -torch.inf).all() and (top.log_rest[0, 2:] == 0).all()
    )


def test_batch_into_given_memory(stored, lab):
    from potstill.teachers import TopK

    store, given = stored
    out = TopK(
        torch.full((2, 12, 8), 77, dtype=torch.int32),
        torch.full((2, 12, 8), torch.nan),
        log_rest=torch.full((2, 12), torch.nan),
    )
    top = store.batch(["a", "b"], out=out)
    assert top.ids.data_ptr() == out.ids.data_ptr()
    lab.same_ids(out.ids[0, :5], out.log_probs[0, :5], given["a"].ids)
    assert (out.ids[:, 9:] == -1).all() and not out.log_probs.isnan().any() and not out.log_rest.isnan().any()
    bad = TopK(out.ids.long(), out.log_probs, log_rest=out.log_rest)
    with pytest.raises(ValueError, match="out.ids is torch.int64"):
        store.batch(["a", "b"], out=bad)
    with pytest.raises(ValueError, match="at least 9"):
        store.batch(
            ["a", "b"],
            out=TopK(out.ids[:, :8].clone(), out.log_probs[:, :8].clone(), log_rest=out.log_rest[:, :8].clone()),
        )


def test_batch_accepts_a_prefix(stored, lab):
    store, given = stored
    top = store.batch(["a", "b"], tokens=[given["a"].tokens[:3], torch.from_numpy(given["b"].tokens[:4]).long()])
    assert tuple(top.ids.shape) == (2, 4, 8)
    lab.same_ids(top.ids[0, :3], top.log_probs[0, :3], given["a"].ids[:3])
    assert (top.ids[0, 3:] == -1).all()


@pytest.mark.parametrize("position", [0, 4, 8])
def test_pitfall_26_other_tokens_are_named(stored, position):
    store, given = stored
    wrong = given["b"].tokens.copy()
    wrong[position] += 1
    with pytest.raises(cache.TokenMismatch, match=f'sequence "b": token {position} is {wrong[position]}') as caught:
        store.batch(["a", "b"], tokens=[given["a"].tokens, wrong])
    assert (caught.value.key, caught.value.position) == ("b", position) and isinstance(caught.value, ValueError)


def test_pitfall_26_more_tokens_than_cached_are_named(stored):
    store, given = stored
    with pytest.raises(cache.TokenMismatch, match="token 5 is 3, the cached one is absent"):
        store.batch(["a"], tokens=[[*given["a"].tokens.tolist(), 3]])


def test_batch_across_blocks(tmp_path, lab):
    """A mismatch far into a sequence of several blocks, and a prefix that ends inside the second block."""
    r = lab.write(tmp_path / "c", {"long": 9000})["long"]
    store = cache.open(tmp_path / "c")
    top = store.batch(["long"], tokens=[r.tokens[:8300]])
    lab.same_ids(top.ids[0], top.log_probs[0], r.ids[:8300])
    wrong = r.tokens.copy()
    wrong[8999] ^= 1
    with pytest.raises(cache.TokenMismatch, match="token 8999"):
        store.batch(["long"], tokens=[wrong])


def test_torch_rows_are_accepted(tmp_path, lab):
    from potstill.teachers import TopK

    r = lab.rows(6)
    top = TopK(torch.from_numpy(r.ids).long(), torch.from_numpy(r.log_probs), log_rest=torch.from_numpy(r.log_rest))
    with cache.Writer(tmp_path / "c", lab.spec()) as w:
        w.add("x", torch.from_numpy(r.tokens), top)
    lab.check(cache.open(tmp_path / "c"), {"x": r})


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_packed_and_padded_hold_the_same_rows(stored, lab, threads):
    store, given = stored
    keys = ["c", "a", "b", "a"]
    top, starts = store.packed(keys, threads=threads)
    padded = store.batch(keys, threads=threads)
    assert starts.tolist() == [0, 2, 7, 16, 21] and tuple(top.ids.shape) == (21, 8)
    for i, key in enumerate(keys):
        first, end = starts[i], starts[i + 1]
        lab.same_ids(top.ids[first:end], top.log_probs[first:end], given[key].ids)
        for name in ("ids", "log_probs", "log_rest"):
            assert torch.equal(getattr(top, name)[first:end], getattr(padded, name)[i, : end - first]), (key, name)
    wrong = given["b"].tokens + 1
    with pytest.raises(cache.TokenMismatch, match='sequence "b"'):
        store.packed(["c", "b"], tokens=[given["c"].tokens, wrong], threads=threads)
