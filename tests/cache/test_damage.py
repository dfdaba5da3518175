"""Pitfall 23: nothing that happens to the bytes goes unnoticed, and nothing crashes."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
from potstill import cache


@pytest.fixture
def small(tmp_path, lab):
    """A cache of one shard of about 4 KiB: three sequences, one of them ragged."""
    given = {f"s{i}": lab.rows(n, k=4, vocab=600, seed=i, ragged=i == 1) for i, n in enumerate((60, 40, 90))}
    with cache.Writer(tmp_path / "c", lab.spec(k=4, vocab=600)) as w:
        for key, r in given.items():
            w.add(key, r.tokens, r)
    (shard,) = lab.shard_files(tmp_path / "c")
    return tmp_path / "c", shard, given


def layout(data: bytes) -> list[tuple[int, str]]:
    """(end, part) of each part of a shard, from the footer's own table."""
    (header_len,) = struct.unpack_from("<I", data, 12)
    (footer_len,) = struct.unpack_from("<Q", data, len(data) - 32)
    footer = data[-32 - footer_len :]
    tables = struct.unpack_from("<I", data, 88)[0] if data[32] else 0
    parts, end = [(header_len, "header"), (header_len + tables, "tables")], header_len + tables
    for i in range(struct.unpack_from("<I", footer, 8)[0]):
        end += struct.unpack_from("<I", footer, 32 + 24 * i + 8)[0]
        parts.append((end, f"block {i}"))
    return [*parts, (end + tables, "tables"), (len(data) - 32, "footer"), (len(data), "trailer")]


def same(path, given, lab) -> bool:
    """True when all reads back as written, False for an error; different data fails the test."""
    try:
        store = cache.open(path)
        for key, r in given.items():
            lab.same(store.numpy(key), r, key)
    except cache.CacheError:
        return False
    return True


def test_pitfall_23_every_byte_flip_is_found_and_named(small, lab):
    path, shard, given = small
    data = bytearray(shard.read_bytes())
    assert 3000 < len(data) < 5000
    part_of = layout(bytes(data))
    for at in range(len(data)):
        data[at] ^= 1 << (at % 8)
        shard.write_bytes(data)
        data[at] ^= 1 << (at % 8)
        part = next(name for end, name in part_of if at < end)
        report = cache.verify_cache(path)
        assert not report.ok, f"byte {at} ({part})"
        assert report.problems[0].file == shard.name and report.problems[0].part == part, (
            f"byte {at}: {report.problems}"
        )
        # the second copy of the tables is there for recovery: a reader need not look at it
        second = next(end for end, name in part_of if name == "tables") < at and part == "tables"
        assert second or not same(path, given, lab)
    shard.write_bytes(data)
    assert cache.verify_cache(path).ok and same(path, given, lab)


def test_pitfall_23_every_bit_of_some_bytes(small):
    path, shard, _ = small
    data = bytearray(shard.read_bytes())
    for at in [*range(16), *range(80, 140), *range(len(data) - 48, len(data))]:
        for bit in range(8):
            data[at] ^= 1 << bit
            shard.write_bytes(data)
            data[at] ^= 1 << bit
            assert not cache.verify_cache(path).ok, (at, bit)


def test_pitfall_23_every_truncation_is_found(small):
    path, shard, given = small
    data = shard.read_bytes()
    for length in range(len(data)):
        shard.write_bytes(data[:length])
        report = cache.verify_cache(path)
        assert not report.ok and report.problems[0].file == shard.name, length
        with pytest.raises(cache.CacheError, match=shard.name):
            cache.open(path)
    shard.unlink()
    assert not cache.verify_cache(path).ok
    with pytest.raises(OSError):
        cache.open(path)


def test_pitfall_28_trailing_bytes(small):
    path, shard, _ = small
    data = shard.read_bytes()
    for tail in [b"\0", b"\0" * 8, data[-32:], data]:
        shard.write_bytes(data + tail)
        assert not cache.verify_cache(path).ok, len(tail)
        with pytest.raises(cache.CacheError):
            cache.open(path)


def test_pitfall_29_truncated_while_open(small):
    """A file cut short under an open reader is an error naming the block, not a signal."""
    path, shard, _ = small
    store = cache.open(path)
    store.tokens("s0")
    with shard.open("r+b") as f:
        f.truncate(200)
    with pytest.raises(cache.CacheError, match="block"):
        store.numpy("s2")


