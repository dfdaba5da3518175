"""Caches in object stores: a real S3-compatible server, and an HTTP server that fails as networks do."""

from __future__ import annotations

import http.server
import pickle
import re
import shutil
import threading
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from potstill import cache

pytest.importorskip("obstore", reason="object stores need the extra [remote]")
from potstill.cache import remote

BACKOFF = {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=20), "base": 2}
RETRY = {"max_retries": 3, "backoff": BACKOFF}


@pytest.fixture(scope="module")
def local(tmp_path_factory, dense_lab) -> Path:
    """Three shards, one of a long sequence."""
    path = tmp_path_factory.mktemp("local") / "c"
    dense_lab.write(path, {"a": 30, "long": 3000, "b": 7}, flush=True)
    return path


def same(store: cache.Cache, path: Path) -> None:
    want = cache.open(path)
    assert store.keys() == want.keys() and store.spec == want.spec and store.num_tokens == want.num_tokens
    for key in want.keys():
        for got, column in zip(store.numpy(key), want.numpy(key), strict=True):
            np.testing.assert_array_equal(got, column)


class Handler(http.server.BaseHTTPRequestHandler):
    """GET with ranges under server.root. server.trouble says what goes wrong: a status, "short", "hang", "flip"."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.seen[self.path] += 1
            server.bytes.append((self.path, self.headers.get("Range")))
            trouble = server.trouble(self.path, server.seen[self.path], self.headers.get("Range"))
        file = server.root / self.path.lstrip("/")
        if trouble == "hang":
            server.hanging.wait(20)
            self.close_connection = True
            return
        if isinstance(trouble, int) or not file.is_file():
            self.send_response(trouble if isinstance(trouble, int) else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        whole = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = data[int(whole[1]) : int(whole[2]) + 1] if whole else data
        self.send_response(206 if whole else 200)
        if whole:
            self.send_header("Content-Range", f"bytes {whole[1]}-{int(whole[1]) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        if trouble == "short":
            part, self.close_connection = part[: len(part) // 2], True
        if trouble == "flip":
            part = bytes([*part[:-9], part[-9] ^ 1, *part[-8:]])
        self.wfile.write(part)
        if trouble == "short":
            self.wfile.flush()


@pytest.fixture
def web(local):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root, server.lock, server.seen, server.bytes = local, threading.Lock(), Counter(), []
    server.trouble, server.hanging = lambda path, attempt, wanted: None, threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.hanging.set()
    server.shutdown()
    thread.join()
    server.server_close()


OPTIONS = {"retry_config": RETRY}


def test_over_http_only_what_is_read_is_fetched(web, local):
    store = cache.open(web.url, options=OPTIONS, read_ahead=0)
    before = len(web.bytes)
    tokens, *_ = store.numpy("long")
    assert tokens.tolist() == cache.open(local).numpy("long")[0].tolist()
    assert {path for path, _ in web.bytes[before:]} == {f"/shards/{store._rust.ranges('long')[0]}.shard"}
    count = len(web.bytes)
    store.numpy("long")
    store.batch(["long", "long"])
    assert len(web.bytes) == count  # from the local copy
    same(store, local)
    assert store.verify().ok
    with pytest.raises(KeyError):
        store.numpy("nobody")
    with pytest.raises(cache.TokenMismatch):
        store.batch(["a"], tokens=[[1, 2, 3]])
    same(pickle.loads(pickle.dumps(store)), local)


def test_read_ahead_and_prefetch_bring_what_comes_next(web, local):
    store = cache.open(web.url, options=OPTIONS)
    store.numpy("a")
    for future in list(store._fetching._mirror.pending.values()):
        future.result()
    count = len(web.bytes)
    store.numpy("long")
    assert len(web.bytes) == count
    other = cache.open(web.url, options=OPTIONS, read_ahead=0)
    other.prefetch(["long"])
    for future in list(other._fetching._mirror.pending.values()):
        future.result()
    count = len(web.bytes)
    other.numpy("long")
    assert len(web.bytes) == count


def test_long_sequences_are_fetched_by_several_requests(web, local, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 1 << 12)
    store = cache.open(web.url, options=OPTIONS, read_ahead=0)
    count = len(web.bytes)
    same(store, local)
    assert len(web.bytes) - count > 10


def test_a_kept_folder_is_used_again(web, local, tmp_path):
    first = cache.open(web.url, options=OPTIONS, folder=tmp_path / "kept")
    same(first, local)
    count = len(web.bytes)
    again = cache.open(web.url, options=OPTIONS, folder=tmp_path / "kept")
    same(again, local)
    assert not [path for path, _ in web.bytes[count:] if "shards" in path]
    (shard,) = {s for s in (tmp_path / "kept").rglob("*.shard") if s.stem == again._rust.ranges("a")[0]}
    _, ranges = again._rust.ranges("a")
    with open(shard, "r+b") as file:  # a bad disk: fetched once more
        file.seek(ranges[-1][0] + 40)
        file.write(b"\xff\xff")
    same(again, local)


def test_a_torn_index_in_a_kept_folder_is_fetched_again(web, local, tmp_path):
    same(cache.open(web.url, options=OPTIONS, folder=tmp_path / "kept"), local)
    for shard in (tmp_path / "kept").rglob("*.shard"):
        with open(shard, "r+b") as file:  # a machine that lost power
            file.seek(-60, 2)
            file.write(bytes(20))
    count = len(web.bytes)
    same(cache.open(web.url, options=OPTIONS, folder=tmp_path / "kept"), local)
    assert 3 <= len([path for path, _ in web.bytes[count:] if "shards" in path]) <= 9  # blocks are not fetched again


def test_a_refresh_fetches_new_records_and_shards_alone(web, local, dense_lab, tmp_path):
    web.root = tmp_path / "grown"
    shutil.copytree(local, web.root)
    store = cache.open(web.url, options=OPTIONS, read_ahead=0)
    old = list((store._fetching._mirror.root / "shards").glob("*.shard"))
    count = len(web.bytes)
    assert store.refresh() == 0 and [path for path, _ in web.bytes[count:]] == ["/log/0000000004.json"]
    with cache.Writer(web.root, store.spec) as w:
        r = dense_lab.rows(5, seed=77)
        w.add("new", r.tokens, r)
    web.trouble = lambda path, attempt, wanted: "flip" if "shard" in path else None
    with pytest.raises(cache.CacheError):
        store.refresh()
    assert store.keys() == cache.open(local).keys()  # the view is as it was
    web.trouble, count = lambda path, attempt, wanted: None, len(web.bytes)
    for shard in old:
        shard.rename(shard.with_suffix(".aside"))  # opening it again would be an error
    assert store.refresh() == 1 and store.find(r.tokens) == ["new"]
    assert not {shard.stem for shard in old} & {Path(path).stem for path, _ in web.bytes[count:]}
    for shard in old:
        shard.with_suffix(".aside").rename(shard)
    same(store, web.root)


def test_errors_that_pass_are_tried_again(web, local):
    """Every object fails first: 503, 500, a body cut in half."""
    web.trouble = lambda path, attempt, wanted: {1: 503, 2: "short", 3: 500}.get(attempt) if "shard" in path else None
    same(cache.open(web.url, options=OPTIONS), local)
    assert max(web.seen.values()) > 3


@pytest.mark.parametrize(
    "trouble, message", [(503, "50|retr"), ("short", "bytes|body|error"), (403, "403|[Pp]ermission|[Ff]orbidden")]
)
def test_errors_that_stay_are_one_line(web, trouble, message):
    store = cache.open(web.url, options=OPTIONS, read_ahead=0)
    web.trouble = lambda path, attempt, wanted: trouble
    with pytest.raises(OSError, match=message) as error:
        store.numpy("long")
    assert "\n" not in str(error.value) and web.url in str(error.value)
    web.trouble = lambda path, attempt, wanted: None
    assert len(store.numpy("long")[0]) == 3000  # it recovers


def test_a_server_that_hangs_is_an_error(web):
    web.trouble = lambda path, attempt, wanted: "hang"
    options = {"client_options": {"timeout": timedelta(seconds=0.3)}, "retry_config": {**RETRY, "max_retries": 0}}
    with pytest.raises(OSError, match=re.escape(web.url)):
        cache.open(web.url, options=options)


def test_a_lying_server_is_found_out(web, local):
    store = cache.open(web.url, options=OPTIONS, read_ahead=0)
    web.trouble = lambda path, attempt, wanted: "flip" if "shard" in path else None
    with pytest.raises(cache.CacheError, match="checksum|tables|block"):
        store.numpy("long")
    web.trouble = lambda path, attempt, wanted: "flip"
    with pytest.raises((cache.CacheError, OSError)):
        cache.open(web.url, options=OPTIONS)


def test_what_is_no_cache_is_refused(web, tmp_path):
    web.root = tmp_path
    with pytest.raises(cache.CacheError, match="no cache here"):
        cache.open(web.url, options=OPTIONS)
    for body in (
        '{"shards": [{"name": "../../x", "bytes": 100}], "log": 1}',
        '{"shards": [{"name": "' + "a" * 32 + '", "bytes": 1e30}], "log": 1}',
        '{"log": 1}',
        '{"shards": [5], "log": 1}',
        '{"shards": {"name": 1}, "log": []}',
        '{"shards": [], "log": 1e999}',
        '{"shards": [], "log": -3}',
        "[]",
        "x",
    ):
        (tmp_path / "manifest.json").write_text('{"body":' + body + "}")
        with pytest.raises((cache.CacheError, OSError)):
            cache.open(web.url, options=OPTIONS)
    with pytest.raises(ValueError, match="ftp"):
        cache.open("ftp://host/x")


def test_file_urls_are_local_paths(local):
    same(cache.open(f"file://{local}"), local)


@pytest.fixture(scope="module")
def s3():
    """moto's server and the options that lead to it."""
    server_module = pytest.importorskip("moto.server", reason="the S3 server of the tests is moto's")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {
        "endpoint": f"http://{host}:{port}", "access_key_id": "x", "secret_access_key": "y", "region": "us-east-1",
        "client_options": {"allow_http": True}, "retry_config": RETRY,
    }  # fmt: skip
    import urllib.request

    urllib.request.urlopen(urllib.request.Request(f"{options['endpoint']}/bucket", method="PUT")).read()
    yield options
    server.stop()


