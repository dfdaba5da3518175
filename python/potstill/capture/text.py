"""Where text comes from: files, folders, JSONL and folders saved by `datasets`.

Every document has a name that depends only on the data (a path relative to the data root, and the line or row
inside it), so that the keys made from it are the same in every run and on every machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
_DATASET_FILES = ("dataset_dict.json", "dataset_info.json")


@dataclass(frozen=True)
class Document:
    """A named text. `size` is its share of `TextSource.size`: bytes for files, 1 for a row of a dataset."""

    name: str
    text: str
    size: int = 0


@dataclass
class TextSource:
    """An iterable of `Document`, in an order that depends only on the data.

    `size` is the total of the documents' sizes when it is known beforehand (for a progress bar), else None.
    `skipped` fills while iterating: names of files that are not UTF-8.
    """

    parts: list[_File | _Rows]
    size: int | None
    skipped: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Document]:
        self.skipped.clear()
        for part in self.parts:
            yield from part.documents(self.skipped)


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    text_field: str

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        if self.path.suffix == ".jsonl":
            yield from self._lines()
            return
        data = self.path.read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            skipped.append(self.name)
            return
        yield Document(self.name, text, len(data))

    def _lines(self) -> Iterator[Document]:
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as e:
                    raise ValueError(
                        f"{self.path}, line {number}: not JSON ({e}); JSONL needs one JSON object a line"
                    ) from e
                where = f"{self.path}, line {number}"
                yield Document(f"{self.name}:{number}", _text_of(row, self.text_field, where), len(line))


@dataclass(frozen=True)
class _Rows:
    rows: Any  # datasets.Dataset
    name: str
    text_field: str

    def documents(self, skipped: list[str]) -> Iterator[Document]:
        for number, row in enumerate(self.rows):
            where = f"{self.name}, row {number}"
            yield Document(f"{self.name}:{number}", _text_of(row, self.text_field, where), 1)


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

    Raises FileNotFoundError for a missing input and ValueError where there is no text or no field
    `text_field`.
    """
    paths = [Path(data)] if isinstance(data, (str, os.PathLike)) else [Path(d) for d in data]
    if not paths:
        raise ValueError("no text was given: name at least one file or folder")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: DATA is a text file, a folder, a .jsonl file or a datasets folder"
            )
    wanted = tuple(s if s.startswith(".") else f".{s}" for s in suffixes)
    root = paths[0] if paths[0].is_dir() else paths[0].parent
    if len(paths) > 1:
        root = Path(os.path.commonpath([p.absolute().parent for p in paths]))

    parts: list[_File | _Rows] = []
    for path in sorted(set(paths)):
        if path.is_dir() and any((path / name).is_file() for name in _DATASET_FILES):
            parts += _dataset_parts(path, text_field)
        elif path.is_dir():
            parts += [_File(p, _relative(p, root), text_field) for p in _walk(path, wanted)]
        else:
            parts.append(_File(path, _relative(path, root), text_field))
    if not parts:
        raise ValueError(
            f"no text found in {', '.join(map(str, paths))}: no file ends in {' '.join(wanted)} (see --suffix)"
        )
    if all(isinstance(p, _File) for p in parts):
        return TextSource(parts, sum(p.path.stat().st_size for p in parts if isinstance(p, _File)))
    if all(isinstance(p, _Rows) for p in parts):
        return TextSource(parts, sum(len(p.rows) for p in parts if isinstance(p, _Rows)))
    return TextSource(parts, None)


def _relative(path: Path, root: Path) -> str:
    if not path.is_relative_to(root):
        path = path.absolute()
    return path.relative_to(root if path.is_relative_to(root) else root.absolute()).as_posix()


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
