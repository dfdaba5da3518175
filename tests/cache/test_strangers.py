"""Pitfall 28 from the command line and by hand: what a stranger's cache tried, found by attacking the reader."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from potstill import cache
from potstill.cli import main

pytest.importorskip("xxhash", reason="forging checksums needs the xxhash package")
from .test_hostile import seal

LIMITED = """
import resource, sys
from potstill import cache
resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))
path = sys.argv[1]
"""


def limited(code: str, path: object) -> str:
    """What `code` prints under a limit of 512 MiB on the address space; it must end well."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED + code, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run(*arguments: object) -> str:
    """A command's output; whatever it meets, no traceback reaches the user."""
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), (arguments, done.exception)
    return done.output


def spec_text(**members: object) -> str:
    return json.dumps({"vocab_size": 10, "k": 2, **members}, sort_keys=True)


def empty_cache(path, spec: str, body: str | None = None, log: int = 1, required=()) -> None:
    """A cache without shards whose spec, or whose manifest's body, is forged; checksums right."""
    for folder in ("log", "shards", "open"):
        (path / folder).mkdir(parents=True)
    (path / "log" / "0000000000.json").write_text(seal("log", {"kind": "spec", "spec": spec}))
    text = seal("manifest", {"log": log, "spec": spec, "shards": [], "dropped": []}, required=required)
    if body is not None:
        text = body
    (path / "manifest.json").write_text(text)


def raw_seal(body: str, required: str = "[]") -> str:
    from .test_hostile import xxh3

    head = f'{{"potstill":"manifest","version":[1,0],"required":{required},"body":{body}'
    return f'{head},"xxh3":"{xxh3(head.encode()):016x}"}}\n'


@pytest.fixture(scope="module")
def small(tmp_path_factory, dense_lab):
    path = tmp_path_factory.mktemp("small") / "c"
    dense_lab.write(path, {"a": 5, "b": 3})
    return path


@pytest.mark.parametrize("folder", ["log", "shards", "open"])
def test_pitfall_28_linked_folders_are_not_followed(small, tmp_path, folder):
    path = tmp_path / "c"
    shutil.copytree(small, path)
    (path / folder).rename(tmp_path / "elsewhere")
    (path / folder).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "1-2-3.shard.tmp").write_bytes(b"of another")
    if folder != "open":  # readers take nothing from it
        with pytest.raises(cache.CacheError, match="symbolic link"):
            cache.open(path)
        assert not cache.verify_cache(path).ok
    else:
        assert cache.verify_cache(path).open_shards == 0
    for change in (lambda: cache.recover_cache(path), lambda: cache.Writer(path, cache.open(small).spec)):
        with pytest.raises(cache.CacheError, match="symbolic link"):
            change()
    assert (tmp_path / "elsewhere" / "1-2-3.shard.tmp").read_bytes() == b"of another"


def test_pitfall_28_members_named_twice(tmp_path):
    """Of two members of one name readers may choose either: neither is chosen."""
    whole = json.dumps({"log": 1, "spec": spec_text(), "shards": [], "dropped": []})
    for n, twice in enumerate(("log", "spec", "shards", "dropped")):
        body = whole[:-1] + f', "{twice}": {json.dumps(json.loads(whole)[twice])}}}'
        empty_cache(tmp_path / str(n), spec_text(), raw_seal(body))
        with pytest.raises(cache.CacheError, match=f"duplicate field `{twice}`"):
            cache.open(tmp_path / str(n))
    empty_cache(tmp_path / "spec", '{"vocab_size": 10, "k": 2, "vocab_size": 20}')
    with pytest.raises(cache.CacheError, match='"vocab_size" stands there twice'):
        cache.open(tmp_path / "spec")


def test_pitfall_28_a_manifest_of_many_records_is_checked_at_once(tmp_path):
    empty_cache(tmp_path / "most", spec_text(values="1/16"), log=10**10)
    assert cache.verify_cache(tmp_path / "most").ok and len(cache.open(tmp_path / "most")) == 0
    for n, count in enumerate((0, 10**10 + 1, 2**64 - 1)):
        empty_cache(tmp_path / str(n), spec_text(), log=count)
        with pytest.raises(cache.CacheError, match=f"it covers {count} records"):
            cache.open(tmp_path / str(n))


