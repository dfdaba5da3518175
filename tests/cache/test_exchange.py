"""Caches as other files and back: exact where the format allows it, and refused where the file is wrong."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from potstill import cache
from potstill.cache.exchange import archive as archive_format
from potstill.cache.exchange import distillkit, tensors
from potstill.cache.exchange.convert import FORMATS, convert
from potstill.cache.exchange.sequence import of_cache
from potstill.cli import main

pytest.importorskip("pyarrow", reason="Parquet and Arrow need the extra [arrow]")
GOLDEN = Path(__file__).parents[1] / "golden"
# every kind of values and column there is: plain; a grid with draws, a temperature, the realised token; bf16 logits
SOURCES = ("cache_v1", "cache_v1_dense", "cache_v1_exact", "cache_v1_shifted")
SUFFIXED = {name: suffix for name, (*_, suffix) in FORMATS.items() if suffix}


def columns(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Everything that a cache says of its rows; entries of equal log-probability in order of id."""
    found = {}
    for s in of_cache(cache.open(path)):
        order = np.lexsort((np.where(s.ids < 0, 2**31, s.ids), -s.log_probs), axis=-1)
        entries = {name: np.take_along_axis(column, order, -1) for name, column in s.per_entry().items()}
        found[s.key] = {"tokens": s.tokens, **entries, **s.per_row()}
    return found


def same(got: dict, want: dict) -> None:
    assert list(got) == list(want)
    for key, there in want.items():
        assert got[key].keys() == there.keys()
        for name, column in there.items():
            np.testing.assert_array_equal(got[key][name], column, err_msg=f"{key} {name}")


@pytest.fixture(scope="module")
def fp32(tmp_path_factory, dense_lab) -> Path:
    """Ragged rows as they are, and lengths from 1."""
    path = tmp_path_factory.mktemp("fp32") / "c"
    with cache.Writer(path, dense_lab.spec(values="fp32", k=5, vocab=90)) as w:
        for i, n in enumerate((1, 7, 40, 3)):
            r = dense_lab.rows(n, seed=i, ragged=True, k=5, vocab=90)
            w.add(f"süß {i}", r.tokens, r)
    return path


@pytest.mark.parametrize("name", SUFFIXED)
@pytest.mark.parametrize("source", [*SOURCES, "fp32"])
def test_round_trips_are_exact(tmp_path, source, name, fp32):
    path = fp32 if source == "fp32" else GOLDEN / source
    file, back = tmp_path / f"rows{SUFFIXED[name]}", tmp_path / "back"
    opened = cache.open(path)
    spec, want = opened.spec, columns(path)
    assert convert(path, file) == {"format": name, "sequences": len(opened), "tokens": opened.num_tokens}
    if name == "jsonl":  # it keeps no spec
        fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
        convert(file, back, rounded=True, **fields)
    else:
        convert(file, back)
    assert cache.open(back).spec == spec and cache.verify_cache(back).ok
    same(columns(back), want)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", file.name]


def test_independent_libraries_read_what_is_written(tmp_path, fp32):
    import pyarrow.parquet as pq
    from safetensors.numpy import load_file

    want = columns(fp32)
    convert(fp32, tmp_path / "c.safetensors")
    stored = load_file(tmp_path / "c.safetensors")
    joined = {n: np.concatenate([c[n] for c in want.values()]) for n in ("tokens", "log_probs", "log_rest")}
    for name, column in joined.items():
        np.testing.assert_array_equal(stored[name], column)
    convert(fp32, tmp_path / "c.parquet")
    rows = pq.read_table(tmp_path / "c.parquet").to_pylist()
    assert [r["key"] for r in rows] == list(want)
    for r, c in zip(rows, want.values(), strict=True):
        assert r["ids"] == [[i for i in ids if i >= 0] for ids in c["ids"].tolist()]
    convert(fp32, tmp_path / "c.tar")
    with tarfile.open(tmp_path / "c.tar") as tar, np.load(tar.extractfile(tar.getnames()[2])) as member:
        np.testing.assert_array_equal(member["log_rest"], want["süß 1"]["log_rest"])


