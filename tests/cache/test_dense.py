"""The dense codec: every kind of values and every column, against an independent reader; tables, damage, forgeries."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from potstill import cache

GRIDS = ("1/8", "1/16", "1/32", "1/64")


@pytest.fixture(scope="module")
def lab(dense_lab):
    return dense_lab


def bf16(x: np.ndarray) -> np.ndarray:
    return (np.asarray(x, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def teacher(lab, length: int, values: str, *, sampled=False, seed=0, **sizes) -> SimpleNamespace:
    """Rows with every column that a spec may ask for."""
    r = lab.rows(length, seed=seed, **sizes)
    rng = np.random.default_rng(seed)
    r.lse = rng.normal(20, 3, length).astype(np.float32)
    if values == "bf16_logits":
        with np.errstate(invalid="ignore"):
            r.log_probs = np.where(r.ids >= 0, bf16(r.log_probs + r.lse[:, None]) - r.lse[:, None], -np.inf)
        r.log_probs = np.minimum(r.log_probs, 0).astype(np.float32)
        r.log_probs[r.log_probs == 0] = -np.inf  # a rounding above 1 is no row of a teacher
        r.ids[np.isneginf(r.log_probs)] = -1
        keep = np.argsort(-r.log_probs, -1, kind="stable")
        r.ids, r.log_probs = np.take_along_axis(r.ids, keep, -1), np.take_along_axis(r.log_probs, keep, -1)
        r.log_rest = np.full(length, -9, np.float32)
        r.log_rest[np.exp(r.log_probs).sum(-1) > 1] = -np.inf
    r.counts = np.where(r.ids >= 0, rng.integers(1, 300, r.ids.shape), 0)
    r.log_rest_at = {0.5: r.log_rest * 2, 2.0: r.log_rest / 2}
    r.token_log_probs = -rng.random(length).astype(np.float32) * 9
    return r


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*GRIDS, "bf16_logits", "fp16", "fp32"]),
    st.integers(1, 30),
    st.integers(1, 9),
    st.integers(12, 300),
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from([1, 2]),
    st.integers(0, 2**32 - 1),
)
def test_every_column_in_both_readers(tmp_path_factory, lab, independent, values, length, k, vocab, flags, codec, seed):
    ragged, sampled, warm, token = flags
    path = tmp_path_factory.mktemp("p") / "c"
    r = teacher(lab, length, values, seed=seed, k=k, vocab=vocab, ragged=ragged)
    spec = lab.spec(
        k=k,
        vocab=vocab,
        values=values,
        codec=codec,
        sampled=sampled,
        temperatures=(1.0, 0.5, 2.0) if warm else (1.0,),
        token_log_probs=token,
    )
    with np.errstate(over="ignore"), contextlib.ExitStack() as stack:
        mass = np.exp(r.log_probs.astype(float)).sum(-1) + np.exp(r.log_rest)
        w = stack.enter_context(cache.Writer(path, spec))
        if mass.max() > 1.0009:
            return
        w.add("x", r.tokens, r)
    store = cache.open(path)
    assert store.spec == spec and store.verify().ok
    tokens, buffers = store._decode("x")
    theirs = dict(
        zip(
            ("tokens", "ids", "log_probs", "log_rest", "extra", "lse", "counts"),
            independent.cache(path, columns=True)["x"],
            strict=True,
        )
    )
    np.testing.assert_array_equal(tokens, r.tokens)
    np.testing.assert_array_equal(tokens, theirs["tokens"])
    for name, ours in vars(buffers).items():
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs[name].ravel(), err_msg=name)
    ids, log_probs = buffers.ids.reshape(-1, k), buffers.log_probs.reshape(-1, k)
    lab.same_ids(ids, log_probs, r.ids)
    bound = {"fp16": 1e-2, "fp32": 0, "bf16_logits": 0}.get(values, 0.5 * eval(values) + 2e-5 if "/" in values else 0)
    np.testing.assert_allclose(log_probs, r.log_probs, rtol=0, atol=bound)
    extra = buffers.extra.reshape(length, -1) if buffers.extra is not None else np.empty((length, 0))
    given_extra = [r.log_rest_at[0.5], r.log_rest_at[2.0]] if warm else []
    given_extra += [r.token_log_probs] if token else []
    assert extra.shape[1] == len(given_extra)
    for column, want in zip(extra.T, given_extra, strict=True):
        np.testing.assert_allclose(column, want, rtol=0, atol=bound if "/" in values else 0)
    if sampled:
        by_id = [dict(zip(i, c, strict=True)) for i, c in zip(ids, buffers.counts.reshape(-1, k), strict=True)]
        for row, i, c in zip(by_id, r.ids, r.counts, strict=True):
            assert all(row[x] == n for x, n in zip(i, c, strict=True))


def test_further_columns_as_tensors(tmp_path, lab):
    pytest.importorskip("torch")
    r = teacher(lab, 9, "1/16")
    spec = lab.spec(temperatures=(2.0, 0.5), sampled=True, token_log_probs=True)
    assert spec.temperatures == (0.5, 1.0, 2.0)
    with cache.Writer(tmp_path / "c", spec) as w:
        w.add("x", r.tokens, r)
        w.add("y", r.tokens[:4], SimpleNamespace(**{
            name: {t: v[:4] for t, v in value.items()} if isinstance(value, dict) else value[:4]
            for name, value in vars(r).items()
        }))  # fmt: skip
    store = cache.open(tmp_path / "c")
    top = store["x"].topk
    assert sorted(top.log_rest_at) == [0.5, 2.0] and top.lse is None
    np.testing.assert_allclose(top.log_rest_at[2.0], r.log_rest_at[2.0], atol=1 / 32 + 1e-6)
    np.testing.assert_allclose(top.token_log_probs, r.token_log_probs, atol=1 / 32 + 1e-6)
    assert int(top.counts.sum()) == int(r.counts.sum())
    batch = store.batch(["y", "x"])
    assert tuple(batch.log_rest_at[0.5].shape) == (2, 9) and (batch.counts[0, 4:] == 0).all()
    assert (batch.log_rest_at[2.0][0, 4:] == 0).all() and (batch.token_log_probs[0, 4:] == 0).all()


def test_what_the_spec_asks_for_is_needed(tmp_path, lab):
    r = teacher(lab, 5, "1/16")
    for asked, missing, message in [
        ({"temperatures": (2.0,)}, "log_rest_at", r"log_rest_at\[2.0\] is missing"),
        ({"sampled": True}, "counts", "topk.counts is missing"),
        ({"token_log_probs": True}, "token_log_probs", "topk.token_log_probs is missing"),
        ({"values": "bf16_logits"}, "lse", "topk.lse is missing"),
    ]:
        with cache.Writer(tmp_path / missing, lab.spec(**asked)) as w:
            top = SimpleNamespace(**{name: value for name, value in vars(r).items() if name != missing})
            with pytest.raises(ValueError, match=message):
                w.add("x", r.tokens, top)
    with cache.Writer(tmp_path / "exact", lab.spec(values="bf16_logits")) as w:
        with pytest.raises(ValueError, match="row 0: entry 0: log_prob .* is no bf16 logit"):
            w.add("x", r.tokens, r)
    with cache.Writer(tmp_path / "drawn", lab.spec(sampled=True)) as w:
        for bad, message in [(0, "drawn 0 times"), (70_000, "drawn 70000 times")]:
            counts = r.counts.copy()
            counts[2, 1] = bad
            with pytest.raises(ValueError, match=f"row 2: an entry was {message}"):
                w.add("x", r.tokens, SimpleNamespace(**{**vars(r), "counts": counts}))
    for wrong, error in [
        ({"values": "1/3"}, ValueError),
        ({"values": 16}, TypeError),
        ({"temperatures": (0.0,)}, ValueError),
        ({"temperatures": "warm"}, TypeError),
        ({"sampled": 1}, TypeError),
        ({"values": "plain", "sampled": True}, ValueError),
        ({"vocab": 1 << 23}, ValueError),
        ({"codec": 3}, ValueError),
    ]:
        with pytest.raises(error, match="Spec"):
            lab.spec(**wrong)


def zipf(lab, length: int, seed: int, k: int = 8, vocab: int = 3000) -> SimpleNamespace:
    """Rows over ids of very different frequency, whose frequent ids are large."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, vocab + 1)
    logits = np.log(p[::-1])[None] + rng.gumbel(size=(length, vocab))
    lp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-lp, -1)[:, :k].astype(np.int32)
    top = np.take_along_axis(lp, ids, -1).astype(np.float32)
    rest = np.log(np.maximum(1 - np.exp(top.astype(float)).sum(-1), 1e-9)).astype(np.float32)
    return SimpleNamespace(tokens=ids[:, 0].copy(), ids=ids, log_probs=top, log_rest=rest)