@pytest.mark.parametrize("where", ["required", "dropped", "shards"])
def test_pitfall_28_lists_of_little_names_stay_little(tmp_path, where):
    """24 MiB of empty strings would take half a gigabyte as strings in memory."""
    many = "[" + ",".join(['""'] * (1 << 23)) + "]"
    lists = {"required": "[]", "dropped": "[]", "shards": "[]", where: many}
    body = f'{{"log":1,"spec":{json.dumps(spec_text())},"shards":{lists["shards"]},"dropped":{lists["dropped"]}}}'
    empty_cache(tmp_path / "c", spec_text(), raw_seal(body, lists["required"]))
    code = """
for read in (cache.open, lambda p: print(cache.verify_cache(p).ok)):
    try:
        read(path)
    except cache.CacheError as error:
        print("refused")
"""
    assert limited(code, tmp_path / "c") == "refused\nFalse\n"


def test_pitfall_28_the_largest_vocabulary_stays_within_512_mib(tmp_path):
    code = """
import numpy as np
from types import SimpleNamespace
rows = SimpleNamespace(ids=np.array([[2**31 - 2, 5]]), log_probs=np.array([[-1.0, -2.0]]), log_rest=np.array([-3.0]))
with cache.Writer(path, cache.Spec(2**31 - 1, 2, values="plain")) as w:
    w.add("x", [1], rows)
    rows.ids[:] = 7
    try:
        w.add("y", [1], rows)
    except ValueError as error:
        print(error)
print(cache.open(path).numpy("x")[1].tolist(), cache.verify_cache(path).ok, cache.recover_cache(path)["lost"])
"""
    refusal = 'sequence "y", row 0: entry 1 repeats id 7\n'
    assert limited(code, tmp_path / "c") == f"{refusal}[[2147483646, 5]] True []\n"


def test_pitfall_28_an_index_as_large_as_memory_is_an_error(small, tmp_path):
    """A sparse file of a gigabyte that says all of it is index."""
    from .test_hostile import xxh3

    path = tmp_path / "c"
    shutil.copytree(small, path)
    (shard,) = (path / "shards").iterdir()
    size, footer = (1 << 30) + (1 << 20), (1 << 30) - 8
    trailer = footer.to_bytes(8, "little") + size.to_bytes(8, "little")
    trailer += xxh3(trailer).to_bytes(8, "little") + b"\x89PSE\r\n\x1a\n"
    with open(shard, "r+b") as file:
        file.truncate(size - 32)
        file.seek(size - 32)
        file.write(trailer)
    body = json.loads((path / "manifest.json").read_text())["body"]
    body["shards"][0]["bytes"] = size
    (path / "manifest.json").write_text(seal("manifest", body))
    code = """
try:
    cache.open(path)
except cache.CacheError as error:
    print(error)
print(cache.verify_cache(path).ok)
"""
    assert "footer: there is no memory for its 1073741816 bytes" in limited(code, path)


def test_pitfall_28_rows_that_unfold_are_looked_at_in_part(tmp_path):
    """0.1 MiB that decode to half a gigabyte: tools that need a sequence whole say so, the others go on."""
    n = 1100
    rows = SimpleNamespace(
        ids=np.zeros((n, 1), np.int32),
        log_probs=np.full((n, 1), -1.0, np.float32),
        log_rest=np.full(n, -0.5, np.float32),
    )
    with cache.Writer(tmp_path / "c", cache.Spec(1 << 16, 65535)) as w:
        w.add("x", np.zeros(n, np.int32), rows)
    assert cache.open(tmp_path / "c").num_bytes < 1 << 17
    code = """
from click.testing import CliRunner
from potstill.cli import main
for arguments in (["verify", "--deep"], ["inspect", "--json"]):
    done = CliRunner().invoke(main, [*arguments, path])
    assert done.exit_code == 0, done.output + repr(done.exception)
done = CliRunner().invoke(main, ["convert", path, path + ".jsonl"])
print(done.exit_code, done.output)
"""
    assert limited(code, tmp_path / "c").startswith("1 Error: not enough memory")
    assert not (tmp_path / "c.jsonl").exists()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MEMBERS = [*cache.Spec.__dataclass_fields__, "columns", "other"]
