"""What goes in comes out: values, shapes, order, batches, resume."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from potstill import cache


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("k,vocab", [(1, 2), (3, 17), (8, 1000), (5, 70_001)])
def test_round_trip(tmp_path, lab, k, vocab, ragged):
    given = lab.write(tmp_path / "c", {"a": 1, "b/ü": 37, "c" * 512: 12}, k=k, vocab=vocab, ragged=ragged)
    stored = cache.open(tmp_path / "c")
    lab.check(stored, given)
    assert stored.keys() == list(given) and len(stored) == 3 and stored.num_tokens == 50
    assert stored.spec == lab.spec(k=k, vocab=vocab) and stored.verify().ok
    assert stored.num_bytes == sum(f.stat().st_size for f in lab.shard_files(tmp_path / "c"))
    np.testing.assert_array_equal(stored.tokens("b/ü"), given["b/ü"].tokens)
    with pytest.raises(KeyError, match="nobody"):
        stored["nobody"]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(12, 300), st.booleans(), st.integers(0, 2**32 - 1))
def test_round_trip_property(tmp_path_factory, lab, independent, length, k, vocab, ragged, seed):
    path = tmp_path_factory.mktemp("p") / "c"
    r = lab.rows(length, k=k, vocab=vocab, seed=seed, ragged=ragged)
    with cache.Writer(path, lab.spec(k=k, vocab=vocab)) as w:
        w.add("x", r.tokens, r)
    stored = cache.open(path)
    lab.check(stored, {"x": r})
    for ours, theirs in zip(stored.numpy("x"), independent.cache(path)["x"], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_independent_reader_agrees(tmp_path, lab, independent):
    lab.write(tmp_path / "c", {f"s{i}": 1 + 3 * i for i in range(12)}, ragged=True, flush=True)
    lab.write(tmp_path / "c", {"long": 9000})  # more rows than one block holds, in a second session
    stored, theirs = cache.open(tmp_path / "c"), independent.cache(tmp_path / "c")
    assert stored.keys() == list(theirs)
    for key in stored.keys():
        for a, b in zip(stored.numpy(key), theirs[key], strict=True):
            np.testing.assert_array_equal(a, b)


def test_minus_infinity_survives(tmp_path, lab):
    """A banned token keeps its id, a teacher without a tail its log_rest; no entry poisons its row."""
    top = SimpleNamespace(
        ids=np.array([[4, 2, 9], [3, -1, -1], [-1, -1, -1]]),
        log_probs=np.array([[0.0, -np.inf, -np.inf], [-0.5, -np.inf, -np.inf], [-np.inf] * 3], np.float32),
        log_rest=np.array([-np.inf, np.log1p(-np.exp(-0.5)), 0.0], np.float32),
    )
    with cache.Writer(tmp_path / "c", lab.spec(k=3, vocab=10)) as w:
        w.add("x", [1, 2, 3], top)
    _, ids, log_probs, log_rest = cache.open(tmp_path / "c").numpy("x")
    lab.same(([1, 2, 3], ids, log_probs, log_rest), SimpleNamespace(tokens=[1, 2, 3], **vars(top)))
    assert np.isneginf(log_probs[0, 1:]).all() and np.isneginf(log_rest[0]) and log_rest[2] == 0


def test_very_small_probabilities_saturate(tmp_path, lab):
    top = SimpleNamespace(
        ids=np.array([[4, 2]]),
        log_probs=np.array([[-1e-7, -1e9]], np.float32),
        log_rest=np.array([-np.inf], np.float32),
    )
    with cache.Writer(tmp_path / "c", lab.spec(k=2, vocab=10)) as w:
        w.add("x", [0], top)
    log_probs = cache.open(tmp_path / "c").numpy("x")[2]
    assert log_probs[0, 1] == (-65504 if lab.values == "plain" else -65534 / 16) and abs(log_probs[0, 0]) < 2e-7


def test_pitfall_25_no_id_is_masked(tmp_path, lab):
    """151,936 ids need 18 bits; the largest survives, one more is refused."""
    top = SimpleNamespace(
        ids=np.array([[151_935, 131_072]]),
        log_probs=np.array([[-1.0, -2.0]], np.float32),
        log_rest=np.zeros(1, np.float32) - 3,
    )
    with cache.Writer(tmp_path / "c", lab.spec(k=2, vocab=151_936)) as w:
        w.add("x", [151_935], top)
        with pytest.raises(ValueError, match=r"sequence \"y\", row 0: entry 0 has id 151936"):
            w.add("y", [1], SimpleNamespace(**{**vars(top), "ids": top.ids + 1}))
    np.testing.assert_array_equal(cache.open(tmp_path / "c").numpy("x")[1], top.ids)


def test_tokens_above_the_vocabulary_are_kept(tmp_path, lab):
    """Image and other placeholder tokens may lie above the columns of the head."""
    r = lab.rows(3, vocab=1000)
    with cache.Writer(tmp_path / "c", lab.spec()) as w:
        w.add("x", [5, 2**31 - 1, 1000], r)
    assert cache.open(tmp_path / "c").tokens("x").tolist() == [5, 2**31 - 1, 1000]


def test_resume_adds_and_repeats_nothing(tmp_path, lab):
    first = lab.write(tmp_path / "c", {"a": 5, "b": 6})
    before = lab.shard_files(tmp_path / "c")
    with cache.Writer(tmp_path / "c", lab.spec()) as w:
        assert "a" in w and "z" not in w and w.committed == 2
        assert w.add("a", first["a"].tokens, first["a"]) is False
        z = lab.rows(4, seed=9)
        assert w.add("z", z.tokens, z) and w.pending == 1 and "z" in w
        assert w.add("z", z.tokens, z) is False
    stored = cache.open(tmp_path / "c")
    assert stored.keys() == ["a", "b", "z"] and set(before) < set(lab.shard_files(tmp_path / "c"))
    lab.check(stored, {**first, "z": z})
    with pytest.raises(cache.CacheError, match="resume=True"):
        cache.Writer(tmp_path / "c", lab.spec(), resume=False)


def test_duplicate_key_with_other_content_names_both_places(tmp_path, lab):
    first = lab.write(tmp_path / "c", {"a": 5})
    other = lab.rows(5, seed=77)
    shard = lab.shard_files(tmp_path / "c")[0].stem
    with cache.Writer(tmp_path / "c", lab.spec()) as w:
        with pytest.raises(
            ValueError, match=f'"a" is already in shard {shard} with other content than in the open shard'
        ):
            w.add("a", other.tokens, other)
        w.add("new", other.tokens, other)
        with pytest.raises(ValueError, match="open shard"):
            w.add("new", first["a"].tokens, first["a"])
    assert len(cache.open(tmp_path / "c")) == 2


def test_pitfall_26_another_spec_is_refused_by_field(tmp_path, lab):
    lab.write(tmp_path / "c", {"a": 5})
    for change, field in [
        ({"teacher_revision": "b"}, "teacher_revision"),
        ({"extra": {"template": "chat"}}, "extra.template"),
    ]:
        with pytest.raises(cache.CacheError, match=f"{field} = "):
            cache.Writer(tmp_path / "c", lab.spec(**change))
    with pytest.raises(cache.CacheError, match="k = 8, but 9 was given"):
        cache.Writer(tmp_path / "c", lab.spec(k=9))


def test_a_shard_is_committed_when_full(tmp_path, lab):
    with cache.Writer(tmp_path / "c", lab.spec(), shard_bytes=1500) as w:
        for i in range(10):
            r = lab.rows(30, seed=i)
            w.add(f"s{i}", r.tokens, r)
        assert w.committed >= 8
    assert len(lab.shard_files(tmp_path / "c")) >= 5 and len(cache.open(tmp_path / "c")) == 10


def test_exception_in_a_with_block_commits_what_is_whole(tmp_path, lab):
    r = lab.rows(4)
    with pytest.raises(ZeroDivisionError), cache.Writer(tmp_path / "c", lab.spec()) as w:
        w.add("a", r.tokens, r)
        1 / 0  # noqa: B018
    lab.check(cache.open(tmp_path / "c"), {"a": r})
    with pytest.raises(RuntimeError, match="closed"):
        w.add("b", r.tokens, r)


def test_an_empty_cache_opens(tmp_path, lab):
    with cache.Writer(tmp_path / "c", lab.spec()):
        pass
    stored = cache.open(tmp_path / "c")
    assert len(stored) == 0 and stored.keys() == [] and stored.verify().ok
    with pytest.raises(cache.CacheError, match="no cache here"):
        cache.open(tmp_path)
    with pytest.raises(cache.CacheError, match="not a cache"):
        (tmp_path / "file").write_text("x")
        cache.Writer(tmp_path, lab.spec())


def test_inspect(tmp_path, lab):
    lab.write(tmp_path / "c", {"a": 10, "b": 30})
    found = cache.inspect_cache(tmp_path / "c")
    assert found["sequences"] == 2 and found["tokens"] == 40 and found["spec"]["k"] == 8
    assert found["bytes_per_token"] == found["bytes"] / 40 and found["entries_per_token"] == 8
    assert found["sequence_tokens"]["max"] == 30 and found["shards"][0]["codec"] == (
        "plain" if lab.values == "plain" else "dense"
    )
