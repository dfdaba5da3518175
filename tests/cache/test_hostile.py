"""Pitfall 28: a stranger's cache cannot leave its folder, exhaust memory, run code or crash the process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from potstill import cache

xxhash = pytest.importorskip("xxhash", reason="forging checksums needs the xxhash package")


@pytest.fixture(scope="module")
def lab(plain_lab):
    return plain_lab  # the offsets below are those of codec 0


def xxh3(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


def seal(kind: str, body: object, version=(1, 0), required=()) -> str:
    head = json.dumps(
        {"potstill": kind, "version": list(version), "required": list(required), "body": body},
        separators=(",", ":"),
    )[:-1]
    return f'{head},"xxh3":"{xxh3(head.encode()):016x}"}}\n'


@pytest.fixture
def forged(tmp_path, lab):
    """A good cache, its manifest's body, and a function that writes a forged manifest, checksum right."""
    lab.write(tmp_path / "c", {"a": 5})
    path = tmp_path / "c"
    body = json.loads((path / "manifest.json").read_text())["body"]
    return path, body, lambda b, **how: (path / "manifest.json").write_text(seal("manifest", b, **how))


def refused(path, match):
    with pytest.raises(cache.CacheError, match=match):
        cache.open(path)
    report = cache.verify_cache(path)
    assert not report.ok


def test_the_forgery_is_good(forged):
    path, body, write = forged
    write(body)
    assert cache.verify_cache(path).ok


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "/etc/passwd", "..", "", "A" * 32, "a" * 31 + "/", "a" * 33, "a\0" * 16]
)
def test_pitfall_28_names_that_leave_the_folder(forged, name):
    path, body, write = forged
    body["shards"][0]["name"] = name
    write(body)
    refused(path, "32 lower-case hexadecimal digits")
    body["shards"] = []
    body["dropped"] = [name]
    write(body)
    refused(path, "32 lower-case hexadecimal digits")


def test_pitfall_28_duplicate_names(forged):
    path, body, write = forged
    body["shards"] *= 2
    write(body)
    refused(path, "listed twice")


def test_pitfall_28_newer_version_and_unknown_features_are_named(forged, lab):
    path, body, write = forged
    write(body, version=(2, 0))
    refused(path, "manifest.json: format major version 2")
    write(body, required=["zipped"])
    refused(path, 'required feature "zipped"')
    write({**body, "surprise": 1})  # members that matter are named in `required`
    assert cache.open(path).keys() == ["a"]
    write({**body, "shards": "none"})
    refused(path, "manifest")
    write(body, version=(1, 7))
    assert cache.open(path).keys() == ["a"]
    with pytest.raises(cache.CacheError, match="version 3"):
        (path / "log" / "0000000002.json").write_text(seal("log", {"kind": "new"}, version=(3, 1)))
        cache.Writer(path, lab.spec())


@pytest.mark.parametrize("what", ["bytes", "sequences", "tokens"])
def test_pitfall_28_false_sizes(forged, what):
    path, body, write = forged
    body["shards"][0][what] = 2**60
    write(body)
    refused(path, "log says")


def test_pitfall_28_symlinks(forged, tmp_path, lab):
    path, _, _ = forged
    (shard,) = lab.shard_files(path)
    outside = tmp_path / "outside"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(OSError, match="symbolic link"):
        cache.open(path)
    assert not cache.verify_cache(path).ok
    shard.unlink()
    os.mkfifo(shard)  # must not block
    with pytest.raises(OSError, match="regular file"):
        cache.open(path)
    shard.unlink()
    outside.rename(shard)
    (path / "shards").rename(tmp_path / "elsewhere")
    (path / "shards").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(cache.CacheError, match="symbolic link"):
        cache.open(path)
    with pytest.raises(cache.CacheError, match="symbolic link"):
        cache.Writer(path, lab.spec())


