"""Codecs 1 and 2 of the format in plain Python and numpy, written from docs/format.md: no code of the package."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

LOWEST_LOGIT = 0xFF80  # the code of the bf16 that is -inf
RANK, STEP, TOKEN, COUNT, FIRST, REST, EXTRA = range(7)


def up8(n: int) -> int:
    return -(-n // 8) * 8


class Bits:
    """A stream whose bit 0 is the lowest bit of the first byte."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.number, self.size, self.at = int.from_bytes(data, "little"), 8 * len(data), at

    def take(self, n: int) -> int:
        assert self.at + n <= self.size, "a stream ends early"
        value = (self.number >> self.at) & ((1 << n) - 1)
        self.at += n
        return value

    def unary(self) -> int:
        zeros = 0
        while not self.take(1):
            zeros += 1
        return zeros

    def end(self) -> None:
        assert self.size - self.at < 8 and self.number >> self.at == 0, "padding"


class Classes:
    def __init__(self, widths: bytes, bound: int, widest: int) -> None:
        self.widths = list(widths)
        assert max(widths) <= widest
        sizes = [1 << w for w in self.widths]
        self.bases = [sum(sizes[:c]) for c in range(16)]
        assert sum(sizes) >= bound and max(self.bases) < 2**32

    def take(self, nibbles: Bits, raw: Bits) -> int:
        c = nibbles.take(4)
        return self.bases[c] + raw.take(self.widths[c])


class Prefix:
    """Canonical codes, at most 11 bits; symbol 63 stands for 16 raw bits."""

    def __init__(self, lengths: bytes) -> None:
        self.symbol, code = {}, 0
        for length in range(1, 12):
            for symbol in range(64):
                if lengths[symbol] == length:
                    self.symbol[length, code] = symbol
                    code += 1
            code <<= 1
        assert sum(2**-x for x in lengths if x) == 1 and max(lengths) <= 11

    def take(self, bits: Bits) -> int:
        code = length = 0
        while (length, code) not in self.symbol:
            code, length = code << 1 | bits.take(1), length + 1
        symbol = self.symbol[length, code]
        return bits.take(16) if symbol == 63 else symbol


@dataclass
class Layout:
    kind: int
    sampled: int
    per_nat: int
    extra: int

    @classmethod
    def read(cls, data: bytes) -> Layout:
        kind, sampled, per_nat, extra, zero = struct.unpack("<BBHHH", data)
        assert zero == 0 and sampled < 2 and (per_nat in (8, 16, 32, 64)) == (kind == 0) and kind < 4
        return cls(kind, sampled, per_nat, extra)