@pytest.mark.parametrize("values", ["1/8", "1/16", "1/64"])
def test_rows_are_shifted_to_where_the_grid_fits_them(tmp_path, lab, values):
    """KL(p || q) of peaked rows is a fraction of what the unmoved grid gives, and the bound on each entry holds."""
    r = lab.rows(800, k=32, vocab=600, seed=3)
    divergence = {}
    for codec in (1, 2):
        with cache.Writer(tmp_path / str(codec), lab.spec(k=32, vocab=600, values=values, codec=codec)) as w:
            w.add("x", r.tokens, r)
        store = cache.open(tmp_path / str(codec))
        assert store.spec.codec == codec and store.verify().ok
        _, ids, log_probs, log_rest = store.numpy("x")
        order, given = np.argsort(ids, -1), np.argsort(r.ids, -1)
        p = np.append(np.take_along_axis(r.log_probs, given, -1), r.log_rest[:, None], 1).astype(float)
        q = np.append(np.take_along_axis(log_probs, order, -1), log_rest[:, None], 1).astype(float)
        divergence[codec] = (
            (np.exp(p) * (np.expm1(q - p) - (q - p))).sum(-1).mean()
        )  # 0 where q is p, whatever their mass
        assert np.abs(q - p)[:, :-1].max() <= 0.5 * eval(values) + 1e-5
        assert np.abs(q - p)[:, -1].max() <= 0.5 * eval(values) / (4 if codec == 2 else 1) + 1e-5
    assert divergence[2] < 0.5 * divergence[1] and divergence[2] < 0.02 * eval(values) ** 2


