"""Where text comes from: files, folders, JSONL and folders saved by `datasets`.

Every document has a name that depends only on the data (a path relative to the data root, and the line or row
inside it), so that the keys made from it are the same in every run and on every machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
_DATASET_FILES = ("dataset_dict.json", "dataset_info.json")


# what a row of a data set counts as in bytes, where it has not been read
ROW_BYTES = 2048


@dataclass(frozen=True)
class Document:
    """A named text. `size` is its share of `TextSource.size`: bytes for files, 1 for a row of a dataset."""

    name: str
    text: str
    size: int = 0


@dataclass(frozen=True)
class Entry:
    """A document that need not have been read. `num_bytes`: of its text, about; the same whoever asks.

    read: its text, or None where it is not UTF-8.
    """

    name: str
    size: int
    num_bytes: int
    read: Callable[[], str | None]


@dataclass
class TextSource:
    """An iterable of `Document`, in an order that depends only on the data.

    `size` is the total of the documents' sizes when it is known beforehand (for a progress bar), else None;
    `num_bytes` that of `Entry.num_bytes`. `skipped` fills while iterating: names of files that are not UTF-8.
    """

    parts: list[_File | _Rows]
    size: int | None
    num_bytes: int
    skipped: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Document]:
        for entry in self.entries():
            if (text := entry.read()) is not None:
                yield Document(entry.name, text, entry.size)

    def entries(self) -> Iterator[Entry]:
        """The documents by name and size, to be read one by one. Of JSONL a line is in memory, of the rest nothing."""
        self.skipped.clear()
        for part in self.parts:
            yield from part.entries(self.skipped)


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    text_field: str

    @cached_property
    def num_bytes(self) -> int:
        return self.path.stat().st_size

    def entries(self, skipped: list[str]) -> Iterator[Entry]:
        if self.path.suffix == ".jsonl":
            yield from self._lines()
        else:
            yield Entry(self.name, self.num_bytes, self.num_bytes, partial(self._read, skipped))

    def _read(self, skipped: list[str]) -> str | None:
        try:
            return self.path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            skipped.append(self.name)
            return None

    def _lines(self) -> Iterator[Entry]:
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    read = partial(self._text, line, f"{self.path}, line {number}")
                    yield Entry(f"{self.name}:{number}", len(line), len(line), read)

    def _text(self, line: bytes, where: str) -> str:
        try:
            row = json.loads(line)
        except ValueError as e:
            raise ValueError(f"{where}: not JSON ({e}); JSONL needs one JSON object a line") from e
        return _text_of(row, self.text_field, where)


@dataclass(frozen=True)
class _Rows:
    rows: Any  # datasets.Dataset
    name: str
    text_field: str

    @property
    def num_bytes(self) -> int:
        return ROW_BYTES * len(self.rows)

    def entries(self, skipped: list[str]) -> Iterator[Entry]:
        for number in range(len(self.rows)):
            yield Entry(f"{self.name}:{number}", 1, ROW_BYTES, partial(self._text, number))

    def _text(self, number: int) -> str:
        return _text_of(self.rows[number], self.text_field, f"{self.name}, row {number}")


def entries_of(texts: TextSource | Iterable[Document | str]) -> Iterator[Entry]:
    """Entries of a source, of documents, or of plain strings, which are named by their position.

    Raises ValueError for two documents of one name, which only a source rules out by itself.
    """
    if isinstance(texts, TextSource):
        yield from texts.entries()
        return
    if isinstance(texts, str):
        raise TypeError("texts is one string: give a list of texts, documents, or what open_text returns")
    seen: set[str] = set()
    for number, given in enumerate(texts):
        document = Document(f"text-{number}", given) if isinstance(given, str) else given
        if document.name in seen:
            raise _same_name(document.name)
        seen.add(document.name)
        yield Entry(document.name, document.size, len(document.text), partial(_identity, document.text))


def _identity(text: str) -> str:
    return text


def _same_name(name: str) -> ValueError:
    return ValueError(f"two documents are named {name!r}: a name must identify one text")


def _text_of(row: Any, text_field: str, where: str) -> str:
    if not isinstance(row, dict) or text_field not in row:
        have = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: no field {text_field!r} (it has {have}); name the text's field with --text-field")
    text = row[text_field]
    if not isinstance(text, str):
        raise TypeError(f"{where}: field {text_field!r} holds {type(text).__name__}, a string is needed")
    return text


def open_text(
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    text_field: str = "text",
    suffixes: Iterable[str] = SUFFIXES,
) -> TextSource:
    """Opens text files, folders (recursively, by `suffixes`), JSONL files and folders saved by `datasets`.

    A file given by name is read whatever its suffix (`.jsonl` as JSON lines, everything else as UTF-8 text);
    inside a folder hidden entries and `__pycache__` are left out. Names are relative to the data root: the
    folder itself, a file's own folder, or the common parent when several inputs are given.

    Raises FileNotFoundError for a missing input and ValueError where there is no text, no field `text_field`, or
    where two inputs have one name.
    """
    paths = [Path(data)] if isinstance(data, (str, os.PathLike)) else [Path(d) for d in data]
    if not paths:
        raise ValueError("no text was given: name at least one file or folder")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: DATA is a text file, a folder, a .jsonl file or a datasets folder"
            )
    paths = sorted({Path(os.path.abspath(path)) for path in paths})  # whatever the working directory
    wanted = tuple(s if s.startswith(".") else f".{s}" for s in suffixes)
    root = paths[0] if paths[0].is_dir() else paths[0].parent
    if len(paths) > 1:
        root = Path(os.path.commonpath([p.parent for p in paths]))

    parts: list[_File | _Rows] = []
    for path in paths:
        if path.is_dir() and any((path / name).is_file() for name in _DATASET_FILES):
            parts += _dataset_parts(path, text_field)
        elif path.is_dir():
            parts += [_File(p, p.relative_to(root).as_posix(), text_field) for p in _walk(path, wanted)]
        else:
            parts.append(_File(path, path.relative_to(root).as_posix(), text_field))
    if not parts:
        raise ValueError(
            f"no text found in {', '.join(map(str, paths))}: no file ends in {' '.join(wanted)} (see --suffix)"
        )
    names: set[str] = set()
    for part in parts:
        if part.name in names:
            raise _same_name(part.name)
        names.add(part.name)
    total = sum(p.num_bytes for p in parts)
    if all(isinstance(p, _File) for p in parts):
        return TextSource(parts, total, total)
    if all(isinstance(p, _Rows) for p in parts):
        return TextSource(parts, sum(len(p.rows) for p in parts if isinstance(p, _Rows)), total)
    return TextSource(parts, None, total)


def _walk(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    found = []
    for at, folders, files in os.walk(folder):
        folders[:] = [d for d in folders if not d.startswith(".") and d != "__pycache__"]
        found += [Path(at, f) for f in files if f.endswith(suffixes) and not f.startswith(".")]
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


def _dataset_parts(path: Path, text_field: str) -> list[_File | _Rows]:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as e:
        raise ValueError(
            f"{path} was saved by datasets.save_to_disk: install `datasets` to read it (pip install datasets)"
        ) from e
    loaded = load_from_disk(str(path))
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {path.name: loaded}
    for name, rows in splits.items():
        if text_field not in rows.column_names:
            have = ", ".join(map(repr, rows.column_names))
            raise ValueError(
                f"{path}, {name}: no column {text_field!r} (it has {have}); name the text's column with --text-field"
            )
    return [_Rows(rows.select_columns([text_field]), name, text_field) for name, rows in splits.items()]