def test_s3_push_and_read(s3, local, dense_lab, tmp_path):
    url = "s3://bucket/some/cache"
    grown = tmp_path / "grown"
    shutil.copytree(local, grown)
    sent = remote.push(grown, url, s3)
    assert sent["shards"] == 3 and sent["records"] == 4
    assert remote.push(grown, url, s3) == {"shards": 0, "records": 0, "bytes": 0}
    store = cache.open(url, options=s3)
    same(store, local)
    with cache.Writer(grown, store.spec) as w:
        r = dense_lab.rows(5, seed=77)
        w.add("new", r.tokens, r)
    assert remote.push(grown, url, s3)["shards"] == 1
    same(cache.open(url, options=s3), grown)
    assert store.keys() == cache.open(local).keys()  # what was committed when it was opened
    assert store.refresh() == 1 and store.find(r.tokens) == ["new"]
    same(store, grown)
    other = tmp_path / "other"
    dense_lab.write(other, {"x": 3}, k=5)
    with pytest.raises(cache.CacheError, match="another cache"):
        remote.push(other, url, s3)
    fork = tmp_path / "fork"
    dense_lab.write(fork, {"y": 3})
    with pytest.raises(cache.CacheError, match="written by another"):
        remote.push(fork, url, s3)
    with pytest.raises(cache.CacheError, match="no cache here"):
        cache.open("s3://bucket/nothing", options=s3)