def without_last(want: dict, rest: bool = False) -> dict:
    """What the layouts without a place for the last row and log_rest keep."""
    kept = {}
    for key, c in want.items():
        ids, log_probs = c["ids"].copy(), c["log_probs"].copy()
        ids[-1], log_probs[-1] = -1, -np.inf
        kept[key] = {"tokens": c["tokens"], "ids": ids, "log_probs": log_probs}
    return kept


@pytest.mark.parametrize("layout", ["axolotl", "trl"])
@pytest.mark.parametrize("name", ["parquet", "jsonl"])
def test_trainer_columns(tmp_path, fp32, layout, name):
    """All rows but the last come back; log_rest is what the entries leave, as good as fp32 sums are."""
    file = tmp_path / f"rows.{name}"
    convert(fp32, file, layout=layout)
    convert(file, tmp_path / "back", layout=layout, values="fp32", vocab_size=90, k=5)
    got, want = columns(tmp_path / "back"), columns(fp32)
    for key, c in got.items():
        rest = c.pop("log_rest")
        expected = np.exp(want[key]["log_rest"])
        expected[-1] = 1.0  # a row without entries
        # ragged rows of the fixture leave log_rest for the entries they dropped, so compare with those
        mass = np.exp(c["log_probs"].astype(np.float64)).sum(-1)
        np.testing.assert_allclose(np.exp(rest), 1 - mass, atol=1e-6)
        assert expected[-1] == pytest.approx(math.exp(rest[-1]))
    same(got, without_last(want))
    if layout == "axolotl" and name == "jsonl":
        row = json.loads(file.read_text().splitlines()[1])
        assert set(row) == {
            "key",
            "input_ids",
            "labels",
            "attention_mask",
            "target_token_ids",
            "target_logprobs",
            "target_mask",
        }
        assert row["target_mask"][0] == [0] * 5 and len(row["target_token_ids"]) == len(row["input_ids"])
        first = [i for i, m in zip(row["target_token_ids"][1], row["target_mask"][1], strict=True) if m]
        assert first == [i for i in want["süß 1"]["ids"][0].tolist() if i >= 0]


def test_trl_rows_of_a_completion_alone(tmp_path):
    row = {"input_ids": [5, 6, 7, 8], "logprobs": [[-0.5, -2.0], [-0.1, -3.0]], "logprob_token_ids": [[7, 1], [8, 2]]}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    convert(tmp_path / "t.jsonl", tmp_path / "c", layout="trl", vocab_size=10, values="fp32")
    tokens, ids, log_probs, log_rest = cache.open(tmp_path / "c").numpy("00000000")
    assert tokens.tolist() == [5, 6, 7, 8]
    assert ids.tolist() == [[-1, -1], [7, 1], [8, 2], [-1, -1]]  # row i is the distribution of token i + 1
    np.testing.assert_allclose(
        np.exp(log_rest), [1, 1 - math.exp(-0.5) - math.exp(-2), 1 - math.exp(-0.1) - math.exp(-3), 1], 1e-6
    )


def test_distillkit_round_trip(tmp_path, fp32):
    convert(fp32, tmp_path / "kit", write_as="distillkit")
    assert sorted(p.name for p in (tmp_path / "kit").iterdir()) == ["compression_config.yaml", "data_0.parquet"]
    convert(tmp_path / "kit", tmp_path / "back")
    back = cache.open(tmp_path / "back")
    assert (back.spec.vocab_size, back.spec.k, back.spec.values) == (90, 5, "fp32")
    got = columns(tmp_path / "back")
    for (_, c), (_, want) in zip(got.items(), without_last(columns(fp32)).items(), strict=True):
        c.pop("log_rest")
        same({"": c}, {"": want})