COLUMN = {"name": "c", "dtype": "fp16", "width": 2, "per": "token", "labels": ["a", "b"]}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(MEMBERS), json_values, st.sampled_from([None, *COLUMN]))
def test_pitfall_28_a_spec_of_any_json_is_read_or_refused(tmp_path_factory, member, value, inner):
    """What is refused is a CacheError, not whatever Python makes of it."""
    if member == "columns" and inner is not None:
        value = [{**COLUMN, inner: value}]
    path = tmp_path_factory.mktemp("spec") / "c"
    spec = spec_text(**{"values": "1/16", member: value})
    required = ("columns",) if member == "columns" else ()
    empty_cache(path, spec, required=required)
    (path / "log" / "0000000000.json").write_text(seal("log", {"kind": "spec", "spec": spec}, required=required))
    try:
        assert len(cache.open(path)) == 0
    except cache.CacheError:
        pass
    for arguments in (["inspect"], ["verify", "--deep"], ["card"]):
        run(*arguments, path)
    run("convert", path, path.with_suffix(".jsonl"))


def test_pitfall_28_text_of_a_stranger_does_not_steer_the_terminal(tmp_path, dense_lab):
    evil = "x\x1b]0;mine\x07\x1b[2J\x9b31m\u202e\r"
    path, r = tmp_path / "c", dense_lab.rows(5)
    with cache.Writer(path, dense_lab.spec(teacher=evil, extra={evil: evil})) as w:
        w.add(evil, r.tokens, r)
    (shard,) = dense_lab.shard_files(path)
    shown = run("inspect", path) + run("verify", path) + run("card", path) + (path / "README.md").read_text()
    shown += run("convert", path, tmp_path / "c.jsonl", "--layout", evil)
    row = json.loads(
        json.dumps({"key": evil, "tokens": [1], "ids": [[1, 1]], "log_probs": [[-2, -2]], "log_rest": [-1]})
    )
    (tmp_path / "r.jsonl").write_text(json.dumps(row))
    refusal = run("convert", tmp_path / "r.jsonl", tmp_path / "d", "--vocab-size", 9)
    assert "repeats id 1" in refusal
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    shown += refusal + run("verify", path) + run("verify", "--deep", path) + run("recover", path)
    odd = [c for c in shown if not c.isprintable() and c != "\n"]
    assert not odd, odd


def test_pitfall_28_names_longer_than_any_text(tmp_path, small):
    """16,000 characters where a key, a path or an option stands."""
    name = "k" * 16_000
    with pytest.raises(KeyError):
        cache.open(small)[name]
    (tmp_path / "r.jsonl").write_text(
        json.dumps({"key": name, "tokens": [1], "ids": [[1]], "log_probs": [[-1]], "log_rest": [-1]})
    )
    out = run("convert", tmp_path / "r.jsonl", tmp_path / "d", "--vocab-size", 9)
    assert "16000 bytes" in out and len(out) < 500
    far = tmp_path / name
    for arguments in (
        ["inspect", name],
        ["convert", small, far],
        ["convert", small, tmp_path / "x", "--to", name],
        ["split", small, far],
        ["merge", small, far],
        ["card", small, "--out", far],
    ):
        assert "rror" in run(*arguments)


@pytest.mark.parametrize("hows", ["cut folder", pytest.param("empty bytes gone", marks=pytest.mark.nightly)])
def test_pitfall_28_every_command_on_every_broken_file(small, tmp_path, hows):
    """One file after another is empty, cut, of other bytes, a folder, or gone: each tool answers in lines."""
    work = tmp_path / "work"
    files = [f.relative_to(small) for f in small.rglob("*") if f.is_file()]
    assert len(files) >= 4
    for file in files:
        for how in hows.split():
            shutil.copytree(small, work)
            target = work / file
            data = target.read_bytes()
            target.unlink()
            if how == "folder":
                target.mkdir()
            elif how != "gone":
                target.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "bytes": b"\xff\x00" * 600}[how])
            out = tmp_path / "out.jsonl"
            for arguments in (
                ["inspect", "--json", work], ["verify", work], ["verify", "--deep", work], ["convert", work, out],
                ["merge", work, small, tmp_path / "m"], ["split", work, tmp_path / "s"], ["card", work],
                ["recover", work], ["verify", "--deep", work],
            ):  # fmt: skip
                run(*arguments)
                for made in (out, tmp_path / "m", tmp_path / "s"):
                    shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
            shutil.rmtree(work)
