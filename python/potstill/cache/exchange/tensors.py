"""One safetensors file: tokens [N], ids and log_probs [N, K], log_rest [N] and the cache's further columns, rows of all
sequences one behind the other; sequence_starts [B + 1], and keys as bytes with their ends [B]. Exact. Written and read
a sequence at a time; the format is https://github.com/huggingface/safetensors#format (a length, a JSON header, data).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.exchange.sequence import Sequence, entry_columns, of_columns, row_columns, spec_of
from potstill.cache.spec import Spec

HEADER = 100 << 20
TYPES = {"I32": "<i4", "I64": "<i8", "F32": "<f4", "U8": "u1", "F16": "<f2"}
INTEGER_COLUMNS = ("tokens", "ids", "counts")


def write(path: Path, spec: Spec, sequences: Iterator[Sequence], layout: str, *, lengths: dict[str, int]) -> None:
    """lengths: tokens of each sequence, in the order in which they come."""
    n = sum(lengths.values())
    keys = [key.encode() for key in lengths]
    index: dict[str, NDArray[Any]] = {
        "sequence_starts": np.cumsum([0, *lengths.values()]).astype("<i8"),
        "key_ends": np.cumsum([len(k) for k in keys]).astype("<i8"),
        "keys": np.frombuffer(b"".join(keys), np.uint8),
    }
    shapes: dict[str, tuple[str, list[int]]] = {name: ("I64", [len(a)]) for name, a in index.items() if name != "keys"}
    shapes |= {"tokens": ("I32", [n])}
    for name in entry_columns(spec):
        shapes[name] = ("F32" if name == "log_probs" else "I32", [n, spec.k])
    shapes |= {name: ("F32", [n]) for name in row_columns(spec)}
    shapes["keys"] = ("U8", [len(index["keys"])])  # last: its length need not be a multiple of 4
    header: dict[str, Any] = {"__metadata__": {"potstill": spec.to_json()}}
    at, places = 0, {}
    for name, (kind, shape) in shapes.items():
        size = int(np.prod(shape)) * np.dtype(TYPES[kind]).itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        places[name] = at
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + at)

        def put(name: str, values: NDArray[Any]) -> None:
            file.seek(start + places[name])
            data = np.ascontiguousarray(values, TYPES[shapes[name][0]]).tobytes()
            file.write(data)
            places[name] += len(data)

        for name, values in index.items():
            put(name, values)
        for s in sequences:
            for name, column in {"tokens": s.tokens, **s.per_entry(), **s.per_row()}.items():
                put(name, column)


class Tensors:
    """The tensors of a file, read by ranges of rows. Raises ValueError for a header that its bytes do not bear out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(HEADER, size - 8):
                raise ValueError(f"{path}: a header of {length} bytes in a file of {size}")
            text = file.read(length)
        self.start = 8 + length
        try:
            header = json.loads(text)
            self.metadata = header.pop("__metadata__", {})
            self.places: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]] = {}
            for name, entry in header.items():
                first, end = map(int, entry["data_offsets"])
                shape = tuple(map(int, entry["shape"]))
                if entry["dtype"] not in TYPES:
                    raise ValueError(f"{name} is {entry['dtype']}; {', '.join(TYPES)} are accepted")
                dtype = np.dtype(TYPES[entry["dtype"]])
                wanted = dtype.itemsize * int(np.prod(shape, dtype=object)) if shape else dtype.itemsize
                if min(shape, default=0) < 0 or not 0 <= first <= end <= size - self.start or end - first != wanted:
                    raise ValueError(f"{name} of shape {list(shape)} does not fit bytes {first} to {end}")
                self.places[name] = dtype, shape, first
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not a safetensors header: {error}") from None

    def rows(self, file: IO[bytes], name: str, first: int, end: int) -> NDArray[Any]:
        dtype, shape, at = self.places[name]
        width = int(np.prod(shape[1:]))
        file.seek(self.start + at + first * width * dtype.itemsize)
        data = file.read((end - first) * width * dtype.itemsize)
        return np.frombuffer(data, dtype).reshape(end - first, *shape[1:])


def read(path: Path, layout: str) -> tuple[Spec | None, Iterator[Sequence]]:
    tensors = Tensors(path)
    missing = [n for n in ("tokens", "ids", "log_probs", "log_rest", "sequence_starts") if n not in tensors.places]
    if missing:
        raise ValueError(f"{path} has no tensor {', '.join(missing)} (it has {', '.join(tensors.places) or 'none'})")
    text = tensors.metadata.get("potstill")
    return None if text is None else spec_of(text, path), stream(tensors)


def stream(tensors: Tensors) -> Iterator[Sequence]:
    path, places = tensors.path, tensors.places
    columns = [name for name in places if name not in ("sequence_starts", "keys", "key_ends")]
    for name in columns:
        dtype, shape, _ = places[name]
        wide = 2 if name in ("ids", "log_probs", "counts") else 1
        if len(shape) != wide or (dtype.kind == "i") != (name in INTEGER_COLUMNS) or dtype.kind == "u":
            raise ValueError(f"{path}: {name} is {dtype} of shape {list(shape)}")
        if shape[0] != places["tokens"][1][0]:
            raise ValueError(f"{path}: {shape[0]} rows of {name} for {places['tokens'][1][0]} tokens")
    if places["ids"][1] != places["log_probs"][1]:
        raise ValueError(f"{path}: ids {places['ids'][1]} and log_probs {places['log_probs'][1]} differ in shape")
    with open(path, "rb") as file:
        starts = whole(tensors, file, "sequence_starts")
        keys = whole(tensors, file, "keys").tobytes() if "keys" in places else b""
        ends = whole(tensors, file, "key_ends").tolist() if "key_ends" in places else []
        rising = len(starts) > 0 and starts[0] == 0 and (np.diff(starts) > 0).all()
        if not rising or starts[-1] != places["tokens"][1][0]:
            raise ValueError(f"{path}: sequence_starts does not rise from 0 to the {places['tokens'][1][0]} tokens")
        if ends and (len(ends) != len(starts) - 1 or sorted(ends) != ends or ends[-1] != len(keys)):
            raise ValueError(f"{path}: key_ends does not cut the {len(keys)} bytes of keys into {len(starts) - 1}")
        for i, (first, end) in enumerate(zip(starts.tolist(), starts[1:].tolist(), strict=False)):
            try:
                key = keys[ends[i - 1] if i else 0 : ends[i]].decode() if ends else f"{i:08d}"
            except UnicodeDecodeError:
                raise ValueError(f"{path}: the key of sequence {i} is not UTF-8") from None
            found = {name: tensors.rows(file, name, first, end) for name in columns}
            found = {n: a.astype(np.int32 if n in INTEGER_COLUMNS else np.float32) for n, a in found.items()}
            yield of_columns(key, found.pop("tokens"), found)


def whole(tensors: Tensors, file: IO[bytes], name: str) -> NDArray[Any]:
    dtype, shape, _ = tensors.places[name]
    if len(shape) != 1 or dtype.kind not in "iu":
        raise ValueError(f"{tensors.path}: {name} is {dtype} of shape {list(shape)}, a list of integers is accepted")
    return tensors.rows(file, name, 0, shape[0])