def test_distillkit_compressed_rows_by_hand():
    """exact values, a polynomial over the rest, a residual bin; and the delta form."""
    where = Path("compression_config.yaml")
    form = distillkit.Form(
        {"d": 1000, "k": 5, "exact_k": 2, "exact_dtype": "float16", "polynomial_terms": [0, 1, "sqrt"],
         "term_dtype": "float32", "delta_encoding": False,
         "residual_bins": [{"scale_dtype": "float32", "element_bits": 4, "num_elements": 2}]}, where)  # fmt: skip
    exact, terms = np.array([-0.5, -1.25], "<f2"), np.array([-3, -0.25, -0.5], "<f4")
    data = exact.tobytes() + terms.tobytes() + np.array([0.125], "<f4").tobytes() + bytes([0b1010_0101])
    t = np.arange(3)
    rest = -3 - 0.25 * t - 0.5 * np.sqrt(t) + 0.125 * np.array([10 - 8, 5 - 8, 0])
    got = form.log_probs(np.frombuffer(data, np.uint8)[None])
    np.testing.assert_allclose(got, [[-0.5, -1.25, *rest]], rtol=1e-6)
    ids = np.array([[999, 0, 512, 3, 77]], np.int32)
    bits = "".join(f"{i:010b}" for i in ids[0])
    packed = int(bits.ljust(56, "0"), 2).to_bytes(7, "big")
    assert distillkit.pack(ids, 10).tobytes() == packed
    np.testing.assert_array_equal(distillkit.unpack(np.frombuffer(packed, np.uint8)[None], 10, 5), ids)
    delta = distillkit.Form({"d": 8, "k": 3, "exact_k": 3, "exact_dtype": "bfloat16", "delta_encoding": True}, where)
    raw = (np.array([-0.5, -0.25, -2], "<f4").view(np.uint32) >> 16).astype("<u2").tobytes()
    np.testing.assert_array_equal(delta.log_probs(np.frombuffer(raw, np.uint8)[None]), [[-0.5, -0.75, -2.75]])
    for bad in ({"d": 8, "k": 3}, {"d": 8, "k": 3, "exact_k": 4}, {"d": 8, "k": 3, "exact_k": 3, "zip": 1},
                {"d": 8, "k": 3, "exact_k": 3, "exact_dtype": "int8"}, [], {"d": 8, "k": 9, "exact_k": 1}):  # fmt: skip
        with pytest.raises(ValueError):
            distillkit.Form(bad, where)


