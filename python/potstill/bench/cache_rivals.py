"""Other ways to keep the rows: fp16 log-probabilities, int32 ids, fp32 log_rest, int32 tokens.

Every store writes a folder durably, reads all rows in order into given memory, and one sequence at random. None of them
rounds to a grid, and they may leave fp16 as it is: their time holds no widening.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.bench.cache_rows import Rows

Columns = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]  # tokens, ids, log_probs, log_rest
NAMES = ("tokens", "ids", "log_probs", "log_rest")
GROUP = 4096  # rows of a Parquet row group and of an HDF5 chunk


@dataclass
class Opened:
    """all(out): every row in order into out; one(i, out): sequence i into the first rows of out."""

    all: Callable[[Columns], Any]
    one: Callable[[int, Columns], Any]


def each(fill: Callable[[int, int, Columns], None], parts: list[slice]) -> Opened:
    """Of a format that keeps sequences apart: fill(i, start, out) puts sequence i at row `start`."""

    def read_all(out: Columns) -> None:
        for i, part in enumerate(parts):
            fill(i, part.start, out)

    return Opened(read_all, lambda i, out: fill(i, 0, out))


def columns(rows: Rows) -> Columns:
    return rows.tokens, rows.ids, rows.log_probs.astype(np.float16), rows.log_rest


def empty(rows: Rows) -> Columns:
    """Memory to read into, touched."""
    return tuple(np.zeros_like(c) for c in columns(rows))  # type: ignore[return-value]


def durable(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def put(out: Columns, start: int, found: Columns | list[Any]) -> None:
    for target, column in zip(out, found, strict=True):
        target[start : start + len(column)] = column


class Store:
    """A format. `package` is what it needs."""

    name = package = ""

    def write(self, folder: Path, rows: Rows) -> None:
        raise NotImplementedError

    def open(self, folder: Path, rows: Rows) -> Opened:
        raise NotImplementedError


class Parquet(Store):
    name, package = "Parquet, byte-stream-split + zstd", "pyarrow"

    def write(self, folder: Path, rows: Rows) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        k = rows.ids.shape[1]
        tokens, ids, log_probs, log_rest = columns(rows)
        lists = [pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), k) for x in (ids, log_probs)]
        table = pa.table([pa.array(tokens), *lists, pa.array(log_rest)], names=list(NAMES))
        pq.write_table(table, folder / "rows.parquet", compression="zstd", use_dictionary=False, row_group_size=GROUP,
                       use_byte_stream_split=True, write_page_checksum=True)  # fmt: skip

    def open(self, folder: Path, rows: Rows) -> Opened:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(folder / "rows.parquet", page_checksum_verification=True)
        k = rows.ids.shape[1]

        def group(n: int) -> list[Any]:
            table = file.read_row_group(n, use_threads=False)
            found = [table.column(name).combine_chunks() for name in NAMES]
            arrays = [(c.flatten() if hasattr(c, "flatten") and c.type.num_fields else c).to_numpy() for c in found]
            return [
                a.reshape(-1, k) if name in ("ids", "log_probs") else a for a, name in zip(arrays, NAMES, strict=True)
            ]

        def read_all(out: Columns) -> None:
            for n in range(file.num_row_groups):
                put(out, n * GROUP, group(n))

        def read_one(i: int, out: Columns) -> None:
            part, at = rows.parts()[i], 0
            for n in range(part.start // GROUP, (part.stop - 1) // GROUP + 1):
                first, last = max(part.start - n * GROUP, 0), min(part.stop - n * GROUP, GROUP)
                put(out, at, [c[first:last] for c in group(n)])
                at += last - first

        return Opened(read_all, read_one)


class Lmdb(Store):
    """A value for each sequence: its columns one behind the other, zstd level 3."""

    name, package = "LMDB + zstd", "lmdb"

    def write(self, folder: Path, rows: Rows) -> None:
        import lmdb
        import zstandard

        squeeze = zstandard.ZstdCompressor(level=3, write_checksum=True)
        size = 4 * sum(c.nbytes for c in columns(rows)) + (16 << 20)
        with lmdb.open(str(folder), map_size=size) as env, env.begin(write=True) as transaction:
            for i, part in enumerate(rows.parts()):
                value = b"".join(np.ascontiguousarray(c[part]).tobytes() for c in columns(rows))
                transaction.put(i.to_bytes(4, "big"), squeeze.compress(value))

    def open(self, folder: Path, rows: Rows) -> Opened:
        import lmdb
        import zstandard

        env = lmdb.open(str(folder), readonly=True, lock=False)
        expand = zstandard.ZstdDecompressor()
        parts, k = rows.parts(), rows.ids.shape[1]

        def fill(i: int, start: int, out: Columns) -> None:
            with env.begin(buffers=True) as transaction:
                data = expand.decompress(transaction.get(i.to_bytes(4, "big"), b""))
            n, at = parts[i].stop - parts[i].start, 0
            for target, width in zip(out, (1, k, k, 1), strict=True):
                column = np.frombuffer(data, target.dtype, n * width, at)
                target[start : start + n] = column.reshape(n, -1) if target.ndim == 2 else column
                at += column.nbytes

        return each(fill, parts)


class Safetensors(Store):
    name, package = "safetensors", "safetensors"

    def write(self, folder: Path, rows: Rows) -> None:
        from safetensors.numpy import save_file

        save_file(dict(zip(NAMES, columns(rows), strict=True)), str(folder / "rows.safetensors"))

    def open(self, folder: Path, rows: Rows) -> Opened:
        from safetensors import safe_open

        file = safe_open(str(folder / "rows.safetensors"), framework="numpy")
        slices = [file.get_slice(name) for name in NAMES]
        parts = rows.parts()
        return Opened(
            lambda out: put(out, 0, [file.get_tensor(name) for name in NAMES]),
            lambda i, out: put(out, 0, [s[parts[i].start : parts[i].stop] for s in slices]),
        )


class HFDatasets(Store):
    """A row for each sequence, read in numpy's format."""

    name, package = "HF datasets", "datasets"

    def write(self, folder: Path, rows: Rows) -> None:
        import datasets

        k = rows.ids.shape[1]
        wide = {"ids": "int32", "log_probs": "float16"}
        flat = {"tokens": datasets.List(datasets.Value("int32")), "log_rest": datasets.List(datasets.Value("float32"))}
        lists = {name: datasets.List(datasets.List(datasets.Value(t), length=k)) for name, t in wide.items()}
        found = {name: [c[p] for p in rows.parts()] for name, c in zip(NAMES, columns(rows), strict=True)}
        features = datasets.Features({name: {**flat, **lists}[name] for name in NAMES})
        quiet = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bar()
        datasets.Dataset.from_dict(found, features=features).save_to_disk(str(folder))
        if quiet:
            datasets.enable_progress_bar()

    def open(self, folder: Path, rows: Rows) -> Opened:
        import datasets

        stored = datasets.load_from_disk(str(folder)).with_format("numpy")
        parts = rows.parts()

        def fill(i: int, start: int, out: Columns) -> None:
            row = stored[i]
            put(out, start, [row[name] for name in NAMES])

        return each(fill, parts)


