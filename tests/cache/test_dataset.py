"""Batches of a cache as training takes them, into given memory, in an order that resumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from potstill import cache
from potstill.cache import Buffers, Column, ShuffledBatches

LENGTHS = {"a": 5, "b": 9, "c": 2, "d": 7}


@pytest.fixture
def stored(tmp_path, dense_lab):
    given = {key: dense_lab.rows(n, seed=i) for i, (key, n) in enumerate(LENGTHS.items())}
    with cache.Writer(tmp_path / "c", dense_lab.spec(columns=(Column.hidden(3), Column.scores("reward")))) as w:
        for key, r in given.items():
            w.add(key, r.tokens, r, hidden=torch.full((len(r.tokens), 3), float(len(r.tokens))), scores=[1.5])
    return cache.open(tmp_path / "c"), given


def test_padded_batches_hold_tokens_rows_and_columns(stored):
    store, given = stored
    data = cache.Dataset(store, columns=("hidden", "scores"), max_tokens=8)
    batch = data.__getitems__([1, 2, 0])
    assert batch.keys == ["b", "c", "a"] and batch.lengths.tolist() == [8, 2, 5] and batch.cu_seqlens is None
    want = store.batch(["b", "c", "a"], tokens=[given[k].tokens[:8] for k in ("b", "c", "a")])
    for name in ("ids", "log_probs", "log_rest"):
        assert torch.equal(getattr(batch.topk, name), getattr(want, name)), name
    for row, key in enumerate(batch.keys):
        n = int(batch.lengths[row])
        assert batch.tokens[row, :n].tolist() == given[key].tokens[:n].tolist() and not batch.tokens[row, n:].any()
        assert (batch.columns["hidden"][row, :n] == LENGTHS[key]).all() and not batch.columns["hidden"][row, n:].any()
    assert batch.columns["scores"].tolist() == [[1.5]] * 3 and batch.tokens.dtype == torch.int64
    assert torch.equal(batch.to("cpu").topk.ids, batch.topk.ids)


def test_packed_batches_and_single_sequences(stored):
    store, given = stored
    data = cache.Dataset(store, ["d", "b"], form="packed", columns=("hidden",))
    batch = data.__getitems__([0, 1])
    assert batch.cu_seqlens.tolist() == [0, 7, 16] and batch.tokens.shape == (16,) and batch.topk.ids.shape == (16, 8)
    want, _ = store.packed(["d", "b"])
    assert torch.equal(batch.topk.ids, want.ids) and torch.equal(batch.topk.log_rest, want.log_rest)
    assert batch.columns["hidden"][:, 0].tolist() == [7.0] * 7 + [9.0] * 9
    one = data[1]
    assert one.key == "b" and one.tokens.tolist() == given["b"].tokens.tolist() and one.topk.ids.shape == (9, 8)
    many = cache.Dataset(store, form="sequences").__getitems__([0, 3])
    assert [s.key for s in many] == ["a", "d"] and torch.equal(many[1].topk.ids, store["d"].topk.ids)


def test_refused_datasets(stored):
    store, _ = stored
    for options, kind, sentence in [
        ({"form": "ragged"}, ValueError, "form is 'ragged'"),
        ({"keys": ["a", "z"]}, KeyError, "no sequence 'z'"),
        ({"columns": ("nothing",)}, KeyError, "no columns .*nothing"),
        ({"max_tokens": 0}, ValueError, "max_tokens is 0"),
    ]:
        with pytest.raises(kind, match=sentence):
            cache.Dataset(store, **options)


def test_batches_into_buffers_of_the_callers(stored, lab):
    store, given = stored
    buffers = Buffers.empty(store.spec, 40)
    for keys in (["b", "c"], ["a"], ["d", "a", "c"]):
        top, want = store.batch(keys, out=buffers), store.batch(keys)
        assert top.ids.data_ptr() == buffers.ids.ctypes.data and top.log_rest.data_ptr() == buffers.log_rest.ctypes.data
        assert torch.equal(top.ids, want.ids) and torch.equal(top.log_probs, want.log_probs)
        packed, ends = store.packed(keys, out=buffers)
        fresh, same = store.packed(keys)
        assert packed.ids.data_ptr() == buffers.ids.ctypes.data and torch.equal(packed.ids, fresh.ids)
        assert ends.tolist() == same.tolist()
    tokens = np.empty(4, np.int32)
    store.read("b", tokens, buffers)  # no torch
    assert tokens.tolist() == given["b"].tokens[:4].tolist()
    np.testing.assert_array_equal(buffers.ids[: 4 * 8].reshape(4, 8), store.numpy("b")[1][:4])
    with pytest.raises(ValueError, match="at least 144 numbers"):
        store.batch(["b", "c"], out=Buffers.empty(store.spec, 17))
    wrong = Buffers.empty(store.spec, 40)
    wrong.ids = wrong.ids.astype(np.int64)
    with pytest.raises(ValueError, match="out.ids is int64"):
        store.batch(["b"], out=wrong)
    frozen = Buffers.empty(store.spec, 40)
    frozen.log_rest.flags.writeable = False
    with pytest.raises(ValueError, match="out.log_rest"):
        store.packed(["b"], out=frozen)


@pytest.mark.gpu
def test_pinned_buffers(stored):
    store, _ = stored
    top = store.batch(["b"], out=Buffers.empty(store.spec, 16, pin_memory=True))
    assert top.ids.is_pinned() and torch.equal(top.ids, store.batch(["b"]).ids)


# ---- the order ----


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_the_order_is_a_permutation_that_seed_and_epoch_draw(n):
    def order(seed, epoch):
        sampler = ShuffledBatches(n, min(n, 50), seed=seed, drop_last=False)
        sampler.set_epoch(epoch)
        return [i for batch in sampler for i in batch][:n]

    first = order(0, 0)
    assert sorted(first) == list(range(n)) and first == order(0, 0)
    if n > 60:
        assert first != order(0, 1) != order(1, 0) != first and first != sorted(first)


def test_the_order_is_even():
    """Where index i lands, over 2,000 epochs of 16: a chi-square over 256 cells, 5 sigma."""
    cells = np.zeros((16, 16))
    sampler = ShuffledBatches(16, 16)
    for _ in range(2000):
        (order,) = list(sampler)
        cells[np.arange(16), order] += 1
    chi = ((cells - 125) ** 2 / 125).sum()
    assert abs(chi - 225) < 5 * (2 * 225) ** 0.5, chi
    neighbours = np.mean([abs(np.diff(list(ShuffledBatches(1000, 1000, seed=s))[0])).mean() for s in range(50)])
    assert 320 < neighbours < 347, "neighbours of a random order are n / 3 apart"


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_global_order_is_the_same_for_any_number_of_ranks(drop_last, shuffle):
    options = {"seed": 3, "drop_last": drop_last, "shuffle": shuffle}
    single = list(ShuffledBatches(103, 12, **options))
    assert len(single) == (8 if drop_last else 9) and {len(b) for b in single} == {12}
    for world in (2, 3, 4, 12):
        parts = [list(ShuffledBatches(103, 12, rank=rank, world=world, **options)) for rank in range(world)]
        assert [[i for part in step for i in part] for step in zip(*parts, strict=True)] == single
    if not drop_last:
        assert {i for batch in single for i in batch} == set(range(103))


def test_it_resumes_with_another_number_of_ranks():
    whole = list(ShuffledBatches(100, 12, seed=5))
    half = ShuffledBatches(100, 12, seed=5, rank=1, world=2)
    running = iter(half)
    for _ in range(5):
        next(running)  # workers fetched five, three were trained on
    state = half.state_dict(trained=3)
    parts = []
    for rank in range(3):
        sampler = ShuffledBatches(100, 12, seed=5, rank=rank, world=3)
        sampler.load_state_dict(state)
        parts.append(list(sampler))
        assert (sampler.epoch, sampler.start) == (1, 0)
    assert [[i for part in step for i in part] for step in zip(*parts, strict=True)] == whole[3:]
    assert half.state_dict()["samples"] == 5 * 12
    other = ShuffledBatches(100, 6, seed=5)  # a batch size that divides what was done
    other.load_state_dict(state)
    assert [i for batch in other for i in batch][:60] == [i for batch in whole[3:] for i in batch]
    for bad, sentence in [
        (ShuffledBatches(99, 12, seed=5), "n = 100, this sampler has 99"),
        (ShuffledBatches(100, 12, seed=6), "seed = 5"),
        (ShuffledBatches(100, 7, seed=5), "no whole number of batches"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            bad.load_state_dict(state)


def test_memory_does_not_grow_with_the_number_of_sequences():
    sampler = iter(ShuffledBatches(10**12, 8))
    assert all(0 <= i < 10**12 for _ in range(3) for i in next(sampler))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"n": 0}, "n is 0"),
        ({"batch_size": 10, "rank": 0, "world": 3}, "a multiple of their number"),
        ({"rank": 3, "world": 3}, "rank 3 of 3"),
        ({"rank": 1}, "give both or neither"),
    ],
)
def test_refused_orders(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ShuffledBatches(**{"n": 10, "batch_size": 2, **options})