@pytest.mark.parametrize("name", ["manifest.json", "log/0000000000.json", "log/0000000001.json"])
def test_pitfall_23_flips_in_manifest_and_log(small, name, lab):
    path, _, given = small
    data = bytearray((path / name).read_bytes())
    for at in range(len(data)):
        data[at] ^= 1
        (path / name).write_bytes(data)
        data[at] ^= 1
        report = cache.verify_cache(path)
        assert not report.ok and report.problems[0].file == name.split("/")[-1], f"byte {at}: {report.problems}"
    (path / name).write_bytes(data)
    assert cache.verify_cache(path).ok and same(path, given, lab)


def test_a_missing_record_is_named(small, lab):
    path, _, _ = small
    r = lab.rows(3, k=4, vocab=600, seed=8)
    with cache.Writer(path, lab.spec(k=4, vocab=600)) as w:
        w.add("more", r.tokens, r)
    (path / "manifest.json").unlink()
    (path / "log" / "0000000001.json").unlink()
    with pytest.raises(cache.CacheError, match="record 1 is missing"):
        cache.open(path)
    assert not cache.verify_cache(path).ok
    cache.recover_cache(path)
    assert cache.verify_cache(path).ok and sorted(cache.open(path).keys()) == ["more", "s0", "s1", "s2"]


def test_the_manifest_can_be_rebuilt(small, lab):
    path, _, given = small
    (path / "manifest.json").unlink()
    assert same(path, given, lab) and cache.verify_cache(path).ok
    (path / "manifest.json").write_text("{}")
    with pytest.raises(cache.CacheError, match="manifest"):
        cache.open(path)
    assert json.loads(json.dumps(cache.recover_cache(path)))["lost"]
    assert same(path, given, lab) and cache.verify_cache(path).ok


def test_pitfall_23_a_flip_in_a_later_block_leaves_the_first_readable(tmp_path, lab):
    given = lab.write(tmp_path / "c", {"long": 9000}, vocab=60)
    (shard,) = lab.shard_files(tmp_path / "c")
    data = bytearray(shard.read_bytes())
    data[next(end for end, name in layout(bytes(data)) if name == "block 1") - 500] ^= 4
    shard.write_bytes(data)
    store = cache.open(tmp_path / "c")
    with pytest.raises(cache.CacheError, match=f"{shard.name}, block 1: the checksum differs"):
        store.numpy("long")
    assert [(p.file, p.part) for p in store.verify().problems] == [(shard.name, "block 1")]
    pytest.importorskip("torch")
    top = store.batch(["long"], tokens=[given["long"].tokens[:8192]])
    lab.same_ids(top.ids[0], top.log_probs[0], given["long"].ids[:8192])


def test_recover_salvages_whole_sequences(small, lab):
    """One damaged block costs its sequence; the others come back, and the damaged file is put aside."""
    path, shard, given = small
    part_of = layout(shard.read_bytes())
    original = shard.read_bytes()
    for part, lost in [("block 1", {"s1"}), ("header", set()), ("footer", set()), ("trailer", set())]:
        copy = path.with_name(f"copy-{part.replace(' ', '')}")
        shutil.copytree(path, copy)
        end = next(end for end, name in part_of if name == part)
        data = bytearray(original)
        data[end - 20] ^= 0xFF
        (copy / "shards" / shard.name).write_bytes(data)
        found = cache.recover_cache(copy)
        assert found["lost"] and found["sequences"] == 3 - len(lost), found
        store = cache.open(copy)
        assert set(store.keys()) == set(given) - lost and store.verify().ok
        lab.check(store, {k: r for k, r in given.items() if k not in lost})
        assert list((copy / "damaged").iterdir())


def test_recover_leaves_a_whole_cache_alone(small, lab):
    path, shard, given = small
    found = cache.recover_cache(path)
    assert found["files"] == 0 and found["lost"] == [] and shard.exists() and same(path, given, lab)


def test_recover_touches_no_other_folder(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(cache.CacheError, match="no cache here"):
        cache.recover_cache(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]
    report = cache.verify_cache(tmp_path)
    assert not report.ok and "no cache here" in str(report.problems[0])
