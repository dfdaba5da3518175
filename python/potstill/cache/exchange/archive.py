"""A tar with one npz for each sequence, as loaders of sharded archives take them: members are read in order, nothing is
extracted, no pickle is loaded, and sizes are checked before memory is taken. `spec.json` comes first."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.exchange.layouts import floats, integers
from potstill.cache.exchange.sequence import Sequence, of_columns, rest_of, spec_of
from potstill.cache.spec import Spec

SPEC = "spec.json"
LARGEST = 1 << 30  # bytes of a member, and of what it unpacks to


def write(path: Path, spec: Spec, sequences: Iterator[Sequence], layout: str) -> None:
    with tarfile.open(path, "w") as tar:
        add(tar, SPEC, spec.to_json().encode())
        for number, s in enumerate(sequences):
            data = io.BytesIO()
            columns: dict[str, Any] = {"tokens": s.tokens, **s.per_entry(), **s.per_row()}
            np.savez(data, key=np.frombuffer(s.key.encode(), np.uint8), **columns)
            add(tar, f"{number:08d}.npz", data.getvalue())


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time and no owner: equal caches give equal archives
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def read(path: Path, layout: str) -> tuple[Spec | None, Iterator[Sequence]]:
    """Arrays that must be there: tokens [L], ids and log_probs [L, K]. Without key the member's name is the key;
    without log_rest it is what the entries leave."""
    with opened(path) as tar:
        first = tar.next()
        spec = None
        if first is not None and first.name == SPEC:
            spec = spec_of(content(tar, first, path), path)

    def stream() -> Iterator[Sequence]:
        with opened(path) as tar:
            try:
                for member in tar:
                    if member.name == SPEC or not member.isfile():
                        continue
                    if not member.name.endswith(".npz"):
                        raise ValueError(f"{path}: member {member.name!r}; *.npz and {SPEC} are accepted")
                    yield of_arrays(arrays(content(tar, member, path), f"{path}, {member.name}"), member.name)
                    tar.members = []  # type: ignore[attr-defined]  # or the list of members grows with the archive
            except tarfile.TarError as error:
                raise ValueError(f"{path} cannot be read: {error}") from None

    return spec, stream()


def opened(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:")
    except tarfile.TarError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def content(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    if member.size > LARGEST:
        raise ValueError(f"{path}: member {member.name!r} has {member.size} bytes, at most {LARGEST} are accepted")
    file = tar.extractfile(member)
    data = file.read() if file is not None else b""
    if len(data) != member.size:
        raise ValueError(f"{path}: member {member.name!r} ends early")
    return data


def arrays(data: bytes, where: str) -> dict[str, NDArray[Any]]:
    """The arrays of an npz. Shapes are held against the bytes that are there before anything is allocated."""
    found = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(info.file_size for info in archive.infolist()) > LARGEST:
                raise ValueError(f"it unpacks to more than {LARGEST} bytes")
            for info in archive.infolist():
                with archive.open(info) as file:
                    raw = file.read(info.file_size + 1)
                found[info.filename.removesuffix(".npy")] = array(raw)
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, OSError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from None
    return found


def array(raw: bytes) -> NDArray[Any]:
    """An array of numbers out of the bytes of an npy file."""
    file = io.BytesIO(raw)
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(
        version
    )
    if read_header is None:
        raise ValueError(f"npy version {version}")
    shape, by_column, dtype = read_header(file)
    count = int(np.prod([int(n) for n in shape], dtype=object)) if shape else 1
    if dtype.kind not in "iuf" or by_column and len(shape) > 1:
        raise ValueError(f"an array of {dtype}{' by columns' * by_column}; numbers by rows are accepted")
    if count * dtype.itemsize != len(raw) - file.tell() or min(shape, default=0) < 0:
        raise ValueError(f"an array of shape {shape} in {len(raw) - file.tell()} bytes")
    return np.frombuffer(raw, dtype, count, file.tell()).reshape(shape)


def of_arrays(found: dict[str, NDArray[Any]], name: str) -> Sequence:
    missing = [n for n in ("tokens", "ids", "log_probs") if n not in found]
    if missing:
        raise ValueError(f"{name} has no array {', '.join(missing)} (it has {', '.join(found) or 'none'})")
    key = found.pop("key", None)
    try:
        text = name.removesuffix(".npz") if key is None else key.astype(np.uint8).tobytes().decode()
    except UnicodeDecodeError:
        raise ValueError(f"{name}: the key is not UTF-8") from None
    columns: dict[str, NDArray[Any]] = {}
    for column, values in found.items():
        take = integers if column in ("tokens", "ids", "counts") else floats
        if values.ndim != (2 if column in ("ids", "log_probs", "counts") else 1):
            raise ValueError(f"sequence {text!r}: {column} has shape {values.shape}")
        columns[column] = take(values.reshape(-1), f"sequence {text!r}: {column}").reshape(values.shape)
    if columns["ids"].shape != columns["log_probs"].shape:
        shapes = columns["ids"].shape, columns["log_probs"].shape
        raise ValueError(f"sequence {text!r}: ids {shapes[0]} and log_probs {shapes[1]} differ in shape")
    if "log_rest" not in columns:
        columns["log_rest"] = rest_of(columns["log_probs"])
    return of_columns(text, columns.pop("tokens"), columns)
