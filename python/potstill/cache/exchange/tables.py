"""Parquet, Arrow and JSON lines: a row for each sequence, columns as in `layouts`. fp32 and int32 as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from potstill.cache.exchange.layouts import LAYOUTS, Layout, check_names, from_row, to_row
from potstill.cache.exchange.sequence import Sequence, entry_columns, row_columns, spec_of
from potstill.cache.spec import Spec

SPEC = b"potstill"  # name of the spec in a table's metadata
BATCH = 1 << 21  # entries held in memory, about
LONGEST_LINE = 1 << 30


def schema(layout: Layout, spec: Spec) -> Any:
    """The Arrow schema of a layout; a cache's spec is in its metadata."""
    import pyarrow as pa

    types = {"key": pa.string(), layout.tokens: pa.list_(pa.int32())}
    if layout.whole:
        for name in entry_columns(spec):
            types[name] = pa.list_(pa.list_(pa.float32() if name == "log_probs" else pa.int32()))
        types |= {name: pa.list_(pa.float32()) for name in row_columns(spec)}
    else:
        if layout.mask is not None:
            types |= {"labels": pa.list_(pa.int32()), "attention_mask": pa.list_(pa.int32())}
        types |= {layout.ids: pa.list_(pa.list_(pa.int32())), layout.log_probs: pa.list_(pa.list_(pa.float32()))}
        if layout.mask is not None:
            types[layout.mask] = pa.list_(pa.list_(pa.int8()))
    return pa.schema(list(types.items()), metadata={SPEC: spec.to_json().encode()})


def batches(layout: Layout, spec: Spec, sequences: Iterator[Sequence]) -> Iterator[Any]:
    """Record batches of a bounded number of entries."""
    import pyarrow as pa

    wanted = schema(layout, spec)
    rows: list[dict[str, Any]] = []
    size = 0
    for s in sequences:
        rows.append(to_row(layout, s))
        size += s.ids.size
        if size >= BATCH:
            yield pa.record_batch([column(f.type, [r[f.name] for r in rows]) for f in wanted], schema=wanted)
            rows, size = [], 0
    if rows:
        yield pa.record_batch([column(f.type, [r[f.name] for r in rows]) for f in wanted], schema=wanted)


def column(kind: Any, values: list[Any]) -> Any:
    """An Arrow array of strings, of lists [n], or of lists of lists."""
    import pyarrow as pa

    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    if not pa.types.is_list(kind.value_type):
        return pa.ListArray.from_arrays(ends(values), pa.array(np.concatenate(values), kind.value_type))
    inner = [x for rows in values for x in rows]
    flat = np.concatenate(inner) if inner else np.empty(0)
    lists = pa.ListArray.from_arrays(ends(inner), pa.array(flat, kind.value_type.value_type))
    return pa.ListArray.from_arrays(ends(values), lists)


def ends(values: list[Any]) -> Any:
    import pyarrow as pa

    return pa.array(np.cumsum([0, *map(len, values)]), pa.int32())


def write_parquet(path: Path, spec: Spec, sequences: Iterator[Sequence], layout: str) -> None:
    import pyarrow.parquet as pq

    chosen = LAYOUTS[layout]
    with pq.ParquetWriter(path, schema(chosen, spec), compression="zstd", use_dictionary=False) as file:
        for batch in batches(chosen, spec, sequences):
            file.write_batch(batch)


def write_arrow(path: Path, spec: Spec, sequences: Iterator[Sequence], layout: str) -> None:
    import pyarrow as pa

    chosen = LAYOUTS[layout]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema(chosen, spec)) as file:
        for batch in batches(chosen, spec, sequences):
            file.write_batch(batch)


@contextmanager
def arrow_errors(path: Path) -> Iterator[None]:
    """What pyarrow says of a file that it cannot read, as one line."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def read_parquet(path: Path, layout: str) -> tuple[Spec | None, Iterator[Sequence]]:
    """Spec and sequences of a file, or of the *.parquet files of a folder by name."""
    import pyarrow.parquet as pq

    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no *.parquet file")
    with arrow_errors(path):
        first = pq.ParquetFile(files[0]).schema_arrow

    def stream() -> Iterator[Any]:
        for file in files:
            with arrow_errors(file), pq.ParquetFile(file) as opened:
                check_names(LAYOUTS[layout], opened.schema_arrow.names, str(file))
                yield from opened.iter_batches(batch_size=16)

    check_names(LAYOUTS[layout], first.names, str(files[0]))
    return stored_spec(first.metadata, path), of_batches(stream(), layout)


def read_arrow(path: Path, layout: str) -> tuple[Spec | None, Iterator[Sequence]]:
    import pyarrow as pa

    with arrow_errors(path), pa.OSFile(str(path)) as source:
        first = pa.ipc.open_file(source).schema
    check_names(LAYOUTS[layout], first.names, str(path))

    def stream() -> Iterator[Any]:
        with arrow_errors(path), pa.OSFile(str(path)) as source:
            opened = pa.ipc.open_file(source)
            for i in range(opened.num_record_batches):
                yield opened.get_batch(i)

    return stored_spec(first.metadata, path), of_batches(stream(), layout)


def stored_spec(metadata: dict[bytes, bytes] | None, path: Path) -> Spec | None:
    text = (metadata or {}).get(SPEC)
    return None if text is None else spec_of(text, path)


def of_batches(stream: Iterator[Any], layout: str) -> Iterator[Sequence]:
    number = 0
    for batch in stream:
        for i in range(batch.num_rows):
            row = {name: cell(batch.column(name)[i]) for name in batch.schema.names}
            yield from_row(LAYOUTS[layout], row, number)
            number += 1


def cell(scalar: Any) -> Any:
    """An Arrow scalar as a Python value, an array [n], or a list of arrays."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not scalar.is_valid or not hasattr(scalar, "values") or isinstance(scalar, pa.StructScalar):
        return scalar.as_py()
    values = scalar.values
    if not hasattr(values, "flatten") or not hasattr(values.type, "value_type"):
        return values.to_numpy(zero_copy_only=False)
    if values.null_count:
        raise ValueError(f"a list of lists has {values.null_count} missing lists; give an empty one for none")
    lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
    flat = values.flatten().to_numpy(zero_copy_only=False)
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []


def write_jsonl(path: Path, spec: Spec, sequences: Iterator[Sequence], layout: str) -> None:
    """Numbers in their shortest form that reads back as the same fp32; null for -inf."""
    with open(path, "w", encoding="utf-8") as file:
        for s in sequences:
            row = {name: plain(value) for name, value in to_row(LAYOUTS[layout], s).items()}
            file.write(json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n")


def plain(value: Any) -> Any:
    if isinstance(value, list):
        return [plain(v) for v in value]
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind != "f":
        return value.tolist()
    return [float(str(v)) if v > -np.inf else None for v in value]


def read_jsonl(path: Path, layout: str) -> tuple[Spec | None, Iterator[Sequence]]:
    def stream(file: IO[str]) -> Iterator[Sequence]:
        with file:
            number = 0
            while line := file.readline(LONGEST_LINE):
                if not line.strip():
                    continue
                where = f"{path}, line {number + 1}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where} is not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{where} is not a JSON object")
                check_names(LAYOUTS[layout], row, where)
                yield from_row(LAYOUTS[layout], row, number)
                number += 1

    return None, stream(open(path, encoding="utf-8"))
