"""k = 0: rows that hold the realised token's log-probability and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import potstill
import pytest
import torch
from click.testing import CliRunner
from potstill import cache
from potstill.cache.tools import verify_cache
from potstill.cli import main


def rows(length: int, vocab: int = 300, seed: int = 0) -> SimpleNamespace:
    rng = np.random.default_rng(seed)
    found = (-rng.exponential(2.0, length)).astype(np.float32)
    found[-1] = -np.inf  # nothing comes behind the last token
    tokens = np.minimum(rng.zipf(1.3, length) - 1, vocab + 3).astype(np.int32)  # some are outside the vocabulary
    return SimpleNamespace(
        tokens=tokens, ids=np.empty((length, 0), np.int32), log_probs=np.empty((length, 0), np.float32),
        log_rest=np.zeros(length, np.float32), token_log_probs=found,
    )  # fmt: skip


def spec(values: str = "fp32", codec: int = 2, **more) -> cache.Spec:
    return cache.Spec(300, 0, values=values, codec=codec, token_log_probs=True, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, what was written): enough rows for tables to learn from, in two shards, with a further column."""
    path = tmp_path_factory.mktemp("none") / "c"
    given = {f"s{n}": rows(length, seed=n) for n, length in enumerate((9000, 1, 700))}
    with cache.Writer(path, spec(columns=("end",))) as w:
        for key, r in given.items():
            w.add(key, r.tokens, r, columns={"end": np.zeros(len(r.tokens), np.float32)})
            w.flush() if key == "s1" else None
    return path, given


@pytest.mark.parametrize("values, codec", [("1/8", 1), ("1/64", 2), ("fp16", 2), ("fp32", 1)])
def test_every_kind_of_values_in_both_readers(tmp_path, independent, values, codec):
    given = {f"s{n}": rows(length, seed=n) for n, length in enumerate((8500, 1, 40))}
    with cache.Writer(tmp_path / "c", spec(values, codec)) as w:
        for key, r in given.items():
            assert w.add(key, r.tokens, r)
            assert not w.add(key, r.tokens, r)
    store, theirs = cache.open(tmp_path / "c"), independent.cache(tmp_path / "c", columns=True)
    assert store.spec.k == 0 and store.verify().ok and len(store) == 3
    steps = eval(values) if "/" in values else 0
    bound = steps / (2 if codec == 1 else 8) + (1e-5 if steps else 0)
    for key, r in given.items():
        tokens, ids, log_probs, log_rest, extra = theirs[key][:5]
        found = store[key]
        np.testing.assert_array_equal(found.tokens, r.tokens)
        np.testing.assert_array_equal(tokens, r.tokens)
        assert ids.shape == log_probs.shape == tuple(found.topk.ids.shape) == (len(tokens), 0)
        assert not found.topk.log_rest.any() and not log_rest.any()
        np.testing.assert_array_equal(found.topk.token_log_probs.numpy(), extra[:, 0])
        np.testing.assert_allclose(extra[:, 0], r.token_log_probs, rtol=0, atol=bound)
    batch = store.batch(["s2", "s0"], tokens=[given["s2"].tokens[:5], given["s0"].tokens])
    assert batch.ids.shape == (2, 8500, 0) and batch.token_log_probs.shape == (2, 8500)
    np.testing.assert_allclose(batch.token_log_probs[0, :5], given["s2"].token_log_probs[:5], rtol=0, atol=bound)


def test_four_bytes_and_the_tokens(whole):
    """fp32: 4 bytes of log-probability, 2 of the further column, and tokens by frequency in less than their 9 bits."""
    path, _ = whole
    assert 6 < cache.open(path).num_bytes / 9701 < 7.5


def test_a_flipped_bit_and_a_cut_file_are_found(whole, tmp_path):
    path, _ = whole
    shard = max((path / "shards").glob("*.shard"), key=os.path.getsize)
    data = shard.read_bytes()
    for place in np.linspace(0, len(data) - 1, 41).astype(int):
        copy = tmp_path / str(place)
        shutil.copytree(path, copy)
        broken = bytearray(data)
        broken[place] ^= 16
        (copy / "shards" / shard.name).write_bytes(bytes(broken))
        report = verify_cache(copy)
        assert not report.ok, place
        shutil.rmtree(copy)
    shutil.copytree(path, tmp_path / "cut")
    (tmp_path / "cut" / "shards" / shard.name).write_bytes(data[:-9])
    assert not verify_cache(tmp_path / "cut").ok