GOOD = {
    "key": "a",
    "tokens": [1, 2],
    "ids": [[3, 4], [5]],
    "log_probs": [[-1.0, -2.0], [-0.5]],
    "log_rest": [-0.9, -1.0],
}
BAD = {
    "no column": ({"ids": ...}, "has no column ids"),
    "fewer rows": ({"ids": [[3, 4]], "log_probs": [[-1.0, -2.0]]}, "1 rows of ids for 2 tokens"),
    "fewer lists": ({"log_probs": [[-1.0, -2.0]]}, "2 lists of ids, 1 of log_probs"),
    "other lengths": ({"log_probs": [[-1.0], [-0.5]]}, "different lengths"),
    "short rest": ({"log_rest": [-1.0]}, "1 rows of log_rest for 2 tokens"),
    "id at V": ({"ids": [[3, 10], [5]]}, "row 0: entry 1 has id 10"),
    "id over int32": ({"ids": [[3, 2**40], [5]]}, "outside int32"),
    "id twice": ({"ids": [[3, 3], [5]]}, "repeats id 3"),
    "half an id": ({"ids": [[3, 4.5], [5]]}, "a list of integers"),
    "a word": ({"ids": [["x", 4], [5]]}, "a list of integers"),
    "NaN": ({"log_probs": [[-1.0, float("nan")], [-0.5]]}, "row 0: entry 1 has log_prob NaN"),
    "mass": ({"log_probs": [[-0.1, -0.2], [-0.5]]}, "the probabilities sum to"),
    "rest": ({"log_rest": [0.5, -1.0]}, "log_rest is 0.5"),
    "negative token": ({"tokens": [1, -2]}, "token -2 is negative"),
    "flat": ({"ids": [3, 4]}, "does not hold lists"),
    "empty": ({"tokens": [], "ids": [], "log_probs": [], "log_rest": []}, "0 tokens"),
    "not an object": ([1], "is not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_wrong_rows_are_refused_and_nothing_is_left(tmp_path, name):
    change, message = BAD[name]
    row = {k: v for k, v in {**GOOD, **change}.items() if v is not ...} if isinstance(change, dict) else change
    first = {**GOOD, "key": "whole"}
    (tmp_path / "r.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "r.jsonl", tmp_path / "c", vocab_size=10)
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


def test_wrong_trainer_columns_are_refused(tmp_path):
    good = {
        "input_ids": [1, 2],
        "target_token_ids": [[0], [3]],
        "target_logprobs": [[None], [-0.5]],
        "target_mask": [[0], [1]],
    }
    for change, message in [
        ({"target_mask": [[0]]}, "1 lists of target_mask"),
        ({"target_mask": [[0], [1, 1]]}, "a mask of 2"),
        ({"target_token_ids": [[0], [3], [4]], "target_logprobs": [[None], [-0.5], [-1]],
          "target_mask": [[1]] * 3}, "3 lists of ids for 2 tokens"),
        ({"target_mask": [[1], [1]], "target_logprobs": [[-1.0], [-0.5]]}, "nothing comes before"),
        ({"target_token_ids": [[0], [3, 4]], "target_logprobs": [[None], [-0.1, -0.1]],
          "target_mask": [[0], [1, 1]]}, "sum to 1.8"),
        ({"target_logprobs": [[None], [-0.5, -1]]}, "1 ids and 2 log-prob"),
    ]:  # fmt: skip
        (tmp_path / "r.jsonl").write_text(json.dumps({**good, **change}) + "\n")
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "r.jsonl", tmp_path / "c", vocab_size=10, layout="axolotl")
        assert not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match="no column tokens.*--layout"):
        convert(tmp_path / "r.jsonl", tmp_path / "c", vocab_size=10)


def test_wrong_files_are_refused(tmp_path, fp32):
    for suffix in SUFFIXED.values():
        file = tmp_path / f"x{suffix}"
        for data in (b"", b"\0" * 40, b"\xff" * 4096):
            file.write_bytes(data)
            with pytest.raises(ValueError):
                convert(file, tmp_path / "c", vocab_size=10)
        file.unlink()
        convert(fp32, file)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises((ValueError, OSError)):
            convert(file, tmp_path / "c", vocab_size=90)
    assert not (tmp_path / "c").exists()


def test_bombs_and_lies_are_refused(tmp_path, fp32, monkeypatch):
    convert(fp32, tmp_path / "c.safetensors")
    data = (tmp_path / "c.safetensors").read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])

    def forged(change, length=None):
        text = json.dumps({**header, **change}).encode()
        (tmp_path / "f.safetensors").write_bytes((length or len(text)).to_bytes(8, "little") + text + data[8 + n :])
        with pytest.raises(ValueError) as error:
            list(tensors.stream(tensors.Tensors(tmp_path / "f.safetensors")))
        return str(error.value)

    assert "header of" in forged({}, length=2**62)
    assert "does not fit" in forged({"ids": {**header["ids"], "shape": [2**40, 5]}})
    assert "does not fit" in forged({"ids": {**header["ids"], "data_offsets": [0, 2**50]}})
    assert "does not fit" in forged({"ids": {**header["ids"], "shape": [-1, 5]}})
    assert "F64" in forged({"ids": {**header["ids"], "dtype": "F64"}})
    assert "sequence_starts" in forged({"sequence_starts": header["key_ends"]})
    archive = tmp_path / "b.tar"
    with tarfile.open(archive, "w") as tar:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as z, z.open("ids.npy", "w") as file:
            file.write(bytes(3 << 20))
        member = tarfile.TarInfo("0.npz")
        member.size = packed.tell()
        packed.seek(0)
        tar.addfile(member, packed)
    monkeypatch.setattr(archive_format, "LARGEST", 1 << 20)
    with pytest.raises(ValueError, match="unpacks to more"):
        convert(archive, tmp_path / "c", vocab_size=10)


