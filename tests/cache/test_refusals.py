"""What may not be written, refused by key, row and value; nothing of it reaches the cache."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from potstill import cache

inf = np.inf


def top(ids, log_probs, log_rest=-inf):
    n = len(ids)
    rest = np.full(n, log_rest, np.float32)
    return SimpleNamespace(ids=np.array(ids), log_probs=np.array(log_probs, np.float32), log_rest=rest)


BAD = {
    "id at V": ([[1, 2], [3, 10]], [[-1, -2], [-1, -2]], -inf, 'sequence "x", row 1: entry 1 has id 10'),
    "id below -1": ([[1, -2]], [[-1, -2]], -inf, "row 0: entry 1 has id -2"),
    "twice": ([[1, 1]], [[-1, -2]], -inf, "row 0: entry 1 repeats id 1"),
    "NaN": ([[1, 2]], [[-1, np.nan]], -inf, "row 0: entry 1 has log_prob NaN"),
    "positive": ([[1, 2]], [[0.01, -9]], -inf, "row 0: entry 0 has log_prob 0.01"),
    "mass": ([[1, 2]], [[-0.1, -0.2]], -inf, "row 0: the probabilities sum to 1.72"),
    "mass with rest": ([[1, 2]], [[-0.1, -9]], -1.0, "row 0: the probabilities sum to 1.27"),
    "order": ([[1, 2]], [[-3, -2]], -inf, "sort each row"),
    "rest NaN": ([[1, 2]], [[-3, -4]], np.nan, "log_rest is NaN"),
    "rest positive": ([[1, 2]], [[-3, -4]], 0.5, "log_rest is 0.5"),
    "gap": ([[-1, 2]], [[-inf, -4]], -1.0, "after a missing entry"),
    "missing with mass": ([[2, -1]], [[-1, -4]], -1.0, "after a missing entry"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(tmp_path, lab, name):
    ids, log_probs, rest, message = BAD[name]
    with cache.Writer(tmp_path / "c", lab.spec(k=2, vocab=10)) as w:
        with pytest.raises(ValueError, match=message):
            w.add("x", [1] * len(ids), top(ids, log_probs, rest))
        assert "x" not in w and w.add("x", [1], top([[1, 2]], [[-1, -2]]))
    assert cache.open(tmp_path / "c").keys() == ["x"] and cache.verify_cache(tmp_path / "c").ok


def test_tolerated_noise_is_clamped(tmp_path, lab):
    with cache.Writer(tmp_path / "c", lab.spec(k=2, vocab=10)) as w:
        w.add("x", [1], top([[1, 2]], [[5e-4, -20]], -30))
    assert cache.open(tmp_path / "c").numpy("x")[2][0, 0] == 0


def test_bad_shapes_and_keys(tmp_path, lab):
    good = top([[1, 2]], [[-1, -2]])
    with cache.Writer(tmp_path / "c", lab.spec(k=2, vocab=10)) as w:
        for tokens, rows, error, message in [
            ([1, 2], good, ValueError, "2 tokens"),
            ([[1]], good, ValueError, "shape"),
            (
                [],
                SimpleNamespace(ids=np.zeros((0, 2), int), log_probs=np.zeros((0, 2)), log_rest=np.zeros(0)),
                ValueError,
                "0 tokens",
            ),
            ([-1], good, ValueError, "token -1 is negative"),
            ([2**31], good, ValueError, "outside int32"),
            ([0.5], good, TypeError, "integers are accepted"),
            ([1], top([[1, 2, 3]], [[-1, -2, -3]]), ValueError, "3 entries a row, the spec accepts 1 to 2"),
            ([1], SimpleNamespace(ids=good.ids, log_probs=good.log_probs), ValueError, "log_rest is missing"),
            ([1], SimpleNamespace(**{**vars(good), "log_probs": good.ids}), TypeError, "floating"),
            (
                [1],
                SimpleNamespace(**{**vars(good), "log_probs": good.log_probs[:, :1]}),
                ValueError,
                "log_probs",
            ),
        ]:
            with pytest.raises(error, match=message):
                w.add("x", tokens, rows)
        for key in ["", "k" * 513, "ü" * 257]:
            with pytest.raises(ValueError, match="1 to 512"):
                w.add(key, [1], good)
        with pytest.raises(TypeError, match="key is a int"):
            w.add(3, [1], good)
        w.add("narrow", [1], top([[4]], [[-1]]))
    _, ids, log_probs, _ = cache.open(tmp_path / "c").numpy("narrow")
    assert ids.tolist() == [[4, -1]] and log_probs[0, 1] == -inf


def test_bad_specs():
    for kwargs, error in [
        ({"vocab_size": 0, "k": 1}, ValueError),
        ({"vocab_size": 8, "k": 9}, ValueError),
        ({"vocab_size": 2**31, "k": 9}, ValueError),
        ({"vocab_size": 100_000, "k": 65_536}, ValueError),
        ({"vocab_size": 8.0, "k": 1}, TypeError),
        ({"vocab_size": 8, "k": 1, "extra": {"x": {1, 2}}}, TypeError),
        ({"vocab_size": 8, "k": 1, "extra": {"x": float("nan")}}, TypeError),
    ]:
        with pytest.raises(error, match="Spec"):
            cache.Spec(**kwargs)
