"""Further columns: hidden states, scores, class vectors, named values of each token."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from potstill import cache
from potstill.cache import Column
from potstill.cache.exchange.convert import export
from potstill.cache.exchange.parts import merge, split
from potstill.cli import main

from ..forks import exit_code, fork
from .test_hostile import put, reforge

COLUMNS = (
    Column.hidden(6),
    Column.scores("reward", "length"),
    Column.classes(3),
    "whitespace",
    Column("pair", "fp32", 2),
)


def values(length: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "hidden": torch.from_numpy(rng.normal(0, 3, (length, 6))).bfloat16(),
        "scores": {"length": float(length), "reward": -1.25},
        "classes": rng.normal(0, 1, 3).astype(np.float32),
        "columns": {
            "whitespace": rng.random(length).astype(np.float16),
            "pair": rng.random((length, 2)).astype(np.float32),
        },
    }


def write(path: Path, lab, lengths: dict[str, int], **options) -> dict:
    given = {key: (lab.rows(n, seed=i), values(n, i)) for i, (key, n) in enumerate(lengths.items())}
    with cache.Writer(path, lab.spec(columns=COLUMNS), **options) as w:
        for key, (rows, more) in given.items():
            assert w.add(key, rows.tokens, rows, **more)
            assert not w.add(key, rows.tokens, rows, **more)
    return given


def check(store: cache.Cache, given: dict, lab) -> None:
    assert sorted(store.keys()) == sorted(given)
    for key, (rows, more) in given.items():
        got = store[key]
        lab.same(store.numpy(key), rows, key)
        assert torch.equal(got.columns["hidden"], more["hidden"]) and got.columns["hidden"].dtype == torch.bfloat16
        assert got.columns["scores"].tolist() == [-1.25, float(len(rows.tokens))]
        np.testing.assert_array_equal(got.columns["classes"].numpy(), more["classes"])
        np.testing.assert_array_equal(got.columns["whitespace"].numpy(), more["columns"]["whitespace"])
        np.testing.assert_array_equal(got.columns["pair"].numpy(), more["columns"]["pair"])


LENGTHS = {"a": 5, "b": 1, "long": 300}


def test_round_trip_and_the_independent_reader(tmp_path, lab, independent):
    given = write(tmp_path / "c", lab, LENGTHS)
    store = cache.open(tmp_path / "c")
    check(store, given, lab)
    assert store.verify().ok and store.spec == lab.spec(columns=COLUMNS)
    assert store.spec.columns[1].labels == ("reward", "length")
    theirs = independent.cache(tmp_path / "c", columns=True)
    for key, (rows, more) in given.items():
        named = theirs[key][-1]
        np.testing.assert_array_equal(theirs[key][0], rows.tokens)
        np.testing.assert_array_equal(named["hidden"], more["hidden"].float().numpy())
        np.testing.assert_array_equal(named["scores"], [[-1.25, len(rows.tokens)]])
        np.testing.assert_array_equal(named["classes"], more["classes"][None])
        np.testing.assert_array_equal(named["whitespace"][:, 0], more["columns"]["whitespace"].astype(np.float32))
        np.testing.assert_array_equal(named["pair"], more["columns"]["pair"])


def test_batches_of_columns(tmp_path, lab):
    given = write(tmp_path / "c", lab, LENGTHS)
    store, keys = cache.open(tmp_path / "c"), ["long", "a", "b", "a"]
    hidden = store.columns(keys, "hidden")
    assert hidden.shape == (4, 300, 6) and hidden.dtype == torch.bfloat16
    for b, key in enumerate(keys):
        n = LENGTHS[key]
        assert torch.equal(hidden[b, :n], given[key][1]["hidden"]) and not hidden[b, n:].any()
    packed = store.columns(keys, "whitespace", packed=True)
    want = np.concatenate([given[key][1]["columns"]["whitespace"] for key in keys])
    np.testing.assert_array_equal(packed.numpy(), want)
    scores = store.columns(keys, "scores", packed=True)
    assert scores.tolist() == [[-1.25, float(LENGTHS[key])] for key in keys]
    prefix = store.columns(["long", "a"], "hidden", rows=[7, 2])
    assert torch.equal(prefix[0], given["long"][1]["hidden"][:7]) and not prefix[1, 2:].any()
    with pytest.raises(KeyError, match="no column 'nothing'"):
        store.columns(keys, "nothing")
    with pytest.raises(ValueError, match="6 rows of column .*hidden.* it has 5"):
        store.columns(["a"], "hidden", rows=[6])


def test_large_rows_take_many_blocks(tmp_path, lab):
    """40,000 bytes a row: 26 rows a block."""
    hidden = torch.randn(60, 20_000).bfloat16()
    rows = lab.rows(60)
    with cache.Writer(tmp_path / "c", lab.spec(columns=Column.hidden(20_000))) as w:
        w.add("x", rows.tokens, rows, hidden=hidden)
    store = cache.open(tmp_path / "c")
    assert torch.equal(store.column("x", "hidden"), hidden) and store.verify().ok
    assert torch.equal(store.columns(["x"], "hidden", rows=[30])[0], hidden[:30])
    blocks = json.loads(json.dumps(cache.inspect_cache(tmp_path / "c")))["shards"][0]["blocks"]
    assert blocks == 1 + 3


def test_inspect_lists_the_columns(tmp_path, lab):
    write(tmp_path / "c", lab, {"a": 30, "b": 7})
    found = {c["name"]: c for c in cache.inspect_cache(tmp_path / "c")["columns"]}
    assert list(found) == ["hidden", "scores", "classes", "whitespace", "pair"]
    assert found["scores"]["labels"] == ["reward", "length"] and found["hidden"]["dtype"] == "bf16"
    assert 37 * 12 < found["hidden"]["bytes"] < 37 * 12 + 200 and found["classes"]["per"] == "sequence"
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "c")]).output
    assert "hidden=6 bf16 a token" in shown and "classes=3 fp32 a sequence" in shown
    lab.write(tmp_path / "d", {"a": 3})
    assert cache.inspect_cache(tmp_path / "d")["columns"] == []
    assert "columns            none" in CliRunner().invoke(main, ["inspect", str(tmp_path / "d")]).output


def test_numpy_values_are_rounded_as_torch_rounds_them(tmp_path, lab):
    rows, hidden = lab.rows(50), np.random.default_rng(0).normal(0, 1e3, (50, 6)).astype(np.float32)
    hidden[0, :3] = 1 + 2**-8, 1 + 3 * 2**-8, -1e-41  # ties to even, a subnormal
    with cache.Writer(tmp_path / "c", lab.spec(columns=(Column.hidden(6), Column("same", "fp16", 6)))) as w:
        w.add("x", rows.tokens, rows, hidden=hidden, columns={"same": hidden.tolist()})
    store = cache.open(tmp_path / "c")
    assert torch.equal(store.column("x", "hidden"), torch.from_numpy(hidden).bfloat16())
    assert torch.equal(store.column("x", "same"), torch.from_numpy(hidden).half())


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"hidden": None}, r"has the further columns .*, the spec has .*'hidden'"),
        ({"hidden": torch.zeros(4, 6)}, r"hidden has shape \[4, 6\], \[5, 6\] is needed"),
        ({"hidden": torch.zeros(5, 7)}, r"hidden has shape \[5, 7\]"),
        ({"hidden": torch.full((5, 6), float("nan"))}, 'column "hidden", row 0: a number that is not finite'),
        ({"hidden": np.full((5, 6), np.nan, np.float32)}, 'column "hidden", row 0: a number that is not finite'),
        ({"scores": {"reward": 1.0}}, r"scores has \['reward'\], \['length', 'reward'\] are needed"),
        ({"scores": [1.0, float("inf")]}, 'column "scores", row 0'),
        ({"classes": [1.0, 2.0]}, r"classes has shape \[2\], \[3\] is needed"),
        ({"columns": {"whitespace": [0.5, 0, 0, 0, 7e4], "pair": np.zeros((5, 2))}}, 'column "whitespace", row 4'),
        ({"columns": {"whitespace": np.zeros(5)}}, "the spec has .*'pair'"),
        ({"columns": {"whitespace": np.zeros(5), "pair": np.zeros((5, 2)), "more": np.zeros(5)}}, "'more'"),
    ],
)
def test_refused_values(tmp_path, plain_lab, change, sentence):
    rows = plain_lab.rows(5)
    with cache.Writer(tmp_path / "c", plain_lab.spec(columns=COLUMNS)) as w:
        with pytest.raises(ValueError, match=sentence):
            w.add("x", rows.tokens, rows, **{**values(5), **change})
        assert w.add("x", rows.tokens, rows, **values(5))
        with pytest.raises(ValueError, match="other content"):
            w.add("x", rows.tokens, rows, **{**values(5), "classes": [9.0, 9.0, 9.0]})


@pytest.mark.parametrize(
    "columns, sentence",
    [
        ((Column.hidden(2), Column.hidden(3)), "different names"),
        ([f"c{i}" for i in range(65)], "at most 64"),
        ((3,), "holds a int"),
    ],
)
def test_refused_specs(columns, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        cache.Spec(100, 4, columns=columns)
    for bad in [{"name": ""}, {"name": "x", "dtype": "int8"}, {"name": "x", "width": 0}, {"name": "x", "per": "word"}]:
        with pytest.raises(ValueError, match="is accepted"):
            Column(**bad)


def test_resume_with_other_columns_is_refused(tmp_path, lab):
    write(tmp_path / "c", lab, {"a": 5})
    with pytest.raises(cache.CacheError, match="columns"):
        cache.Writer(tmp_path / "c", lab.spec())
    with pytest.raises(cache.CacheError, match="columns"):
        cache.Writer(tmp_path / "c", lab.spec(columns=Column.hidden(7)))


def test_dead_writers_columns_are_salvaged(tmp_path, lab):
    path = tmp_path / "c"
    given = {key: (lab.rows(n, seed=i), values(n, i)) for i, (key, n) in enumerate(LENGTHS.items())}

    def die():
        w = cache.Writer(path, lab.spec(columns=COLUMNS))
        for key, (rows, more) in given.items():
            w.add(key, rows.tokens, rows, **more)
        os._exit(0)

    assert exit_code(fork(die)) == 0
    (torn,) = (path / "open").iterdir()
    data = torn.read_bytes()
    for lost in (0, 200):  # the end of the last sequence's last column
        torn.write_bytes(data[: len(data) - lost])
        copy = tmp_path / f"copy{lost}"
        os.system(f"cp -r {path} {copy}")
        with cache.Writer(copy, lab.spec(columns=COLUMNS)) as w:
            assert w.salvaged == (2 if lost else 3)
        store = cache.open(copy)
        check(store, {k: v for k, v in given.items() if not lost or k != "long"}, lab)
        assert store.verify().ok


def test_a_shard_learns_its_tables_and_keeps_its_columns(tmp_path, dense_lab):
    """The dense codec writes an open shard again once it has seen enough rows."""
    given = write(tmp_path / "c", dense_lab, {f"s{i}": 400 for i in range(8)})
    check(cache.open(tmp_path / "c"), given, dense_lab)
    (shard,) = dense_lab.shard_files(tmp_path / "c")
    assert int.from_bytes(shard.read_bytes()[104:112], "little") > 0, "no table was learnt"


def in_block(number, fmt, offset, value):
    """A change inside block `number`, counted from its start."""

    def change(data, header_len, foot):
        before = sum(struct.unpack_from("<I", data, foot + 40 + 24 * i)[0] for i in range(number))
        struct.pack_into(fmt, data, header_len + before + offset, value)

    return change


# blocks of "a": rows, hidden (bf16 [5, 6]), scores, classes, whitespace, pair; 24 bytes each in the footer
ATTACKS = {
    "out of order": (put("<H", ("footer", 76), 2), "a block of kind 2 after 5 rows of kind 0"),
    "rows twice": (put("<H", ("footer", 76), 0), "5 tokens, its blocks 10 rows"),
    "fewer rows": (put("<I", ("footer", 68), 4), "for 4 rows of column 1"),
    "many rows": (put("<I", ("footer", 68), 2**32 - 1), "4294967295 rows in a block"),
    "entries": (put("<I", ("footer", 72), 1), "are needed|entries are stated"),
    "no such column": (put("<H", ("footer", 172), 6), "a block of kind 6 after"),
    "no columns": (put("<Q", ("header", 16), 0), "further columns are not those"),
    "not a number": (in_block(1, "<H", 40, 0x7FC0), "block 1: column .*hidden.*, row 0: a number that is not finite"),
    "infinite": (in_block(2, "<I", 40, 0x7F800000), "block 2: column .*scores.*not finite"),
    "another row": (in_block(1, "<I", 16, 1), "block 1: it holds row 1 .* where row 0"),
    "another key": (in_block(3, "<B", 32, ord("b")), "block 3: it holds row 0 of .*b.* where row 0 of .*a.* belongs"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_pitfall_28_forged_columns_are_refused(tmp_path, plain_lab, name):
    pytest.importorskip("xxhash")
    write(tmp_path / "c", plain_lab, {"a": 5})
    change, match = ATTACKS[name]
    reforge(tmp_path / "c", plain_lab, change, blocks=6)
    with pytest.raises(cache.CacheError, match=match):
        assert cache.open(tmp_path / "c")["a"] is None
    report = cache.verify_cache(tmp_path / "c")
    assert not report.ok


def test_merge_and_split_keep_columns(tmp_path, lab):
    given = write(tmp_path / "a", lab, {"a": 5, "b": 1})
    other = write(tmp_path / "b", lab, {"x": 9, "y": 300})
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    check(cache.open(tmp_path / "both"), given | other, lab)
    split(tmp_path / "both", [tmp_path / "one", tmp_path / "two"], keys=["y", "a"])
    check(cache.open(tmp_path / "one"), {"y": other["y"], "a": given["a"]}, lab)
    check(cache.open(tmp_path / "two"), {"b": given["b"], "x": other["x"]}, lab)
    with pytest.raises(ValueError, match="hidden.*cannot hold"):
        export(tmp_path / "both", tmp_path / "rows.jsonl", "jsonl", "")


def test_what_an_older_version_would_do(tmp_path, lab):
    """It refuses the folder by the name of what it does not know, and a shard by its required flag."""
    write(tmp_path / "c", lab, {"a": 5})
    for name in ("manifest.json", "log/0000000000.json"):
        assert json.loads((tmp_path / "c" / name).read_bytes())["required"] == ["columns"]
    assert json.loads((tmp_path / "c" / "log" / "0000000001.json").read_bytes())["required"] == []
    (shard,) = lab.shard_files(tmp_path / "c")
    data = shard.read_bytes()
    assert int.from_bytes(data[10:12], "little") == 2 and int.from_bytes(data[16:24], "little") & 2
