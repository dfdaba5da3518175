"""A cache in an object store: s3://, gs://, az://, http:// and https:// through obstore (extra `remote`).

Opening fetches manifest, records, and header and index of every shard; reading fetches the blocks of the wanted
sequences, many ranges at a time, into sparse files of a local folder. The Rust reader then reads those files as it
reads any cache, so every byte from the network is held against its checksum. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from potstill import _rust
from potstill.cache.reader import Cache
from potstill.cache.spec import Spec
from potstill.cache.tools import Report, verify_cache

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "http", "https")
NAME = re.compile(r"[0-9a-f]{32}")
HEADER, TRAILER = 4096, 32
LARGEST = {"manifest": 256 << 20, "record": 2 << 20, "footer": 1 << 30, "shard": 1 << 46}
PIECE = 4 << 20  # bytes of one request
GAP = 64 << 10  # ranges nearer than this are one request
ATTEMPTS = 4  # of a request that answers with too few bytes; errors and 5xx are tried again by obstore

Range = tuple[int, int]


def is_url(path: object) -> bool:
    return isinstance(path, str) and re.match(r"[a-z0-9]+://", path) is not None


def connect(url: str, options: dict[str, Any] | None = None) -> Any:
    """obstore's store for a URL. options go to `obstore.store.from_url` and replace what is set here."""
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        raise ValueError(f"{url}: {scheme}:// is not known; {', '.join(SCHEMES)} and file are accepted")
    try:
        from obstore.store import from_url
    except ImportError:
        raise ImportError(f"{url} needs obstore: pip install 'potstill[remote]'", name="obstore") from None
    given = dict(options or {})
    client: dict[str, Any] = {"timeout": timedelta(seconds=30), "connect_timeout": timedelta(seconds=5)}
    if scheme == "http":
        client["allow_http"] = True
    retry = {"max_retries": 5, "retry_timeout": timedelta(seconds=120)}
    given["client_options"] = {**client, **given.get("client_options", {})}
    given["retry_config"] = {**retry, **given.get("retry_config", {})}
    try:
        return from_url(url, **given)
    except Exception as error:
        raise ValueError(f"{url} cannot be opened: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


class Bucket:
    """The objects under a URL: small ones whole, large ones by range, never more bytes than were asked for."""

    def __init__(self, url: str, options: dict[str, Any] | None) -> None:
        self.url, self.store = url.rstrip("/"), connect(url, options)

    def small(self, path: str, kind: str) -> bytes | None:
        """A whole object, None where there is none. Raises OSError for what the store refuses or cannot do."""
        import obstore

        for attempt in range(ATTEMPTS):
            try:
                found = obstore.get(self.store, path)
                size = int(found.meta["size"])
                if size > LARGEST[kind]:
                    raise ValueError(f"{self.url}/{path} has {size} bytes, at most {LARGEST[kind]} are accepted")
                data = bytes(found.bytes())
                if len(data) == size:
                    return data
                problem = f"{len(data)} bytes of {size}"
            except (FileNotFoundError, obstore.exceptions.NotFoundError):
                return None
            except obstore.exceptions.BaseError as error:
                if attempt + 1 == ATTEMPTS:
                    raise OSError(f"{self.url}/{path}: {first_line(error)}") from None
                problem = first_line(error)
        raise OSError(f"{self.url}/{path}: {problem}, {ATTEMPTS} times")

    def range(self, path: str, start: int, end: int) -> bytes:
        """Bytes start to end of an object. Raises OSError when the store does not give them."""
        import obstore

        problem = ""
        for _ in range(ATTEMPTS):
            try:
                data = bytes(obstore.get_range(self.store, path, start=start, end=end))
                if len(data) == end - start:
                    return data
                problem = f"{len(data)} bytes where {end - start} were asked for"
            except (FileNotFoundError, obstore.exceptions.BaseError) as error:
                problem = first_line(error)
                if isinstance(error, (FileNotFoundError, obstore.exceptions.PermissionDeniedError)):
                    break
        raise OSError(f"{self.url}/{path}, bytes {start} to {end}: {problem}")


class Mirror:
    """Sparse copies of shards in a local folder, and which of their bytes are there."""

    def __init__(self, bucket: Bucket, root: Path, requests: int) -> None:
        self.bucket, self.root, self.requests = bucket, root, requests
        self.here: dict[str, list[Range]] = {}
        self.shards: dict[str, int] = {}  # bytes of those that manifest and records name
        self.opened: set[str] = set()
        self.ends: dict[str, Range] = {}  # index and trailer of those
        self.next = 0  # number of the first record that is not here
        self.lock = threading.Lock()
        self.pool: ThreadPoolExecutor | None = None
        self.process = os.getpid()
        self.pending: dict[tuple[str, int, int], Future[None]] = {}
        for name in ("log", "shards"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def refresh(self) -> None:
        """Fetches the manifest (once), the records that are not here yet, and header and index of new shards."""
        if self.next == 0 and (data := self.bucket.small("manifest.json", "manifest")) is not None:
            with self._understood("manifest.json"):
                body = json.loads(data)["body"]
                self.shards = {str(s["name"]): int(s["bytes"]) for s in body["shards"]}
                self.next = int(body["log"])
            (self.root / "manifest.json").write_bytes(data)
        while (data := self.bucket.small(f"log/{self.next:010d}.json", "record")) is not None:
            with self._understood(f"log/{self.next:010d}.json"):
                body = json.loads(data)["body"]
                if body["kind"] == "shard":
                    self.shards[str(body["name"])] = int(body["bytes"])
                elif body["kind"] == "drop":
                    self.shards.pop(str(body["name"]), None)
            (self.root / "log" / f"{self.next:010d}.json").write_bytes(data)
            self.next += 1
        if self.next == 0:
            raise _rust.CacheError(f"{self.bucket.url}: there is no cache here (no manifest.json and no log)")
        for name, size in self.shards.items():
            if NAME.fullmatch(name) is None or not TRAILER < size <= LARGEST["shard"]:
                raise _rust.CacheError(f"{self.bucket.url}: a shard {name!r} of {size} bytes is named")
        new = {name: size for name, size in self.shards.items() if name not in self.opened}
        with ThreadPoolExecutor(self.requests) as pool:
            list(pool.map(self._open, new.items()))

    @contextmanager
    def _understood(self, file: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise _rust.CacheError(f"{self.bucket.url}/{file} cannot be read: {first_line(error)}") from None

    def _open(self, shard: tuple[str, int]) -> None:
        name, size = shard
        path = self.path(name)
        marks = path.with_suffix(".ranges")
        if path.is_file() and path.stat().st_size == size and marks.is_file():
            kept = [line.split() for line in marks.read_text().splitlines()]
            self.here[name] = [(int(a), int(b)) for a, b in (k for k in kept if len(k) == 2)]
        else:
            path.unlink(missing_ok=True)
            marks.unlink(missing_ok=True)
            self.here[name] = []
            with open(path, "wb") as file:
                file.truncate(size)
        self.get(name, 0, min(HEADER, size))
        self.get(name, size - TRAILER, size)
        with open(path, "rb") as file:
            file.seek(size - TRAILER)
            footer = int.from_bytes(file.read(8), "little")
        if footer > min(LARGEST["footer"], size - TRAILER):
            raise _rust.CacheError(f"{name}.shard, trailer: a footer of {footer} bytes in a file of {size}")
        self.get(name, size - TRAILER - footer, size - TRAILER)
        self.ends[name] = (size - TRAILER - footer, size)
        self.opened.add(name)

    def index(self, read: Callable[[], _rust.Cache]) -> _rust.Cache:
        """What `read` makes of headers and indexes. Should it refuse, they and the records are fetched once more."""
        for attempt in range(2):
            shards, opened, number = dict(self.shards), set(self.opened), self.next
            try:
                self.refresh()
                return read()
            except _rust.CacheError:
                for name in self.opened - opened:
                    self.forget(name, [(0, HEADER), self.ends[name]])
                self.shards, self.opened, self.next = shards, opened, number
                if attempt:
                    raise
        raise AssertionError("two attempts")

    def path(self, name: str) -> Path:
        return self.root / "shards" / f"{name}.shard"

    def missing(self, name: str, start: int, end: int) -> list[Range]:
        """What is not there of bytes start to end."""
        with self.lock:
            kept = sorted(self.here[name])
        holes = []
        for a, b in kept:
            if b <= start or a >= end:
                continue
            if a > start:
                holes.append((start, a))
            start = max(start, b)
        return [*holes, (start, end)] if start < end else holes

    def get(self, name: str, start: int, end: int) -> None:
        """Fetches bytes of a shard that are not there yet."""
        for a, b in self.missing(name, start, end):
            data = self.bucket.range(f"shards/{name}.shard", a, b)
            with open(self.path(name), "r+b") as file:
                file.seek(a)
                file.write(data)
            with open(self.path(name).with_suffix(".ranges"), "a") as marks:
                marks.write(f"{a} {b}\n")
            with self.lock:
                self.here[name].append((a, b))

    def forget(self, name: str, wanted: Iterable[Range]) -> None:
        """The bytes turned out to be wrong: a torn local file, or an answer that lied."""
        with self.lock:
            for start, end in wanted:
                kept = [((a, min(b, start)), (max(a, end), b)) for a, b in self.here[name]]
                self.here[name] = [r for pair in kept for r in pair if r[0] < r[1]]
            self.path(name).with_suffix(".ranges").write_text("".join(f"{a} {b}\n" for a, b in self.here[name]))

    def start(self, wanted: dict[str, list[Range]]) -> list[Future[None]]:
        """Requests for what is missing, running in the background; those that run already are joined."""
        pieces = []
        for name, ranges in wanted.items():
            for start, end in joined([hole for r in ranges for hole in self.missing(name, *r)]):
                pieces += [(name, a, min(a + PIECE, end)) for a in range(start, end, PIECE)]
        if pieces and self.process != os.getpid():
            raise RuntimeError(
                f"{self.bucket.url} was opened in process {self.process}, whose connections a forked process has not; "
                "open it in the worker (start method spawn or forkserver), or fetch the sequences before"
            )
        with self.lock:
            self.pool = self.pool or ThreadPoolExecutor(self.requests, thread_name_prefix="potstill-remote")
            futures = []
            for piece in pieces:
                running = self.pending.get(piece)
                if running is None or running.done():
                    running = self.pending[piece] = self.pool.submit(self.get, *piece)
                futures.append(running)
            self.pending = {p: f for p, f in self.pending.items() if not f.done()}
        return futures


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Ranges in order, near ones as one."""
    out: list[Range] = []
    for a, b in sorted(ranges):
        if out and a - out[-1][1] <= GAP:
            out[-1] = (out[-1][0], max(out[-1][1], b))
        else:
            out.append((a, b))
    return out


class Fetching:
    """The Rust reader of a mirror: what is to be read is fetched first."""

    def __init__(self, rust: _rust.Cache, mirror: Mirror, read_ahead: int) -> None:
        self._rust, self._mirror, self._read_ahead = rust, mirror, read_ahead
        self._order = {key: i for i, key in enumerate(rust.keys())}
        self._keys = list(self._order)
        self._last = -1

    def __len__(self) -> int:
        return len(self._rust)

    def __contains__(self, key: str) -> bool:
        return key in self._rust

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._rust, name)
        if not name.startswith("read"):
            return found

        def read(*arguments: Any, **named: Any) -> Any:
            keys = next(a for a in arguments if isinstance(a, (str, list)))  # the first of them is key or keys
            wanted = [keys] if isinstance(keys, str) else keys
            self.fetch(wanted)
            try:
                return found(*arguments, **named)
            except _rust.CacheError:  # fetch once more: a bad disk or a bad answer, or the store itself is damaged
                for shard, ranges in self.places(wanted).items():
                    self._mirror.forget(shard, ranges)
                self.fetch(wanted)
                return found(*arguments, **named)

        return read

    def places(self, keys: Iterable[str]) -> dict[str, list[Range]]:
        wanted: dict[str, list[Range]] = {}
        for key in keys:
            name, ranges = self._rust.ranges(key)
            wanted.setdefault(name, []).extend(ranges)
        return wanted

    def start(self, keys: Iterable[str]) -> list[Future[None]]:
        return self._mirror.start(self.places(keys))

    def fetch(self, keys: list[str]) -> None:
        futures = self.start(keys)
        order = sorted(self._order[key] for key in keys if key in self._order)
        if order and order[0] == self._last + 1 and self._read_ahead:
            self._ahead(order[-1])
        self._last = order[-1] if order else self._last
        for future in futures:
            future.result()

    def _ahead(self, last: int) -> None:
        size, end = 0, last + 1
        while end < len(self._keys) and size < self._read_ahead:
            size += sum(b - a for a, b in self._rust.ranges(self._keys[end])[1])
            end += 1
        self.start(self._keys[last + 1 : end])


class RemoteCache(Cache):
    """A cache at a URL; made by `potstill.cache.open`. Safe to share between threads and with spawned workers."""

    def __init__(
        self,
        url: str,
        *,
        folder: str | os.PathLike[str] | None = None,
        options: dict[str, Any] | None = None,
        requests: int = 16,
        read_ahead: int = 8 << 20,
    ) -> None:
        self.path, self._arguments = url, dict(folder=folder, options=options, requests=requests, read_ahead=read_ahead)
        if folder is None:
            temporary = tempfile.TemporaryDirectory(prefix="potstill-remote-", ignore_cleanup_errors=True)
            self._close: Callable[[], Any] = weakref.finalize(self, temporary.cleanup)
            root = Path(temporary.name)
        else:
            root = Path(folder) / hashlib.sha256(url.encode()).hexdigest()[:32]
        mirror = Mirror(Bucket(url, options), root, max(requests, 1))
        self._fetching = Fetching(mirror.index(lambda: _rust.Cache(str(root))), mirror, read_ahead)
        self._rust = self._fetching  # type: ignore[assignment]
        self._by_hash = None
        self.spec = Spec.stored(self._rust.spec, url)

    def __reduce__(self) -> Any:
        return _open, (self.path, self._arguments)

    def refresh(self) -> int:
        """Takes in what was pushed since the cache was opened, fetching new records and shards alone; the number of new
        sequences. Damage raises CacheError and leaves the view as it was."""
        before, old = len(self), self._fetching
        self._fetching = Fetching(old._mirror.index(old._rust.refreshed), old._mirror, old._read_ahead)
        self._rust, self._by_hash = self._fetching, None  # type: ignore[assignment]
        return len(self) - before

    def verify(self) -> Report:
        """Fetches every byte and checks every row; raises nothing for damage, OSError for what the store refuses."""
        mirror = self._fetching._mirror
        for future in mirror.start({name: [(0, mirror.shards[name])] for name in mirror.opened & mirror.shards.keys()}):
            future.result()
        return verify_cache(mirror.root)

    def prefetch(self, keys: Iterable[str]) -> None:
        """Starts to fetch sequences in the background. Raises KeyError; what the store refuses, the read raises."""
        self._fetching.start(keys)


def _open(url: str, given: dict[str, Any]) -> RemoteCache:
    return RemoteCache(url, **given)


def local_path(url: str) -> str | None:
    """The path of a file:// URL, None of another."""
    parts = urlsplit(url)
    return unquote(parts.path) if parts.scheme == "file" else None


def push(path: str | os.PathLike[str], url: str, options: dict[str, Any] | None = None) -> dict[str, int]:
    """Uploads a finished cache: shards, then records, each put if absent, the manifest last. A cache that grew is
    pushed again; what is there already stays. Returns {"shards", "records", "bytes"} that were sent.

    Raises CacheError when another cache is at `url`, OSError for what the store refuses; readers of `url` see the old
    cache until the first new record is there.
    """
    import obstore

    Cache(path)  # refuses what is no cache, or damaged
    bucket, root = Bucket(url, options), Path(path)
    sent = {"shards": 0, "records": 0, "bytes": 0}

    def put(file: Path, kind: str) -> bool:
        try:
            obstore.put(bucket.store, f"{file.parent.name}/{file.name}", file, mode="create", use_multipart=False)
        except (FileExistsError, obstore.exceptions.AlreadyExistsError):
            return False
        except obstore.exceptions.BaseError as error:
            raise OSError(f"{bucket.url}/{file.parent.name}/{file.name}: {first_line(error)}") from None
        sent[kind] += 1
        sent["bytes"] += file.stat().st_size
        return True

    records = sorted(f for f in (root / "log").iterdir() if re.fullmatch(r"\d{10}\.json", f.name))
    first = bucket.small(f"log/{records[0].name}", "record")
    if first is not None and first != records[0].read_bytes():
        raise _rust.CacheError(f"{bucket.url} holds another cache: its spec differs; give another URL")
    for file in sorted((root / "shards").iterdir()):
        if re.fullmatch(r"[0-9a-f]{32}\.shard", file.name):
            put(file, "shards")
    for file in records:
        if not put(file, "records") and bucket.small(f"log/{file.name}", "record") != file.read_bytes():
            raise _rust.CacheError(f"{bucket.url}: log/{file.name} was written by another; give another URL")
    manifest = root / "manifest.json"
    if manifest.is_file():
        obstore.put(bucket.store, "manifest.json", manifest)
    return sent