def test_pickles_are_not_loaded(tmp_path):
    bad = io.BytesIO()
    np.savez(bad, tokens=np.array([{"x": 1}], dtype=object))
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        member = tarfile.TarInfo("0.npz")
        member.size = bad.tell()
        bad.seek(0)
        tar.addfile(member, bad)
    with pytest.raises(ValueError, match="numbers by rows"):
        convert(tmp_path / "p.tar", tmp_path / "c", vocab_size=10)


def test_the_command(tmp_path, fp32):
    run = CliRunner().invoke
    done = run(main, ["convert", str(fp32), str(tmp_path / "r.jsonl"), "--json"])
    assert done.exit_code == 0 and json.loads(done.output)["sequences"] == 4, done.output
    for arguments, message in [
        (["r.jsonl", "c"], "give --vocab-size"),
        (["r.jsonl", "c", "--vocab-size", "90", "--values", "1/7"], "Spec.values"),
        (["r.jsonl", "c", "--vocab-size", "90", "--k", "2"], "the spec accepts 1 to 2"),
        (["r.jsonl", "r.tar"], "one of the two must be a cache"),
        (["r.jsonl", "r.jsonl", "--to", "cache"], "exists; give another name"),
        ([str(fp32), "thing.xyz"], "--to takes one of"),
        ([str(fp32), "t.tar", "--layout", "trl"], "--layout trl"),
        ([str(fp32), "t.tar", "--teacher", "x"], "teacher is given"),
        ([str(fp32), "no/t.tar"], "is not a folder"),
    ]:
        paths = [str(tmp_path / a) if not a.startswith(("/", "-")) else a for a in arguments[:2]]
        done = run(main, ["convert", *paths, *arguments[2:]])
        assert done.exit_code == 1 and message in done.output and done.output.count("\n") == 1, done.output
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.fixture(scope="module")
def two(tmp_path_factory, dense_lab):
    """Two caches of one spec that share a sequence, and all their rows."""
    folder = tmp_path_factory.mktemp("two")
    a = dense_lab.write(folder / "a", {f"a{i}": 20 + i for i in range(6)}, flush=True)
    b = {"a0": a["a0"], **{f"b{i}": dense_lab.rows(9 + i, seed=50 + i) for i in range(5)}}
    with cache.Writer(folder / "b", dense_lab.spec()) as w:
        for key, r in b.items():
            w.add(key, r.tokens, r)
    return folder / "a", folder / "b"


def test_merge_copies_shards_and_checks_them(tmp_path, two, dense_lab):
    a, b = two
    done = CliRunner().invoke(main, ["merge", str(a), str(b), str(tmp_path / "m"), "--json"])
    assert json.loads(done.output) == {
        "shards": 7,
        "sequences": 11,
        "tokens": sum(cache.open(p).num_tokens for p in two) - 20,
        "repeated": 1,
    }
    merged = cache.open(tmp_path / "m")
    assert merged.keys() == [*cache.open(a).keys(), *cache.open(b).keys()[1:]] and merged.verify().ok
    assert {f.name for f in dense_lab.shard_files(tmp_path / "m")} == {
        f.name for p in two for f in dense_lab.shard_files(p)
    }
    same(columns(tmp_path / "m"), {**columns(a), **columns(b)})
    with cache.Writer(tmp_path / "m", merged.spec) as w:  # it can be gone on with
        r = dense_lab.rows(4, seed=99)
        assert w.add("new", r.tokens, r) and not w.add("a1", *_again(dense_lab, 1))


def _again(lab, i):
    r = lab.rows(20 + i, seed=i)
    return r.tokens, r


