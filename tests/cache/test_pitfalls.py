"""What went wrong elsewhere: a bit flipped in silence, a cache lost with its process, ids masked, rows on other tokens,
hostile files, readers in forked workers. The long tests of each stand in the files named here, the others below."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from potstill import cache

FILES = {
    23: "test_damage.py",
    24: "test_kill.py",
    25: "test_round_trip.py",
    26: "test_batch.py",
    27: "../integrations/test_server_rows.py",
    28: "test_hostile.py",
    29: "test_workers.py",
}


@pytest.mark.parametrize("number", FILES)
def test_each_pitfall_has_its_tests(number):
    text = (Path(__file__).parent / FILES[number]).read_text(encoding="utf-8")
    assert f"def test_pitfall_{number}_" in text


def test_pitfall_23_columns_are_checked_like_rows(tmp_path, plain_lab):
    """Every byte of a shard with hidden states: a flip is an error in the part where it is, or nobody was given it."""
    hidden, rows = torch.randn(9, 5).bfloat16(), plain_lab.rows(9)
    with cache.Writer(tmp_path / "c", plain_lab.spec(columns=(cache.Column.hidden(5), cache.Column.scores("r")))) as w:
        w.add("x", rows.tokens, rows, hidden=hidden, scores=[2.0])
    (shard,) = plain_lab.shard_files(tmp_path / "c")
    data = bytearray(shard.read_bytes())
    assert len(data) < 2000
    for at in range(len(data)):
        data[at] ^= 1 << (at % 8)
        shard.write_bytes(data)
        data[at] ^= 1 << (at % 8)
        assert not cache.verify_cache(tmp_path / "c").ok, at
        with pytest.raises(cache.CacheError):
            assert cache.open(tmp_path / "c")["x"] is None
    for length in range(0, len(data), 3):
        shard.write_bytes(data[:length])
        with pytest.raises(cache.CacheError):
            cache.open(tmp_path / "c")


def test_pitfall_24_rows_keep_their_keys_whatever_the_order_of_completion(tmp_path, lab):
    given = {f"s{i}": lab.rows(3 + i, seed=i) for i in range(12)}
    with cache.Writer(tmp_path / "c", lab.spec()) as w:
        for key in sorted(given, key=lambda k: hash((k, 5))):
            w.add(key, given[key].tokens, given[key])
    lab.check(cache.open(tmp_path / "c"), given)


def test_pitfall_24_an_error_in_the_loop_keeps_what_is_whole(tmp_path, lab):
    """An exception on its way through the with-block commits, and is not replaced by another."""
    r = lab.rows(5)
    with pytest.raises(ZeroDivisionError), cache.Writer(tmp_path / "c", lab.spec()) as w:
        w.add("whole", r.tokens, r)
        w.add("also", r.tokens, SimpleNamespace(ids=r.ids, log_probs=r.log_probs, log_rest=r.log_rest * (1 / 0)))
    assert cache.open(tmp_path / "c").keys() == ["whole"]


def test_pitfall_25_tails_of_minus_infinity_stay_in_their_row(tmp_path, lab):
    r = lab.rows(6)
    r.log_probs[2, 3:] = -np.inf
    r.log_rest[:] = -np.inf
    with cache.Writer(tmp_path / "c", lab.spec()) as w:
        w.add("x", r.tokens, r)
    _, ids, log_probs, log_rest = cache.open(tmp_path / "c").numpy("x")
    assert np.isneginf(log_probs[2, 3:]).all() and np.isfinite(np.delete(log_probs, 2, 0)).all()
    assert np.isneginf(log_rest).all() and (ids >= 0).all()


def test_pitfall_26_tokens_are_checked_whole_by_prefix_and_by_hash(tmp_path, lab):
    given = lab.write(tmp_path / "c", {"a": 9, "b": 7})
    store, tokens = cache.open(tmp_path / "c"), given["a"].tokens
    store.check_tokens("a", tokens)
    store.check_tokens("a", tokens[:4].tolist())
    assert store.token_hash("a") == cache.token_hash(tokens) == cache.token_hash(torch.from_numpy(tokens).long())
    assert store.token_hash("a", 4) == cache.token_hash(tokens[:4]) != store.token_hash("a")
    assert store.find(tokens) == ["a"] and store.find(given["b"].tokens) == ["b"] and store.find(tokens[:8]) == []
    wrong = tokens.copy()
    wrong[5] += 1
    for bad, position in [(wrong, 5), (wrong[:7], 5), (np.append(tokens, 3), 9)]:
        with pytest.raises(
            cache.TokenMismatch, match=f"sequence ['\"]a['\"]: token {position} is {bad[position]}"
        ) as one:
            store.check_tokens("a", bad)
        with pytest.raises(cache.TokenMismatch) as other:
            store.batch(["a"], tokens=[bad])
        assert (one.value.key, one.value.position) == (other.value.key, other.value.position) == ("a", position)


def test_pitfall_26_template_and_dtype_are_part_of_the_identity(tmp_path, lab):
    spec = lab.spec(template="chatml-3f2a", dtype="bfloat16")
    with cache.Writer(tmp_path / "c", spec):
        pass
    assert cache.open(tmp_path / "c").spec == spec
    for changed in ({"template": "other", "dtype": "bfloat16"}, {"template": "chatml-3f2a", "dtype": "float32"}, {}):
        with pytest.raises(cache.CacheError, match="template|dtype"):
            cache.Writer(tmp_path / "c", lab.spec(**changed))


def test_pitfall_29_a_dataset_is_sent_as_its_path(tmp_path, plain_lab):
    given = plain_lab.write(tmp_path / "c", {f"s{i}": 3 + i for i in range(8)})
    data = cache.Dataset(tmp_path / "c")
    sent = pickle.dumps(data)
    assert len(sent) < 1000
    late = plain_lab.rows(4, seed=77)
    with cache.Writer(tmp_path / "c", plain_lab.spec()) as w:
        w.add("late", late.tokens, late)
    again = pickle.loads(sent)
    assert again.keys == list(given), "indices moved under a worker"
    assert torch.equal(again.batch([3]).tokens, data.batch([3]).tokens)
    assert len(pickle.loads(pickle.dumps(cache.Dataset(tmp_path / "c", keys=["late", "s2"])))) == 2


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(m, marks=pytest.mark.nightly) for m in ("spawn", "forkserver"))]
)
def test_pitfall_29_dataset_in_workers(tmp_path, plain_lab, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    plain_lab.write(tmp_path / "c", {f"s{i}": 3 + i for i in range(24)}, flush=True)
    data = cache.Dataset(tmp_path / "c")
    data[0]  # a file is open before the fork
    order = cache.ShuffledBatches(len(data), 4, seed=1)
    want = [data.batch(batch).tokens for batch in order]
    order.set_epoch(0)
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=order, collate_fn=cache.Dataset.as_is, num_workers=2, multiprocessing_context=method
    )
    assert all(torch.equal(got.tokens, tokens) for got, tokens in zip(loader, want, strict=True))
