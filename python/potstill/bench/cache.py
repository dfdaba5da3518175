"""The cache beside other formats on real teacher rows: bytes a token, fidelity, decoding, random reads, writing.

Everything that is timed is read back and compared first. One thread, but for the line that says two.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from potstill import cache
from potstill.bench import cache_rivals
from potstill.bench.cache_rows import Rows
from potstill.bench.measure import Variant, in_turns, one_core, spread
from potstill.cache.buffers import Buffers
from potstill.cache.statistics import row_kl

Row = dict[str, Any]
VALUES = ("1/16", "1/32", "bf16_logits")
# rows written, the given ones over and over, and bytes of a shard: several fsyncs in a write
START = (40_000, 1 << 22)  # much of which is learning tables
LONG = (2_000_000, 1 << 24)
SLOW = 12.0  # seconds: a store that would take longer writes no long run


def spec_of(rows: Rows, values: str) -> cache.Spec:
    return cache.Spec(rows.vocab_size, rows.ids.shape[1], teacher="benchmark", values=values)


def topk(rows: Rows, values: str) -> SimpleNamespace:
    """All rows as a writer takes them."""
    given = SimpleNamespace(ids=rows.ids, log_probs=rows.log_probs, log_rest=rows.log_rest, lse=None)
    if values == "bf16_logits":
        given.log_probs, given.lse = rows.as_bf16_logits()
    return given


def cut(given: SimpleNamespace, part: slice) -> SimpleNamespace:
    return SimpleNamespace(**{name: None if c is None else c[part] for name, c in vars(given).items()})


def write(
    folder: Path,
    rows: Rows,
    given: SimpleNamespace,
    values: str,
    shard: int = START[1],
    left: Iterable[tuple[int, slice]] | None = None,
) -> None:
    """All sequences, or those `left` that no other thread takes, in shards of so many bytes."""
    with cache.Writer(folder, spec_of(rows, values), shard_bytes=shard) as writer:
        for i, part in left or enumerate(rows.parts()):
            writer.add(f"{i}", rows.tokens[part], cut(given, part))


def write_in_two_threads(folder: Path, rows: Rows, given: SimpleNamespace, values: str, shard: int) -> None:
    """A writer each into one folder; each takes the next sequence that is left."""
    cache.Writer(folder, spec_of(rows, values)).close()
    left = iter(list(enumerate(rows.parts())))
    threads = [threading.Thread(target=write, args=(folder, rows, given, values, shard, left)) for _ in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Ours:
    """A written cache, read into memory that is there already; every token is compared with the cached one."""

    def __init__(self, path: Path, rows: Rows) -> None:
        self.cache = cache.open(path)
        self.keys = [f"{i}" for i in range(len(rows.ends))]
        self.tokens = [np.ascontiguousarray(rows.tokens[p]) for p in rows.parts()]
        self.lengths = [len(t) for t in self.tokens]
        self.out = Buffers.empty(self.cache.spec, len(rows.tokens))
        longest = max(self.lengths)
        self.one_out = {n: Buffers.empty(self.cache.spec, n) for n in {*self.lengths, longest}}

    def all(self) -> None:
        self.cache._rust.read_many(self.keys, self.lengths, None, tokens=self.tokens, **vars(self.out))

    def one(self, i: int) -> None:
        out = self.one_out[self.lengths[i]]
        self.cache._rust.read_many([self.keys[i]], [self.lengths[i]], None, tokens=[self.tokens[i]], **vars(out))


def check_ours(ours: Ours, rows: Rows, given: SimpleNamespace, values: str) -> tuple[float, float]:
    """(mean KL, largest error of a log-probability) of what is read; AssertionError where it was not written so."""
    ours.all()
    n, k = rows.ids.shape
    ids, log_probs = ours.out.ids.reshape(n, k), ours.out.log_probs.reshape(n, k)
    kl, error, missing = row_kl(given.ids, given.log_probs, given.log_rest, ids, log_probs, ours.out.log_rest)
    allowed = 0.0 if values == "bf16_logits" else 0.5 / int(values.split("/")[1]) + 1e-5
    if missing.any() or error.max() > allowed:
        raise AssertionError(f"values {values}: {missing.sum()} entries lost, error {error.max():.3g} > {allowed:.3g}")
    for i, part in enumerate(rows.parts()):
        ours.one(i)
        np.testing.assert_array_equal(ours.one_out[ours.lengths[i]].ids, ids[part].ravel())
    truth = rows.log_probs if values == "bf16_logits" else given.log_probs
    if values == "bf16_logits":  # against the fp32 rows: what bf16 logits cost, which is the teacher's and not ours
        kl, error, _ = row_kl(rows.ids, truth, rows.log_rest, ids, log_probs, ours.out.log_rest)
    return float(kl.mean()), float(error.max())


def check_rival(store: cache_rivals.Store, opened: cache_rivals.Opened, rows: Rows, out: cache_rivals.Columns) -> None:
    opened.all(out)
    for got, want in zip(out, cache_rivals.columns(rows), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=store.name)
    for i, part in enumerate(rows.parts()):
        opened.one(i, out)
        for got, want in zip(out, cache_rivals.columns(rows), strict=True):
            np.testing.assert_array_equal(got[: part.stop - part.start], want[part], err_msg=store.name)


def size(folder: Path) -> int:
    return sum(
        f.stat().st_blocks * 512 if f.name == "data.mdb" else f.stat().st_size for f in folder.rglob("*") if f.is_file()
    )


def writing(
    rows: Rows, amount: tuple[int, int], names: list[str], root: Path, repeats: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds a row to write the rows over and over, durably, by `names`, each on one core; and how much faster two
    threads write the first of VALUES: the median of a turn's ratio over three times as many turns of these alone.
    """
    n, shard = amount
    many = rows.repeated(min(n, 400 * len(rows.tokens)))
    count = iter(range(10**9))

    def clear() -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()

    def fresh() -> Path:
        path = root / f"{next(count)}"
        path.mkdir()
        return path

    def ours(values: str, given: SimpleNamespace) -> Variant:
        def save() -> None:
            with one_core():
                write(fresh(), many, given, values, shard)

        return save

    def rival(store: cache_rivals.Store) -> Variant:
        def save() -> None:
            folder = fresh()
            with one_core():
                store.write(folder, many)
                cache_rivals.durable(folder)

        return save

    variants = {f"potstill, {v}": ours(v, topk(many, v)) for v in VALUES if f"potstill, {v}" in names}
    variants |= {store.name: rival(store) for store in cache_rivals.STORES if store.name in names}
    seconds = in_turns(variants, repeats, before=clear)
    given = topk(many, VALUES[0])
    pair: dict[str, Variant] = {
        "one": ours(VALUES[0], given),
        "two": lambda: write_in_two_threads(fresh(), many, given, VALUES[0], shard),
    }
    taken = in_turns(pair, 3 * repeats if repeats > 2 else repeats, before=clear)
    shutil.rmtree(root)
    two = median(one / two for one, two in zip(taken["one"], taken["two"], strict=True))
    return {name: [t / len(many.tokens) for t in own] for name, own in seconds.items()}, two