def test_merge_refuses(tmp_path, two, dense_lab):
    a, b = two
    other = tmp_path / "other"
    dense_lab.write(other, {"a0": 3})
    for sources, error, message in [
        ([a, other], ValueError, f"sequence \"a0\" is already in {a} with other content than in {other}"),
        ([a, GOLDEN / "cache_v1"], cache.CacheError, "has codec = 2"),
        ([a, tmp_path], cache.CacheError, "no cache here"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            merge_to(tmp_path / "m", *sources)
        assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m.*"))
    damaged = tmp_path / "damaged"
    shutil.copytree(b, damaged)
    (shard,) = dense_lab.shard_files(damaged)
    data = bytearray(shard.read_bytes())
    data[cache.inspect_cache(damaged)["shards"][0]["parts"]["header"] + 1200] ^= 4
    shard.write_bytes(data)
    with pytest.raises(cache.CacheError, match="block|tables"):
        merge_to(tmp_path / "m", a, damaged)
    assert not (tmp_path / "m").exists()


def merge_to(target, *sources):
    from potstill.cache.exchange.parts import merge

    return merge(sources, target)


@pytest.mark.parametrize("source", [*SOURCES, "two"])
def test_split_keeps_rows_exactly_and_goes_by_key(tmp_path, source, two):
    path = two[0] if source == "two" else GOLDEN / source
    done = CliRunner().invoke(
        main, ["split", str(path), str(tmp_path / "x"), str(tmp_path / "y"), "--weights", "3,2", "--json"]
    )
    parts = json.loads(done.output)
    assert sum(p["sequences"] for p in parts) == len(cache.open(path))
    x, y, want = columns(tmp_path / "x"), columns(tmp_path / "y"), columns(path)
    assert not x.keys() & y.keys()
    same({key: {**x, **y}[key] for key in want}, want)
    assert all(cache.verify_cache(tmp_path / p).ok for p in "xy")
    keys = tmp_path / "keys"
    keys.write_text("\n".join(list(want)[1::-1]))
    assert CliRunner().invoke(main, ["split", str(path), str(tmp_path / "first"), "--keys", str(keys)]).exit_code == 0
    assert cache.open(tmp_path / "first").keys() == list(want)[1::-1]


def test_split_refuses(tmp_path, two):
    run = CliRunner().invoke
    (tmp_path / "keys").write_text("nobody\n")
    a, x, y = str(two[0]), str(tmp_path / "x"), str(tmp_path / "y")
    for arguments, message in [
        ([x, y, "--keys", str(tmp_path / "keys")], 'no sequence "nobody"'),
        ([x, y, "--weights", "1"], "1 weights"),
        ([x, y, "--weights", "0,0"], "above 0"),
        ([x, x], "given twice"),
        ([x, str(tmp_path / "keys")], "exists"),
    ]:
        done = run(main, ["split", a, *arguments])
        assert done.exit_code == 1 and message in done.output and done.output.count("\n") == 1, done.output
    assert [p.name for p in tmp_path.iterdir()] == ["keys"]


def test_inspect_says_what_rows_look_like_and_how_true_they_are(tmp_path, dense_lab):
    spec = dense_lab.spec(values="1/16", k=8, vocab=500)
    with (
        cache.Writer(tmp_path / "grid", spec) as grid,
        cache.Writer(tmp_path / "true", replace(spec, values="fp32")) as true,
    ):
        for i in range(5):
            r = dense_lab.rows(60, seed=i, vocab=500)
            grid.add(f"{i}", r.tokens, r)
            true.add(f"{i}", r.tokens, r)
    run = CliRunner().invoke
    found = json.loads(
        run(main, ["inspect", str(tmp_path / "grid"), "--against", str(tmp_path / "true"), "--json"]).output
    )
    assert found["distributions"]["rows"] == 300 and found["distributions"]["entries"] == {
        "median": 8,
        "p90": 8,
        "p99": 8,
        "max": 8,
    }
    want = np.concatenate([np.exp(c["log_rest"]) for c in columns(tmp_path / "true").values()])
    assert found["distributions"]["mass_outside"]["median"] == pytest.approx(np.median(want), rel=0.03)
    assert 0 < found["fidelity"]["mean_kl"] < 3e-4 and 0 < found["fidelity"]["max_error"] <= 1 / 32 + 1e-5
    assert found["fidelity"]["missing_entries"] == 0 and found["fidelity"]["max_kl"] >= found["fidelity"]["mean_kl"]
    parts = found["shards"][0]["parts"]
    assert sum(parts.values()) == found["shards"][0]["bytes"] and min(parts.values()) > 0
    itself = json.loads(
        run(main, ["inspect", str(tmp_path / "true"), "--against", str(tmp_path / "true"), "--json"]).output
    )
    assert itself["fidelity"]["max_kl"] < 1e-12 and itself["fidelity"]["max_error"] == 0
    assert "mass outside" in run(main, ["inspect", str(tmp_path / "grid")]).output


def test_fidelity_is_the_kl_of_normalised_rows():
    from potstill.cache.statistics import row_kl

    p = np.log(np.array([[0.5, 0.3]]))
    q = np.log(np.array([[0.4, 0.45]]))
    kl, error, missing = row_kl(
        np.array([[7, 2]]), p, np.log([0.2]), np.array([[2, 7]]), q[:, ::-1] * 0 + np.log([[0.45, 0.4]]), np.log([0.15])
    )
    assert kl[0] == pytest.approx(0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.45) + 0.2 * math.log(0.2 / 0.15))
    assert error[0] == pytest.approx(math.log(0.45 / 0.3)) and missing[0] == 0
    kl, _, missing = row_kl(np.array([[7, 2]]), p, np.log([0.2]), np.array([[7, 3]]), q, np.log([0.15]))
    assert missing[0] == 1 and kl[0] == pytest.approx(0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6))