def test_a_killed_writer_loses_nothing_whole(tmp_path):
    code = (
        "import os, sys; sys.path[:0] = [sys.argv[2]]\n"
        "from test_no_entries import rows, spec\nfrom potstill import cache\n"
        "w = cache.Writer(sys.argv[1], spec('1/16'))\n"
        "for n in range(3):\n    r = rows(50, seed=n)\n    w.add(f's{n}', r.tokens, r)\n"
        "os._exit(9)\n"
    )
    path = tmp_path / "c"
    done = subprocess.run([sys.executable, "-c", code, str(path), os.path.dirname(__file__)])
    assert done.returncode == 9
    with cache.Writer(path, spec("1/16")) as w:
        assert w.salvaged == 3
    store = cache.open(path)
    for n in range(3):
        np.testing.assert_array_equal(store.tokens(f"s{n}"), rows(50, seed=n).tokens)
    assert store.verify().ok


def test_tools(whole, tmp_path):
    path, given = whole
    run = CliRunner().invoke
    assert run(main, ["verify", "--deep", str(path)]).exit_code == 0
    facts = json.loads(run(main, ["inspect", "--json", str(path)]).output)
    assert facts["spec"]["k"] == 0 and facts["distributions"]["token_log_probs"]["max"] <= 0
    assert run(main, ["inspect", str(path)]).exit_code == 0
    failed = run(main, ["inspect", "--against", str(path), str(path)])
    assert failed.exit_code and "rows without entries" in str(failed.output) + str(failed.exception)
    merged = run(main, ["merge", str(path), str(tmp_path / "m")])
    assert merged.exit_code == 0, merged.output
    assert run(main, ["card", str(tmp_path / "m")]).exit_code == 0
    assert "Row i is that of token i + 1" in (tmp_path / "m" / "README.md").read_text()
    with cache.Writer(tmp_path / "p", spec()) as w:
        w.add("s2", given["s2"].tokens, given["s2"])
    for name, more in {"x.tar": [], "x.safetensors": [], "x.parquet": [], "x.arrow": [],
                       "x.jsonl": ["--vocab-size", "300", "--values", "fp32"]}.items():  # fmt: skip
        assert run(main, ["convert", str(tmp_path / "p"), str(tmp_path / name)]).exit_code == 0
        done = run(main, ["convert", str(tmp_path / name), str(tmp_path / f"from-{name[2:]}"), *more])
        assert done.exit_code == 0, done.output
        back = cache.open(tmp_path / f"from-{name[2:]}")["s2"].topk
        assert back.ids.shape[1] == 0
        np.testing.assert_array_equal(back.token_log_probs.numpy(), given["s2"].token_log_probs)
    filled = tmp_path / "x.jsonl"
    filled.write_text(filled.read_text().replace("[[]", "[[7]", 1).replace('"log_probs":[[]', '"log_probs":[[-1.5]', 1))
    failed = run(main, ["convert", str(filled), str(tmp_path / "f"), "--vocab-size", "300", "--k", "0"])
    assert failed.exit_code and "has 1 entries in a row, but k = 0 keeps" in failed.output
    failed = run(main, ["convert", str(tmp_path / "p"), str(tmp_path / "kit"), "--to", "distillkit"])
    assert failed.exit_code and "no place for token_log_probs" in failed.output
    store = cache.open(tmp_path / "m")
    np.testing.assert_array_equal(store.tokens("s0"), given["s0"].tokens)


def test_refusals(tmp_path):
    for more in ({}, {"temperatures": (2.0,)}, {"sampled": True}):
        with pytest.raises(ValueError, match=r"Spec.k is 0, which keeps the realised token's log-probability alone"):
            cache.Spec(300, 0, token_log_probs=bool(more), **more)
    for values in ("plain", "bf16_logits"):
        with pytest.raises(ValueError, match=r"Spec"):
            spec(values)
    r = rows(5)
    with cache.Writer(tmp_path / "c", spec()) as w:
        r.log_rest[2] = -1.0
        with pytest.raises(ValueError, match="row 2: log_rest is -1, 0 is accepted where rows have no entries"):
            w.add("a", r.tokens, r)
        r.log_rest[2], r.ids, r.log_probs = 0, np.zeros((5, 1), np.int32), np.full((5, 1), -1, np.float32)
        with pytest.raises(ValueError, match="has 1 entries a row, the spec accepts 0 to 0"):
            w.add("a", r.tokens, r)
    with cache.Writer(tmp_path / "d", cache.Spec(300, 2)) as w:
        with pytest.raises(ValueError, match="has 0 entries a row, the spec accepts 1 to 2"):
            w.add("a", r.tokens, rows(5))


def test_a_loss_over_no_entries_is_refused(whole):
    topk = cache.open(whole[0])["s2"].topk
    with pytest.raises(ValueError, match="rows without entries"):
        potstill.distill_loss(torch.zeros(700, 300), topk)