class Tables:
    def __init__(self, data: bytes, params: bytes, vocab: int, k: int, xxh3, codec: int = 1) -> None:
        self.layout = Layout.read(params[:8])
        self.shifted = codec == 2 and self.layout.kind == 0
        length, zero, check, trained = struct.unpack("<IIQQ", params[8:32])
        assert zero == 0 and length == len(data) and xxh3(data[:-8]) in (None, check)
        magic, length, v, k_ = struct.unpack_from("<4sIII", data)
        assert (magic, length, v, k_) == (b"PSTB", len(data), vocab, k)
        assert data[16:24] == params[:8] and struct.unpack_from("<Q", data, 24)[0] == trained
        assert struct.unpack("<Q", data[-8:])[0] == check
        bounds = [vocab, vocab, k + 2**31, k + 1, 2**19 if self.shifted else 2**16, 2**16, 2**16]
        self.classes = [Classes(data[32 + 16 * c : 48 + 16 * c], bounds[c], 28 if c < 2 else 32) for c in range(7)]
        self.codes, self.draws = Prefix(data[144:208]), Prefix(data[208:272])
        (n,) = struct.unpack_from("<I", data, 272)
        at = 276 + 12 * n
        self.id_of: list[int] = []
        for i in range(n):
            count, shift, zero, size = struct.unpack_from("<IB3sI", data, 276 + 12 * i)
            assert shift <= 31 and zero == bytes(3) and n <= 64
            bits, following = Bits(data[at : at + size]), 0
            for _ in range(count):
                high = bits.unary()
                self.id_of.append(following + (high << shift | bits.take(shift)))
                following = self.id_of[-1] + 1
            bits.end()
            at += size
        assert not any(data[at:-8]) and up8(at) == len(data) - 8
        listed = set(self.id_of)
        assert len(listed) == len(self.id_of)
        self.id_of += [i for i in range(vocab) if i not in listed]
        self.k, self.vocab = k, vocab
        assert len(self.id_of) == vocab

    def value(self, code: int, lse: float, shift: int = 0) -> np.float32:
        if self.layout.kind == 0:
            return np.float32(-np.inf) if code == 65535 else np.float32(0 - (code + shift / 8) / self.layout.per_nat)
        if self.layout.kind == 1:
            order = 0xFFFF - code
            bits = order & 0x7FFF if order & 0x8000 else 0xFFFF - order
            return np.uint32(bits << 16).view(np.float32) - np.float32(lse)
        if self.layout.kind == 2:
            return np.float32(0) - np.float32(np.uint16(code).view(np.float16))
        return np.float32(0) - np.uint32(code).view(np.float32)

    def rest(self, code: int) -> np.float32:
        if self.layout.kind == 0:
            per_nat = self.layout.per_nat * (4 if self.shifted else 1)
            return np.float32(-np.inf) if code == 0 else np.float32(0 - (code - 1) / per_nat)
        return np.uint32(code).view(np.float32)

    def block(self, payload: bytes, n: int, entries: int) -> list[dict]:
        """The rows of a block: token, ids, codes, draws, rests (codes) and lse (bits)."""
        layout, k = self.layout, self.k
        ragged, *lens = struct.unpack_from("<IIII", payload)
        assert ragged < 2
        rests_of_row = int(k > 0) + layout.extra  # without entries log_rest is 0 and not stored
        width = [0, 1 + rests_of_row, rests_of_row, rests_of_row][layout.kind]
        words = np.frombuffer(payload, "<u4", n * width, 16).reshape(n, width)
        at = 16 + up8(4 * n * width)
        size = [0, 0, 2, 4][layout.kind]
        raw_codes = np.frombuffer(payload, f"<u{size}", entries, at) if size else None
        assert not any(payload[16 + 4 * n * width : at]) and not any(
            payload[at + size * entries : at + up8(size * entries)]
        )
        at += up8(size * entries)
        nibbles, differences, raw = (Bits(payload[at + sum(lens[:i]) : at + sum(lens[: i + 1])]) for i in range(3))
        assert payload[at + sum(lens) :] == bytes(8)
        rows, before, used = [], [], 0
        for i in range(n):
            value = self.classes[TOKEN].take(nibbles, raw)
            if value < k:
                token = before[value]
            else:
                token = self.id_of[value - k] if value - k < self.vocab else value - k
            count = k - self.classes[COUNT].take(nibbles, raw) if ragged else k
            assert count >= 0
            code = self.classes[FIRST].take(nibbles, raw) if layout.kind < 2 and k else 0
            shift = code % 8 if self.shifted else 0
            code = code // 8 if self.shifted else code
            assert code < 65535 or shift == 0
            if layout.kind == 0:
                rests = [self.classes[c].take(nibbles, raw) for c in [REST] * int(k > 0) + [EXTRA] * layout.extra]
                lse = 0
            else:
                lse, rests = (int(words[i, 0]), words[i, 1:]) if layout.kind == 1 else (0, words[i])
            if not k:
                rests = [int(layout.kind == 0), *rests]
            if layout.kind < 2:
                codes = [code] + [self.codes.take(differences) for _ in range(count - 1)]
                codes = np.cumsum(codes)[:count].tolist()
            else:
                codes = raw_codes[used : used + count].tolist()
                assert codes == sorted(codes)
            assert not codes or codes[-1] <= [65535, LOWEST_LOGIT, 0x7C00, 0x7F800000][layout.kind]
            values = [float(self.value(c, np.uint32(lse).view(np.float32))) for c in codes if layout.kind == 1]
            assert all(v <= 1e-3 for v in values), "a logit is not a number, or above its lse"
            if layout.kind == 0:
                assert all(rest <= 65535 for rest in rests)
            else:
                assert all(float(np.uint32(rest).view(np.float32)) <= 0 for rest in rests)
            ranks: list[int] = []
            for j in range(count):
                if j and codes[j] == codes[j - 1]:
                    ranks.append(ranks[-1] + 1 + self.classes[STEP].take(nibbles, raw))
                else:
                    ranks.append(self.classes[RANK].take(nibbles, raw))
            before = [self.id_of[r] for r in ranks]
            draws = [1 + self.draws.take(raw) for _ in range(count)] if layout.sampled else []
            rows.append(
                {
                    "token": token,
                    "ids": before,
                    "codes": codes,
                    "draws": draws,
                    "rests": rests,
                    "lse": lse,
                    "shift": shift,
                }
            )
            used += count
        assert used == entries
        for bits in (nibbles, differences, raw):
            bits.end()
        return rows

    def arrays(self, rows: list[dict]) -> tuple[np.ndarray, ...]:
        """(tokens, ids, log_probs, log_rest, extra, lse, counts) of rows, padded to k."""
        n, k = len(rows), self.k
        tokens = np.array([r["token"] for r in rows], np.int32)
        ids, log_probs = np.full((n, k), -1, np.int32), np.full((n, k), -np.inf, np.float32)
        counts = np.zeros((n, k), np.int32)
        lse = np.array([r["lse"] for r in rows], np.uint32).view(np.float32)
        rests = np.array([[self.rest(c) for c in r["rests"]] for r in rows], np.float32).reshape(n, -1)
        for i, r in enumerate(rows):
            m = len(r["ids"])
            ids[i, :m] = r["ids"]
            log_probs[i, :m] = [self.value(c, lse[i], r["shift"]) for c in r["codes"]]
            counts[i, : len(r["draws"])] = r["draws"]
        return tokens, ids, log_probs, rests[:, 0], rests[:, 1:], lse, counts


def content(rows: list[dict], tables: Tables) -> bytes:
    """What the content hash is taken of: columns of u32, entries of a row by code and then by id."""
    columns: list[list[int]] = [[], [], [], [], [], [], [], []]
    for r in rows:
        order = sorted(range(len(r["ids"])), key=lambda j: (r["codes"][j], r["ids"][j]))
        for column, values in zip(columns, ([r["token"]], [len(order)]), strict=False):
            column += values
        columns[2] += [r["ids"][j] for j in order]
        columns[3] += [r["codes"][j] for j in order]
        columns[4] += [r["draws"][j] - 1 for j in order if r["draws"]]
        columns[5] += [int(x) for x in r["rests"]]
        columns[6] += [r["lse"]] if tables.layout.kind == 1 else []
        columns[7] += [r["shift"]] if tables.shifted else []
    return b"".join(np.array(c, np.uint32).tobytes() for c in columns)