def figures(rows: Rows, *, repeats: int, note: Callable[[str], Any]) -> list[Row]:
    """Rows of the table for these teacher rows."""
    n, order = len(rows.tokens), np.random.default_rng(0).permutation(len(rows.ends)).tolist()
    read: dict[str, Variant] = {}
    random: dict[str, Variant] = {}
    facts: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for values in VALUES:
            name, given = f"potstill, {values}", topk(rows, values)
            path = root / f"{len(facts)}"
            write(path, rows, given, values)
            ours = Ours(path, rows)
            kl, error = check_ours(ours, rows, given, values)
            facts[name] = {"bytes_per_token": size(path) / n, "mean_kl": kl, "max_error": error}
            read[name] = ours.all
            random[name] = lambda ours=ours: [ours.one(i) for i in order]  # type: ignore[misc]
        out = cache_rivals.empty(rows)
        _, _, rounded, _ = cache_rivals.columns(rows)
        kls, errors, _ = row_kl(rows.ids, rows.log_probs, rows.log_rest, rows.ids, rounded, rows.log_rest)
        for store in cache_rivals.found(note):
            path = root / f"{len(facts)}"
            path.mkdir()
            store.write(path, rows)
            opened = store.open(path, rows)
            check_rival(store, opened, rows, out)
            facts[store.name] = {
                "bytes_per_token": size(path) / n,
                "mean_kl": float(kls.mean()),
                "max_error": float(errors.max()),
            }
            read[store.name] = lambda o=opened: o.all(out)  # type: ignore[misc]
            random[store.name] = lambda o=opened: [o.one(i, out) for i in order]  # type: ignore[misc]
        seconds = {what: {name: [t / n for t in taken] for name, taken in in_turns(variants, repeats).items()}
                   for what, variants in {"decode": read, "random": random}.items()}  # fmt: skip
        first, two = f"potstill, {VALUES[0]}", {}
        seconds["write"], two["write"] = writing(rows, START, list(facts), root / "start", repeats)
        quick = [name for name in facts if name == first or median(seconds["write"][name]) * LONG[0] <= SLOW]
        seconds["long"], two["long"] = writing(rows, LONG, quick, root / "long", min(repeats, 5))
    table: list[Row] = []
    for name, fact in facts.items():
        row: Row = {"case": rows.title, "variant": name, "tokens": n, **fact}
        for what, taken in seconds.items():
            known = taken.get(name)
            row[f"{what}_tokens_per_second"] = 1 / median(known) if known else None
            row[f"{what}_spread"] = spread(known) if known else None
        row |= {f"two_threads_{what}": ratio if name == first else None for what, ratio in two.items()}
        table.append(row)
    return table
