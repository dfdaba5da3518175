"""An independent reader of format 1 in plain numpy: it shares no code with the package."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy_dense as dense

try:
    import xxhash
except ImportError:  # checksums are then left to the package's own tests
    xxhash = None


def xxh3(data: bytes) -> int | None:
    return None if xxhash is None else xxhash.xxh3_64_intdigest(data)


def up8(n: int) -> int:
    return -(-n // 8) * 8


def sealed(path: Path, kind: str) -> Any:
    text = path.read_bytes()
    head, tail = text[:-28], text[-28:]
    assert tail.startswith(b',"xxh3":"') and tail.endswith(b'"}\n')
    assert xxh3(head) in (None, int(tail[9:25], 16))
    file = json.loads(text)
    assert file["potstill"] == kind and file["version"][0] == 1
    if "spec" in file["body"]:
        assert file["required"] == (["columns"] if "columns" in json.loads(file["body"]["spec"]) else [])
    return file["body"]


def unpack(data: bytes, n: int, bits: int) -> np.ndarray:
    stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    assert not stream[n * bits :].any(), "padding bits"
    weights = 1 << np.arange(bits, dtype=np.int64)
    return (stream[: n * bits].reshape(n, bits) * weights).sum(-1).astype(np.int32)


def rows(payload: bytes, n: int, entries: int, k: int, vocab: int) -> tuple[np.ndarray, ...]:
    token_bits, ragged, id_bits = payload[0], payload[1], max(1, (vocab - 1).bit_length())
    at = 8

    def part(size: int) -> bytes:
        nonlocal at
        data = payload[at : at + size]
        assert len(data) == size and not any(payload[at + size : at + up8(size)])
        at += up8(size)
        return data

    tokens = unpack(part(-(-n * token_bits // 8)), n, token_bits)
    counts = np.frombuffer(part(2 * n), "<u2").astype(int) if ragged else np.full(n, k)
    log_rest = np.frombuffer(part(4 * n), "<f4").copy()
    flat_ids = unpack(part(-(-entries * id_bits // 8)), entries, id_bits)
    halves = np.frombuffer(part(2 * entries), "<u2")
    flat_lp = 0 - halves.view("<f2").astype(np.float32)
    assert at == len(payload) and counts.sum() == entries and counts.max(initial=0) <= k
    assert not any(payload[2:8]) and ragged < 2 and id_bits <= token_bits <= 31
    assert flat_ids.max(initial=0) < vocab and not np.isnan(log_rest).any() and log_rest.max() <= 0
    assert all(half <= 0x7C00 for half in halves), "a surprisal is negative or not a number"
    ids, log_probs = np.full((n, k), -1, np.int32), np.full((n, k), -np.inf, np.float32)
    present = np.arange(k) < counts[:, None]
    ids[present], log_probs[present] = flat_ids, flat_lp
    return tokens, ids, log_probs, log_rest


def check_hashes(stored: bytes, tokens: np.ndarray, content: bytes, further: bytes | None) -> None:
    if xxhash is not None:
        if further is not None:
            both = [xxhash.xxh3_128_intdigest(x) for x in (content, further)]
            content = b"".join(x.to_bytes(16, "little") for x in both)
        mine = [xxhash.xxh3_128_intdigest(x) for x in (tokens.astype("<u4").tobytes(), content)]
        assert [int.from_bytes(stored[i : i + 16], "little") for i in (0, 16)] == mine


@dataclass
class Column:
    name: str
    dtype: str
    width: int
    per: str
    labels: tuple[str, ...] = ()

    def read(self, payload: bytes, n: int) -> np.ndarray:
        size = 4 if self.dtype == "fp32" else 2
        assert len(payload) == n * self.width * size
        if self.dtype == "bf16":  # the upper half of an fp32
            values = (np.frombuffer(payload, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(payload, "<f2" if self.dtype == "fp16" else "<f4").astype(np.float32)
        assert np.isfinite(values).all()
        return values.reshape(n, self.width)


def shard(path: Path, spec_text: str, columns: bool = False) -> dict[str, tuple[np.ndarray, ...]]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PSC\r\n\x1a\n" and data[-8:] == b"\x89PSE\r\n\x1a\n"
    major, _, header_len, required, _, codec, params_len, vocab, k, zero = struct.unpack_from("<HHIQQHHIII", data, 8)
    spec = json.loads(spec_text)
    further = [Column(**c) for c in spec.get("columns", [])]
    flags = int(codec > 0) | 2 * bool(further)
    assert (major, required, params_len, zero) == (1, flags, 32 if codec else 1, 0) and codec < 3
    assert data[48:80] == hashlib.sha256(spec_text.encode()).digest()
    if codec:
        (size,) = struct.unpack_from("<I", data, 88)
        stored = data[header_len : header_len + size]
        tables = dense.Tables(stored, data[80:112], vocab, k, xxh3, codec)
    else:
        size, stored, tables = 0, b"", None
        assert data[80] == max(1, (vocab - 1).bit_length())
    assert xxh3(data[: header_len - 8]) in (None, struct.unpack_from("<Q", data, header_len - 8)[0])
    footer_len, file_len, check = struct.unpack_from("<QQQ", data, len(data) - 32)
    assert file_len == len(data) and xxh3(data[-32:-16]) in (None, check)
    footer = data[-32 - footer_len : -32]
    name = hashlib.sha256(data[:header_len] + footer).hexdigest()[:32]
    assert path.name == f"{name}.shard"
    assert footer[:8] == b"PSINDEX\n" and xxh3(footer[:-8]) in (None, struct.unpack("<Q", footer[-8:])[0])
    n_blocks, n_sequences, total, _ = struct.unpack_from("<IIQQ", footer, 8)
    blocks = [struct.unpack_from("<QIIIHH", footer, 32 + 24 * i) for i in range(n_blocks)]
    at = 32 + 24 * n_blocks
    heads = [struct.unpack_from("<IIHHI", footer, at + 48 * i) for i in range(n_sequences)]
    key_at, offset, block, found = at + 48 * n_sequences, header_len + size, 0, {}
    hashes = [footer[at + 48 * i + 16 : at + 48 * i + 48] for i in range(n_sequences)]
    for (count, tokens, key_len, ext_len, _), hashed in zip(heads, hashes, strict=True):
        key = footer[key_at : key_at + key_len].decode()
        key_at += key_len + ext_len
        pieces, coded, payloads, extra, extra_payloads = [], [], b"", [[] for _ in further], b""
        for i in range(block, block + count):
            check, length, n, entries, kind, _ = blocks[i]
            body = data[offset : offset + length]
            assert xxh3(body[:-8]) in (None, check) and struct.unpack("<Q", body[-8:])[0] == check
            magic, kind_, flags, number, n_, first, entries_, klen, zero, plen = struct.unpack_from(
                "<4sHHIIIIHHI", body
            )
            assert (magic, kind_, number, n_, entries_) == (b"PSBK", kind, i, n, entries) and 0 <= kind <= len(further)
            assert body[32 : 32 + klen].decode() == key and flags == int(i == block + count - 1)
            start = 32 + up8(klen)
            payload = body[start : start + plen]
            assert zero == 0 and not any(body[32 + klen : start]) and len(body) == start + up8(plen) + 8
            assert not any(body[start + plen : -8])
            offset += length
            if kind:
                assert first == sum(map(len, extra[kind - 1])) and not entries and not any(extra[kind:])
                extra[kind - 1].append(further[kind - 1].read(payload, n))
                extra_payloads += payload
                continue
            assert first == sum(len(p[0]) for p in pieces) and not any(extra)
            if tables:
                coded += (mine := tables.block(payload, n, entries))
                pieces.append(tables.arrays(mine))
            else:
                pieces.append(rows(payload, n, entries, k, vocab))
            payloads += payload
        block += count
        whole = tuple(np.concatenate(parts) for parts in zip(*pieces, strict=True))
        content = dense.content(coded, tables) if tables else payloads
        check_hashes(hashed, whole[0], content, extra_payloads if further else None)
        named = {c.name: np.concatenate(parts) for c, parts in zip(further, extra, strict=True)}
        assert [len(v) for v in named.values()] == [tokens if c.per == "token" else 1 for c in further]
        found[key] = whole[:4] if not columns else (*whole, named) if further else whole
        assert len(found[key][0]) == tokens
    assert block == n_blocks and sum(len(s[0]) for s in found.values()) == total
    assert data[offset : offset + size] == stored and offset + size == len(data) - 32 - footer_len
    return found


def cache(path: Path, columns: bool = False) -> dict[str, tuple[np.ndarray, ...]]:
    """{key: (tokens, ids, log_probs, log_rest)} of a whole cache, from its manifest; with `columns` also extra, lse,
    counts (codec 1) and, where the spec has them, the further columns by name."""
    manifest = sealed(Path(path) / "manifest.json", "manifest")
    found: dict[str, tuple[np.ndarray, ...]] = {}
    for entry in manifest["shards"]:
        for key, value in shard(Path(path) / "shards" / f"{entry['name']}.shard", manifest["spec"], columns).items():
            found.setdefault(key, value)
    return found