def reforge(path, lab, change, blocks: int = 1) -> None:
    """Applies a change to the only shard, then makes every checksum, the name and the manifest right."""
    (shard,) = lab.shard_files(path)
    data = bytearray(shard.read_bytes())
    (header_len,) = struct.unpack_from("<I", data, 12)
    (footer_len,) = struct.unpack_from("<Q", data, len(data) - 32)
    foot = len(data) - 32 - footer_len
    lengths = [struct.unpack_from("<I", data, foot + 40 + 24 * i)[0] for i in range(blocks)]
    change(data, header_len, foot)
    struct.pack_into("<Q", data, header_len - 8, xxh3(bytes(data[: header_len - 8])))
    start = header_len
    for i, length in enumerate(lengths):
        end = start + length
        struct.pack_into("<Q", data, end - 8, xxh3(bytes(data[start : end - 8])))
        data[foot + 32 + 24 * i : foot + 40 + 24 * i] = data[end - 8 : end]
        start = end
    struct.pack_into("<Q", data, len(data) - 40, xxh3(bytes(data[foot : len(data) - 40])))
    struct.pack_into("<Q", data, len(data) - 16, xxh3(bytes(data[-32:-16])))
    name = hashlib.sha256(bytes(data[:header_len] + data[foot:-32])).hexdigest()[:32]
    shard.unlink()
    shard.with_name(f"{name}.shard").write_bytes(data)
    body = json.loads((path / "manifest.json").read_text())["body"]
    body["shards"][0]["name"] = name
    (path / "manifest.json").write_text(seal("manifest", body))


def put(fmt, where, value):
    """where: ("header" | "block" | "payload" | "footer", offset)."""

    def change(data, header_len, foot):
        start = {"header": 0, "block": header_len, "payload": header_len + 40, "footer": foot}[where[0]]
        struct.pack_into(fmt, data, start + where[1], value)

    return change


SHARD_ATTACKS = {
    "newer major": (put("<H", ("header", 8), 2), "format major version 2"),
    "required flag": (put("<Q", ("header", 16), 1 << 5), "required flag bit 5"),
    "unknown codec": (put("<H", ("header", 32), 9), "codec 9"),
    "header padding": (put("<B", ("header", 83), 1), "padding"),
    "other vocabulary": (put("<I", ("header", 36), 1 << 30), "codec parameters"),
    "k of zero": (put("<I", ("header", 40), 0), "no entries with codec 0"),
    "other spec": (put("<B", ("header", 50), 77), "another spec"),
    "4 billion blocks": (put("<I", ("footer", 8), 2**32 - 1), "do not fit"),
    "4 billion sequences": (put("<I", ("footer", 12), 2**32 - 1), "do not fit"),
    "huge block": (put("<I", ("footer", 40), 2**32 - 8), "block of"),
    "shorter block": (put("<I", ("footer", 40), 40), "blocks take 40 bytes"),
    "many rows": (put("<I", ("footer", 44), 2**32 - 1), "rows in a block"),
    "other rows": (put("<I", ("footer", 44), 6), "5 tokens, its blocks 6 rows"),
    "many tokens": (put("<I", ("footer", 60), 2**32 - 1), "tokens, its blocks 5 rows"),
    "other total": (put("<Q", ("footer", 16), 6), "6 tokens"),
    "long key": (put("<H", ("footer", 64), 5000), "5000 bytes wanted"),
    "key not text": (put("<B", ("footer", 104), 0xFF), "UTF-8"),
    "extension": (put("<H", ("footer", 66), 4), "unknown required extension"),
    "block kind": (put("<H", ("footer", 52), 300), "unknown kind 300"),
    "column for rows": (put("<H", ("footer", 52), 3), "5 tokens, its blocks 0 rows"),
    "columns of no spec": (put("<Q", ("header", 16), 2), "further columns are not those"),
}


@pytest.mark.parametrize("name", SHARD_ATTACKS)
def test_pitfall_28_forged_shards_are_refused_on_open(forged, lab, name):
    path, _, _ = forged
    change, match = SHARD_ATTACKS[name]
    reforge(path, lab, change)
    refused(path, match)


