"""DistillKit's captured datasets: a folder of data_*.parquet and compression_config.yaml.

A row of the table is a sequence: input_ids, and for each of its tokens but the last a list of bytes with the
log-probabilities and one with the ids. Bytes of log-probabilities: `exact_k` of them in `exact_dtype`, the
coefficients of `polynomial_terms` in `term_dtype`, and bins of quantised residuals; ids: ceil(log2 d) bits each, the
highest first. Read are the forms with and without delta_encoding. Written is the exact one: exact_k = k, fp32.

The table keeps neither keys nor log_rest, and no row after the last token.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.exchange.layouts import integers, shifted
from potstill.cache.exchange.sequence import Sequence
from potstill.cache.exchange.tables import BATCH, arrow_errors, cell, column
from potstill.cache.spec import Spec

CONFIG = "compression_config.yaml"
COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")
WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
KNOWN = {"d", "k", "exact_k", "exact_dtype", "polynomial_terms", "term_dtype", "residual_bins", "delta_encoding",
         "error_diffusion", "normalize_t"}  # fmt: skip


def import_yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise ValueError("DistillKit's layout needs PyYAML: pip install 'potstill[arrow]'") from None
    return yaml


def write(path: Path, spec: Spec, sequences: Iterator[Sequence], layout: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    yaml = import_yaml()
    if spec.k == 0:
        raise ValueError("DistillKit's layout has no place for token_log_probs, which is all that rows of k = 0 hold")
    path.mkdir()
    config = dict(d=spec.vocab_size, k=spec.k, exact_k=spec.k, exact_dtype="float32", polynomial_terms=None,
                  term_dtype="float32", residual_bins=[], delta_encoding=False, error_diffusion=False,
                  normalize_t=False)  # fmt: skip
    (path / CONFIG).write_text(yaml.safe_dump(config))
    lists = pa.list_(pa.list_(pa.uint8()))
    schema = pa.schema([(COLUMNS[0], pa.list_(pa.uint64())), (COLUMNS[1], lists), (COLUMNS[2], lists)])
    with pq.ParquetWriter(path / "data_0.parquet", schema) as file:
        rows: list[tuple[Any, Any, Any]] = []
        size = 0

        def flush() -> None:
            arrays = [column(f.type, list(values)) for f, values in zip(schema, zip(*rows, strict=True), strict=True)]
            file.write_batch(pa.record_batch(arrays, schema=schema))

        for s in sequences:
            ids = np.where(s.ids[:-1] < 0, 0, s.ids[:-1])
            values = np.ascontiguousarray(s.log_probs[:-1]).view(np.uint8)
            rows.append((s.tokens, list(values), list(pack(ids, index_bits(spec.vocab_size)))))
            size += s.ids.size
            if size >= BATCH:
                flush()
                rows, size = [], 0
        if rows:
            flush()


def read(path: Path, layout: str) -> tuple[Spec | None, Iterator[Sequence]]:
    import pyarrow.parquet as pq

    yaml = import_yaml()
    try:
        config = yaml.safe_load((path / CONFIG).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path / CONFIG} is not YAML: {str(error).splitlines()[0]}") from None
    form = Form(config, path / CONFIG)
    files = sorted(path.glob("data_*.parquet"))
    if not files:
        raise ValueError(f"{path} holds no data_*.parquet")

    def stream() -> Iterator[Sequence]:
        number = 0
        for file in files:
            with arrow_errors(file), pq.ParquetFile(file) as opened:
                missing = [name for name in COLUMNS if name not in opened.schema_arrow.names]
                if missing:
                    raise ValueError(f"{file} has no column {', '.join(missing)}")
                for batch in opened.iter_batches(batch_size=16, columns=list(COLUMNS)):
                    for i in range(batch.num_rows):
                        yield form.sequence(f"{number:08d}", *(cell(batch.column(name)[i]) for name in COLUMNS))
                        number += 1

    return Spec(form.vocab_size, form.k, values="fp32"), stream()


class Form:
    """A checked configuration: how many bytes mean what."""

    def __init__(self, config: Any, where: Path) -> None:
        if not isinstance(config, dict) or not {"d", "k", "exact_k"} <= set(config):
            raise ValueError(f"{where} does not say d, k and exact_k")
        unknown = set(config) - KNOWN
        if unknown:
            raise ValueError(f"{where} holds {', '.join(sorted(map(str, unknown)))}, which is not known here")
        for name in ("d", "k", "exact_k"):
            if not isinstance(config[name], int):
                raise ValueError(f"{where}: {name} is {config[name]!r}, an integer is accepted")
        self.vocab_size, self.k, self.exact = config["d"], config["k"], config["exact_k"]
        Spec(self.vocab_size, self.k)  # refuses impossible sizes
        if not 0 <= self.exact <= self.k:
            raise ValueError(f"{where}: exact_k is {self.exact}, 0 to k = {self.k} is accepted")
        self.terms = config.get("polynomial_terms") or []
        self.bins = config.get("residual_bins") or []
        self.exact_dtype, self.term_dtype = (config.get(n, "float32") for n in ("exact_dtype", "term_dtype"))
        self.delta = bool(config.get("delta_encoding", True))
        self.normalized = bool(config.get("normalize_t", False))
        for dtype in (self.exact_dtype, self.term_dtype, *(b.get("scale_dtype") for b in self.bins)):
            if dtype not in WIDTHS:
                raise ValueError(f"{where}: dtype {dtype!r}; {', '.join(WIDTHS)} are accepted")
        powers = [t for t in self.terms if t not in ("sqrt", "exp") and not (isinstance(t, int) and 0 <= t <= 16)]
        if powers:
            raise ValueError(f"{where}: polynomial term {powers[0]!r}; 0 to 16, sqrt and exp are accepted")
        for b in self.bins:
            if not (1 <= b.get("element_bits", 0) <= 32 and 1 <= b.get("num_elements", 0) <= self.k):
                raise ValueError(f"{where}: a residual bin of {b}; 1 to 32 bits and 1 to k elements are accepted")
        if sum(b["num_elements"] for b in self.bins) > self.k - self.exact:
            raise ValueError(f"{where}: the residual bins hold more than k - exact_k elements")
        self.bytes = self.exact * WIDTHS[self.exact_dtype] + len(self.terms) * WIDTHS[self.term_dtype]
        self.bytes += sum(WIDTHS[b["scale_dtype"]] + packed_bytes(b) for b in self.bins)

    def sequence(self, key: str, tokens: Any, values: Any, indices: Any) -> Sequence:
        """tokens [L], bytes of log-probabilities [M, bytes], bytes of ids [M, ceil(k bits / 8)]."""
        tokens = integers(np.asarray(tokens), f"sequence {key!r}: input_ids")
        ids_bytes = (self.k * index_bits(self.vocab_size) + 7) // 8
        for name, rows, length in (("logprobs", values, self.bytes), ("ids", indices, ids_bytes)):
            wrong = [len(row) for row in rows if len(row) != length]
            if wrong:
                what = f"{wrong[0]} bytes of {name} for a token; the configuration makes {length}"
                raise ValueError(f"sequence {key!r}: {what}")
        if len(values) != len(indices):
            raise ValueError(f"sequence {key!r}: {len(values)} rows of log-probabilities, {len(indices)} of ids")
        m = len(values)
        if m == 0:
            ids, log_probs = np.empty((0, self.k), np.int32), np.empty((0, self.k), np.float32)
        else:
            ids = unpack(np.stack(indices), index_bits(self.vocab_size), self.k).astype(np.int32)
            log_probs = self.log_probs(np.stack(values).astype(np.uint8))
        empty = np.isneginf(log_probs)
        order = np.argsort(-log_probs, axis=-1, kind="stable")  # an approximation need not descend
        ids = np.take_along_axis(np.where(empty, -1, ids), order, -1)
        log_probs = np.take_along_axis(log_probs, order, -1)
        if m == len(tokens):  # a row after the last token too: leave it out, as the others of this layout
            ids, log_probs = ids[:-1], log_probs[:-1]
        return shifted(key, tokens, ids.astype(np.int32), log_probs)

    def log_probs(self, data: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Bytes [M, bytes] as log-probabilities fp32 [M, k]."""
        m = len(data)
        at = self.exact * WIDTHS[self.exact_dtype]
        exact = numbers(data[:, :at], self.exact_dtype)
        coefficients = numbers(data[:, at : at + len(self.terms) * WIDTHS[self.term_dtype]], self.term_dtype)
        at += len(self.terms) * WIDTHS[self.term_dtype]
        rest = np.zeros((m, self.k - self.exact), np.float32)
        done = 0
        for b in self.bins:
            width, bits, n = WIDTHS[b["scale_dtype"]], b["element_bits"], b["num_elements"]
            scale = numbers(data[:, at : at + width], b["scale_dtype"])
            at += width
            steps = unpack(data[:, at : at + packed_bytes(b)], bits, n).astype(np.float32)
            at += packed_bytes(b)
            rest[:, done : done + n] = (steps * 2 - 1 if bits == 1 else steps - 2 ** (bits - 1)) * scale
            done += n
        if self.terms and self.k > self.exact:
            t = np.arange(self.k - self.exact, dtype=np.float32)
            if self.normalized:
                t = np.linspace(0, 1, self.k - self.exact, dtype=np.float32)
            special = {"sqrt": np.sqrt, "exp": np.exp}
            basis = np.stack([special[i](t) if i in special else t**i for i in self.terms])
            rest = rest + coefficients @ basis
        whole = np.concatenate([exact, rest], -1).astype(np.float32)
        whole = np.cumsum(whole, -1, dtype=np.float32) if self.delta else whole
        return np.minimum(whole, np.float32(0)) if self.exact < self.k else whole


def index_bits(vocab_size: int) -> int:
    return max(int(vocab_size - 1).bit_length(), 1)


def packed_bytes(bin_: dict[str, Any]) -> int:
    return (bin_["element_bits"] * bin_["num_elements"] + 7) // 8


def numbers(data: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    data = np.ascontiguousarray(data)
    if dtype == "bfloat16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view({"float16": "<f2", "float32": "<f4", "float64": "<f8"}[dtype]).astype(np.float32)


def pack(values: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Integers [M, k] in `bits` each, the highest first: bytes [M, ceil(k bits / 8)]."""
    places = np.arange(bits - 1, -1, -1)
    flags = (values[..., None] >> places & 1).astype(np.uint8)
    return np.packbits(flags.reshape(len(values), values.shape[1] * bits), axis=-1)


def unpack(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    flags = np.unpackbits(np.ascontiguousarray(data, np.uint8), axis=-1)[:, : bits * count]
    weights = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    return flags.reshape(len(data), count, bits) @ weights
