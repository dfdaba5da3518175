"""The demo's text: excerpts of the Python standard library's sources and of its documentation topics."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

from potstill.capture.text import Document

EXCERPT = 1600  # characters taken from the beginning of each document
_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "__pycache__",
}


def standard_library() -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, shuffled by a hash of their names; every eighth is held out.

    Sources are named by their path under the standard library, topics `topics/NAME`. Raises FileNotFoundError
    where Python was installed without its sources.
    """
    documents = [*_sources(Path(sysconfig.get_paths()["stdlib"])), *_topics()]
    if len(documents) < 100:
        raise FileNotFoundError("this Python has no standard library sources to read; run the demo with one that has")
    documents.sort(key=lambda d: _shuffled(d.name))
    held_out = [d for d in documents if _shuffled(d.name) % 8 == 0]
    return [d for d in documents if _shuffled(d.name) % 8 != 0], held_out


def _shuffled(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _sources(root: Path) -> list[Document]:
    found = []
    for at, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _LEFT_OUT and not f.startswith("config-")]
        for name in files:
            path = Path(at, name)
            if path.suffix == ".py" and path.stat().st_size >= EXCERPT:
                text = path.read_text(encoding="utf-8", errors="ignore")[:EXCERPT]
                found.append(Document(path.relative_to(root).as_posix(), text, len(text)))
    return found


def _topics() -> list[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return []
    texts = {name: text[:EXCERPT] for name, text in topics.items() if len(text) >= EXCERPT // 2}
    return [Document(f"topics/{name}", text, len(text)) for name, text in texts.items()]