def header(path) -> dict:
    data = path.read_bytes()
    length, _, check, trained = struct.unpack_from("<IIQQ", data, 88)
    return {"length": length, "check": check, "trained": trained, "start": struct.unpack_from("<I", data, 12)[0]}


def test_tables_are_learnt_and_taken_over(tmp_path, lab, independent):
    given = {f"s{i}": zipf(lab, 300, i) for i in range(8)}
    path = tmp_path / "c"
    with cache.Writer(path, lab.spec(vocab=3000)) as w:
        for key in list(given)[:5]:
            w.add(key, given[key].tokens, given[key])
    (first,) = lab.shard_files(path)
    assert header(first)["trained"] == 5 * 300 * 8 and header(first)["length"] > 500
    with cache.Writer(path, lab.spec(vocab=3000)) as w:  # fewer rows than the tables are made from: they are kept
        for key in list(given)[5:]:
            w.add(key, given[key].tokens, given[key])
    (second,) = set(lab.shard_files(path)) - {first}
    assert header(second)["check"] == header(first)["check"]
    store = cache.open(path)
    lab.check(store, given)
    assert store.verify().ok
    for key, columns in independent.cache(path).items():
        for ours, theirs in zip(store.numpy(key), columns, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    # the same rows under tables that know nothing are larger, and are known to be the same
    with cache.Writer(tmp_path / "small", lab.spec(vocab=3000)) as w:
        for key, r in given.items():
            w.add(key, r.tokens, r)
            w.flush()
    assert cache.open(tmp_path / "small").num_bytes > store.num_bytes
    with cache.Writer(path, lab.spec(vocab=3000)) as w:
        assert all(w.add(key, r.tokens, r) is False for key, r in given.items())


@pytest.mark.parametrize("part", ["header", "tables", "copy", "header and tables", "both copies"])
def test_recover_needs_one_copy_of_the_tables(tmp_path, lab, part):
    given = {f"s{i}": zipf(lab, 300, i) for i in range(3)}
    path = tmp_path / "c"
    with cache.Writer(path, lab.spec(vocab=3000)) as w:
        for key, r in given.items():
            w.add(key, r.tokens, r)
    (shard,) = lab.shard_files(path)
    data, at = bytearray(shard.read_bytes()), header(shard)
    (footer,) = struct.unpack_from("<Q", data, len(data) - 32)
    copy = len(data) - 32 - footer - at["length"]
    assert data[copy : copy + 4] == data[at["start"] : at["start"] + 4] == b"PSTB"
    if "header" in part:
        data[60] ^= 1
    if "tables" in part or "both" in part:
        data[at["start"] + 300] ^= 1
    if "cop" in part:
        data[copy + 300] ^= 1
    shard.write_bytes(data)
    problem = cache.verify_cache(path).problems[0]
    assert problem.part == ("header" if "header" in part else "tables")
    found = cache.recover_cache(path)
    assert cache.verify_cache(path).ok
    if part == "both copies":
        assert found["sequences"] == 0 and any("tables" in line for line in found["lost"])
        return
    assert found["sequences"] == 3
    lab.check(cache.open(path), given)


def test_pitfall_23_every_bit_and_every_truncation_of_a_small_shard(tmp_path, lab):
    path = tmp_path / "c"
    with cache.Writer(path, lab.spec(k=4, vocab=600)) as w:
        for i, n in enumerate((60, 40, 90)):
            r = lab.rows(n, k=4, vocab=600, seed=i, ragged=i == 1)
            w.add(f"s{i}", r.tokens, r)
    (shard,) = lab.shard_files(path)
    data = bytearray(shard.read_bytes())
    assert 2500 < len(data) < 4200
    unnoticed = []
    with shard.open("r+b", buffering=0) as f:
        for bit in range(8 * len(data)):
            f.seek(bit // 8)
            f.write(bytes([data[bit // 8] ^ 1 << bit % 8]))
            if cache.verify_cache(path).ok:
                unnoticed.append(bit)
            f.seek(bit // 8)
            f.write(data[bit // 8 : bit // 8 + 1])
        assert unnoticed == [] and cache.verify_cache(path).ok
        for length in range(len(data) - 1, -1, -1):
            f.truncate(length)
            assert not cache.verify_cache(path).ok, length


def forge(path, lab, change) -> None:
    """Applies a change to a shard of one block, then makes every checksum, the name and the manifest right."""
    xxhash = pytest.importorskip("xxhash")

    def xxh3(b: bytes) -> bytes:
        return struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(b)))

    (shard,) = lab.shard_files(path)
    data, at = bytearray(shard.read_bytes()), header(shard)
    start, size = at["start"], at["length"]
    (footer,) = struct.unpack_from("<Q", data, len(data) - 32)
    foot, copy = len(data) - 32 - footer, len(data) - 32 - footer - size
    change(data, start, start + size, foot)
    data[start + size - 8 : start + size] = xxh3(data[start : start + size - 8])
    data[copy : copy + size] = data[start : start + size]
    data[96:104] = data[start + size - 8 : start + size]
    data[start - 8 : start] = xxh3(data[: start - 8])
    data[copy - 8 : copy] = xxh3(data[start + size : copy - 8])
    data[foot + 32 : foot + 40] = data[copy - 8 : copy]
    data[-40:-32] = xxh3(data[foot:-40])
    data[-16:-8] = xxh3(data[-32:-16])
    name = hashlib.sha256(bytes(data[:start] + data[foot:-32])).hexdigest()[:32]
    shard.unlink()
    shard.with_name(f"{name}.shard").write_bytes(data)
    body = json.loads((path / "manifest.json").read_text())["body"]
    body["shards"][0]["name"] = name
    head = json.dumps({"potstill": "manifest", "version": [1, 0], "required": [], "body": body}, separators=(",", ":"))
    head = head[:-1]
    (path / "manifest.json").write_text(f'{head},"xxh3":"{xxhash.xxh3_64_intdigest(head.encode()):016x}"}}\n')


def set_bytes(data, first, end, changes) -> None:
    """Sets bytes of data[first:end]; changes: (place in [0, 1), byte)."""
    for place, value in changes:
        data[first + int(place * (end - first))] = value


def forge_bytes(path, lab, changes, tables) -> None:
    """Sets bytes of the shard's tables, or of its one payload, and forges what vouches for them."""

    def change(data, start, block, foot):
        first, end = (start + 8, block) if tables else (block + 40, foot - (block - start) - 8)
        set_bytes(data, first, end, changes)

    forge(path, lab, change)


def put(fmt, part, offset, value):
    def change(data, tables, block, foot):
        struct.pack_into(fmt, data, {"header": 0, "tables": tables, "block": block}[part] + offset, value)

    return change


# the payload of "a" stands at 40 in its block: ragged u8, zero x 3, three lengths
ATTACKS = {
    "no change": (lambda *_: None, None),
    "other values": (put("<B", "header", 80, 2), "codec is not the one|values of kind"),
    "values of no kind": (put("<B", "header", 80, 9), "values of kind 9"),
    "steps of no grid": (put("<H", "header", 82, 3), "3 steps a nat"),
    "layout padding": (put("<H", "header", 86, 1), "padding"),
    "tables of 4 GB": (put("<I", "header", 88, 2**32 - 8), "at most"),
    "no tables flag": (put("<Q", "header", 16, 0), "required flags"),
    "an unknown flag": (put("<Q", "header", 16, 5), "required flag bit 2"),
    "columns of no spec": (put("<Q", "header", 16, 3), "further columns are not those"),
    "tables of another k": (put("<I", "tables", 12, 7), "k = 7"),
    "wide class": (put("<B", "tables", 32, 29), "29 bits"),
    "classes too small": (put("<16s", "tables", 32, bytes(16)), "are needed"),
    "prefix code": (put("<B", "tables", 144, 9), "whole code"),
    "segments": (put("<I", "tables", 272, 2**31), "segments"),
    "ragged": (put("<B", "block", 40, 2), "ragged 2"),
    "payload padding": (put("<B", "block", 41, 1), "padding"),
    "long nibbles": (put("<I", "block", 44, 2**32 - 1), "bytes wanted"),
    "shorter nibbles": (put("<I", "block", 44, 3), "stream|not zero|bytes|outside|token|code"),
    "other magic": (put("<B", "block", 0, 0), "magic"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_pitfall_28_forged_parts_are_refused(tmp_path, lab, name):
    path = tmp_path / "c"
    given = lab.write(path, {"a": 5})
    change, message = ATTACKS[name]
    forge(path, lab, change)
    if message is None:
        lab.check(cache.open(path), given)
        assert cache.verify_cache(path).ok
        return
    with pytest.raises(cache.CacheError, match=message):
        cache.open(path).numpy("a")
    assert not cache.verify_cache(path).ok


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    st.sampled_from(["1/16", "bf16_logits", "fp32"]),
    st.booleans(),
)
def test_pitfall_28_forged_bytes_are_errors_or_rows_within_bounds(tmp_path_factory, lab, changes, values, tables):
    path = tmp_path_factory.mktemp("forged") / "c"
    r = teacher(lab, 5, values, k=3, vocab=40, ragged=True)
    with cache.Writer(path, lab.spec(k=3, vocab=40, values=values, sampled=True)) as w:
        w.add("a", r.tokens, r)

    forge_bytes(path, lab, changes, tables)
    with contextlib.suppress(cache.CacheError):
        store = cache.open(path)
        tokens, ids, log_probs, log_rest = store.numpy("a")
        assert tokens.min() >= 0 and ids.max() < 40 and ids.min() >= -1
        assert not np.isnan(log_probs).any() and not np.isnan(log_rest).any() and log_rest.max() <= 0
    cache.verify_cache(path)
    with contextlib.suppress(cache.CacheError, OSError):
        cache.recover_cache(path)


def test_pitfall_28_large_vocabularies_stay_within_512_mib(tmp_path, lab):
    """The largest vocabulary that the codec takes is read, written and verified under a limit on the address space."""
    code = f"""
import resource
from types import SimpleNamespace
import numpy as np
from potstill import cache
resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))
top = SimpleNamespace(ids=np.array([[2**22 - 1, 5]]), log_probs=np.array([[-1.0, -2.0]]), log_rest=np.array([-3.0]))
with cache.Writer({str(tmp_path / "c")!r}, cache.Spec(vocab_size=2**22, k=2)) as w:
    w.add("x", [1], top)
store = cache.open({str(tmp_path / "c")!r})
assert store.numpy("x")[1].tolist() == [[2**22 - 1, 5]] and store.verify().ok
print("fine")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.stdout == "fine\n", done.stderr


def test_the_tables_travel_with_a_copied_shard(tmp_path, lab):
    """A shard says all that is needed to read it: nothing of it is kept elsewhere in the folder."""
    given = {f"s{i}": zipf(lab, 300, i) for i in range(3)}
    with cache.Writer(tmp_path / "c", lab.spec(vocab=3000)) as w:
        for key, r in given.items():
            w.add(key, r.tokens, r)
    with cache.Writer(tmp_path / "d", lab.spec(vocab=3000)):
        pass
    shutil.copy(lab.shard_files(tmp_path / "c")[0], tmp_path / "d" / "shards")
    with cache.Writer(tmp_path / "d", lab.spec(vocab=3000)) as w:
        assert w.committed == 3
    lab.check(cache.open(tmp_path / "d"), given)