def test_verify_without_deep_reads_every_byte(tmp_path, dense_lab):
    spec = dense_lab.spec(values="fp32", k=2, vocab=10)
    rows = SimpleNamespace(
        ids=np.array([[1, 2]]),
        log_probs=np.log(np.array([[0.5, 0.25]], np.float32)),
        log_rest=np.log(np.array([0.25], np.float32)),
    )
    with cache.Writer(tmp_path / "c", spec) as w:
        w.add("x", [1], rows)
    run = CliRunner().invoke
    assert (
        run(main, ["verify", str(tmp_path / "c")]).exit_code
        == run(main, ["verify", str(tmp_path / "c"), "--deep"]).exit_code
        == 0
    )
    (shard,) = dense_lab.shard_files(tmp_path / "c")
    whole = shard.read_bytes()
    for at in range(0, len(whole), max(len(whole) // 64, 1)):
        data = bytearray(whole)
        data[at] ^= 16
        shard.write_bytes(data)
        assert not cache.verify_cache(tmp_path / "c", deep=False).ok, at
    shard.write_bytes(whole)


def test_a_card_is_yaml_and_facts(tmp_path, two):
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "c"
    shutil.copytree(two[0], path)
    (tmp_path / "text.md").write_text("Made for tests.")
    run = CliRunner().invoke
    arguments = ["card", str(path), "--license", "apache-2.0", "--language", "en,de"]
    arguments += ["--title", 'a: "b" # <c>', "--text", str(tmp_path / "text.md")]
    done = run(main, arguments)
    assert done.exit_code == 0, done.output
    text = (path / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    found = yaml.safe_load(header)
    assert (
        found["license"] == "apache-2.0"
        and found["language"] == ["en", "de"]
        and found["pretty_name"] == 'a: "b" # <c>'
    )
    assert found["size_categories"] == ["n<1K"] and "potstill" in found["tags"]
    assert "| teacher | a teacher |" in body and "| sequences, tokens | 6, 135 |" in body and "Made for tests." in body
    assert "at most 0.03125 nat" in body and "<c>" not in body
    again = run(main, arguments)
    assert again.exit_code == 1 and "--overwrite" in again.output
    assert run(main, [*arguments, "--overwrite"]).exit_code == 0 and cache.open(path).verify().ok