# the block of "a" (5 rows of 8): payload = 8 bytes, tokens 5 x 10 bits in 8, log_rest 20 in 24, ids from 40
BLOCK_ATTACKS = {
    "id outside": (put("<H", ("payload", 40), 0xFFFF), "in a vocabulary of 1000"),
    "NaN": (put("<H", ("payload", 40 + 56), 0x7E00), "surprisal 0x7e00"),
    "positive log-probability": (put("<H", ("payload", 40 + 56), 0x8400), "surprisal 0x8400"),
    "log_rest NaN": (put("<I", ("payload", 16), 0x7FC00000), "log_rest NaN"),
    "log_rest positive": (put("<f", ("payload", 16), 2.0), "log_rest 2"),
    "token bits": (put("<B", ("payload", 0), 64), "token_bits 64"),
    "payload padding": (put("<B", ("payload", 3), 1), "padding"),
    "spare bits": (put("<B", ("payload", 15), 1), "padding"),
    "ragged without counts": (put("<B", ("payload", 1), 1), "entries|padding|left"),
    "other key": (put("<B", ("block", 32), ord("b")), 'row 0 of "b"'),
    "other number": (put("<I", ("block", 8), 7), "contradicts the index"),
    "other rows": (put("<I", ("block", 12), 4), "contradicts the index"),
    "other first row": (put("<I", ("block", 16), 1), "row 1"),
    "unknown flag": (put("<H", ("block", 6), 3), "flags"),
    "payload length": (put("<I", ("block", 28), 2**31), "at most"),
}


@pytest.mark.parametrize("name", BLOCK_ATTACKS)
def test_pitfall_28_forged_blocks_are_refused_on_read(forged, lab, name):
    path, _, _ = forged
    change, match = BLOCK_ATTACKS[name]
    reforge(path, lab, change)
    store = cache.open(path)
    with pytest.raises(cache.CacheError, match=match):
        store.numpy("a")
    report = store.verify()
    assert not report.ok and report.problems[0].part == "block 0"


def test_pitfall_28_verify_finds_values_that_no_writer_makes(forged, lab):
    """Duplicate ids, broken order and mass above 1 with right checksums."""
    path, _, _ = forged
    reforge(path, lab, put("<H", ("payload", 40 + 56), 0))  # the first surprisal of row 0 becomes 0: mass above 1
    problems = [str(p) for p in cache.verify_cache(path).problems]
    assert any("block 0" in p and "sum to" in p for p in problems), problems
    assert cache.verify_cache(path, deep=False).ok  # every checksum is right: `verify --deep` decodes rows


def test_pitfall_28_a_bomb_stays_small(forged, lab):
    """A forged index of 2^27 blocks, under a limit on the address space, is an ordinary error."""
    path, _, _ = forged
    reforge(path, lab, put("<I", ("footer", 8), 2**27))
    code = f"""
import resource
from potstill import cache
resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))
try:
    cache.open({str(path)!r})
except cache.CacheError as error:
    print("refused", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.stdout.startswith("refused"), done.stderr


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=5))
def test_pitfall_28_forged_bytes_never_crash(tmp_path_factory, lab, changes):
    """Any bytes, with checksums and names made right: an ordinary error or rows within bounds."""
    path = tmp_path_factory.mktemp("forged") / "c"
    lab.write(path, {"a": 5, "b": 3}, ragged=True, k=3, vocab=40)

    def change(data, header_len, foot):
        for place, value in changes:
            data[int(place * (len(data) - 32))] = value

    try:
        reforge(path, lab, change, blocks=2)
    except (struct.error, IndexError):
        return  # lengths that this forger cannot follow
    with contextlib.suppress(cache.CacheError, MemoryError):
        store = cache.open(path)
        for key in store.keys():
            with contextlib.suppress(cache.CacheError, MemoryError):
                tokens, ids, log_probs, log_rest = store.numpy(key)
                assert tokens.min() >= 0 and ids.max() < store.spec.vocab_size and ids.min() >= -1
                assert not np.isnan(log_probs).any() and log_probs.max() <= 0 and log_rest.max() <= 0
    cache.verify_cache(path)
    with contextlib.suppress(cache.CacheError, OSError):
        cache.recover_cache(path)


def test_import_needs_no_torch():
    code = "import sys, potstill.cache; assert 'torch' not in sys.modules and 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