class Npz(Store):
    """numpy's compressed archive, an array for each sequence and column."""

    name, package = "npz, compressed", "numpy"

    def write(self, folder: Path, rows: Rows) -> None:
        named = zip(NAMES, columns(rows), strict=True)
        arrays: dict[str, Any] = {f"{name}{i}": c[p] for name, c in named for i, p in enumerate(rows.parts())}
        np.savez_compressed(folder / "rows.npz", **arrays)

    def open(self, folder: Path, rows: Rows) -> Opened:
        file = np.load(folder / "rows.npz")
        parts = rows.parts()

        def fill(i: int, start: int, out: Columns) -> None:
            put(out, start, [file[f"{name}{i}"] for name in NAMES])

        return each(fill, parts)


class Hdf5(Store):
    name, package = "HDF5, shuffle + gzip", "h5py"

    def write(self, folder: Path, rows: Rows) -> None:
        import h5py

        with h5py.File(folder / "rows.h5", "w") as file:
            for name, column in zip(NAMES, columns(rows), strict=True):
                chunk = (min(GROUP // 16, len(column)), *column.shape[1:])
                file.create_dataset(name, data=column, chunks=chunk, compression="gzip", shuffle=True, fletcher32=True)

    def open(self, folder: Path, rows: Rows) -> Opened:
        import h5py

        file = h5py.File(folder / "rows.h5", "r")
        parts = rows.parts()

        def read(part: slice, out: Columns) -> None:
            for name, target in zip(NAMES, out, strict=True):
                file[name].read_direct(target, part, slice(0, part.stop - part.start))

        return Opened(lambda out: read(slice(0, len(rows.tokens)), out), lambda i, out: read(parts[i], out))


class Raw(Store):
    """Arrays in memory: what copying them costs, and what they take."""

    name, package = "raw arrays (memcpy)", "numpy"

    def write(self, folder: Path, rows: Rows) -> None:
        for name, column in zip(NAMES, columns(rows), strict=True):
            (folder / f"{name}.bin").write_bytes(column.tobytes())

    def open(self, folder: Path, rows: Rows) -> Opened:
        held = columns(rows)
        parts = rows.parts()
        return Opened(lambda out: put(out, 0, held), lambda i, out: put(out, 0, [c[parts[i]] for c in held]))


STORES: tuple[Store, ...] = (Parquet(), Lmdb(), Safetensors(), HFDatasets(), Npz(), Hdf5(), Raw())


def found(note: Callable[[str], Any]) -> list[Store]:
    """The stores whose packages are installed; a line for each that is not."""
    here = []
    for store in STORES:
        needed = [store.package, *(["zstandard"] if store.package == "lmdb" else [])]
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            note(f"cache: {store.name} skipped, {missing[0]} is not installed")
        else:
            here.append(store)
    return here
