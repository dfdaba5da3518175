"""The benchmark measures what it says, and refuses to time what is wrong."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from potstill import divergences
from potstill.bench import cache as cache_bench
from potstill.bench import cache_rivals, cache_rows, fidelity, losses, objectives, plots, rivals, run, sweeps, topk
from potstill.bench.cases import FRESH, Case, Shape
from potstill.bench.command import bench
from potstill.bench.measure import in_turns, machine, peak_in_process
from potstill.bench.summary import summary
from potstill.bench.tables import fidelity_tables
from potstill.teachers import TopK

SMALL = Shape("dense", rows=33, hidden=16, teacher_hidden=24, vocab=700)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_ours_and_eager_are_checked_against_fp64(form, dtype, monkeypatch):
    monkeypatch.setattr(losses, "CHECKED", replace(losses.CHECKED, vocab=2_001))
    shape = replace(SMALL, form=form, dtype=dtype)
    assert losses.check(shape, compiled=False) == {}
    case = Case(shape)
    for name, loss in case.losses().items():
        off = losses.errors(case, loss, case.truth())
        assert max(off) < (1e-5 if dtype == "float32" else 0.1), name


def test_liger_and_trl_are_measured_where_installed():
    case = Case(SMALL)
    found, skipped = rivals.found(case, compiled=False)
    assert set(found) | set(skipped) == {"Liger chunked", "TRL chunked"}
    for name in skipped:
        assert rivals.version(rivals.PACKAGES[name.split()[0]]) is None, skipped[name]
    for name, loss in found.items():
        assert max(losses.errors(case, loss, case.truth())) < 1e-4, name
    _, reasons = rivals.found(Case(replace(SMALL, form="sparse")), compiled=False)
    assert "top-k" in reasons["Liger, TRL"]


def test_an_absent_rival_says_so(monkeypatch):
    monkeypatch.setattr(rivals, "version", lambda package: None)
    found, skipped = rivals.found(Case(SMALL), compiled=False)
    assert found == {} and skipped["TRL chunked"] == "the package trl is not installed"


def test_memory_is_measured_where_it_is_known():
    """Eager holds at least its logits and their gradient; the fused loss never a [rows, vocab] matrix."""
    shape = dict(form="sparse", rows=2048, hidden=16, teacher_hidden=0, vocab=16_384)
    matrix = 4 * 2048 * 16_384
    peaks = {
        which: peak_in_process("potstill.bench.losses:variants", {**shape, "choose": which}, 1)
        for which in ("potstill", "eager")
    }
    assert peaks["eager"] > 2 * matrix
    assert losses.extra_peak(Shape(**shape), "potstill", False) < peaks["potstill"]
    assert 256 * 16_384 * 4 < peaks["potstill"] < matrix / 2


def test_variants_take_turns():
    order: list[str] = []
    seconds = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, repeats=3, least=0, whole=0)
    assert "".join(order) == "baabbaab" and all(len(s) == 3 for s in seconds.values())


def test_short_calls_fill_their_turn_and_count_by_their_mean(monkeypatch):
    now, called = [0.0], []

    def call(name: str, seconds: float) -> None:
        called.append(name)
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    calls = {"short": lambda: call("short", 0.25), "long": lambda: call("long", 3.0)}
    seconds = in_turns(calls, repeats=3, warm_up=1, least=1.0, whole=0.0, before=lambda: call("before", 7.0))
    assert seconds == {"short": [0.25] * 3, "long": [3.0] * 3} and called.count("before") == 8
    assert called.count("short") == 1 + 3 * 4 and called.count("long") == 1 + 3
    called.clear()
    in_turns(calls, repeats=2, warm_up=1, least=1.0)
    assert len(called) == 6, "two rounds are a smoke test: a call each"
    for whole, rounds in ((1.0, 3), (16.0, 4), (17.0, 5), (1e9, 15)):  # a round takes 1 + 3 seconds
        assert {len(s) for s in in_turns(calls, repeats=3, least=1.0, whole=whole).values()} == {rounds}


def test_what_is_slower_than_the_limit_is_left_out():
    calls = {"fast": lambda: None, "slow": lambda: time.sleep(0.02)}
    assert list(in_turns(calls, repeats=2, limit=0.01)) == ["fast"]


def test_what_would_take_minutes_is_left_out_after_a_few_rows(monkeypatch):
    """A loss of 5 us for each row and entry is never called on more than 16 rows of a quarter of the vocabulary."""
    plain, called = Case.eager, []

    def slow(self):
        called.append((self.shape.rows, self.shape.vocab))
        time.sleep(5e-6 * self.shape.rows * self.shape.vocab)
        return plain(self)

    monkeypatch.setattr(losses, "CHECKED", replace(losses.CHECKED, rows=8, vocab=300))
    monkeypatch.setattr(Case, "eager", slow)
    monkeypatch.setattr(rivals, "version", lambda package: None)
    shape, notes = replace(SMALL, rows=256, vocab=2_000), []
    guess = losses.estimates(shape, compiled=False)
    assert 0.7 * 2.56 < guess["eager"] < 2 * 2.56, guess
    called.clear()
    found = losses.rows(shape, repeats=1, compiled=False, limit=0.3, peaks=False, note=notes.append)
    assert "eager" not in {r["variant"] for r in found} and "potstill" in {r["variant"] for r in found}
    assert max(called) <= (16, 500), called
    assert any("eager not timed: about" in note for note in notes), notes


def test_a_run_of_one_dtype_leaves_the_cases_of_the_other(tmp_path):
    def found(*losses):
        sections: dict[str, list[dict[str, object]]] = {name: [] for name in run.SECTIONS}
        return {"machine": {"cpu": "x"}, **sections, "losses": list(losses), "topk": []}

    old = {"case": "bf16", "dtype": "bfloat16", "variant": "a"}, {"case": "fp32", "dtype": "float32", "variant": "old"}
    (tmp_path / "bench.json").write_text(json.dumps(found(*old)))
    new = {"case": "fp32", "dtype": "float32", "variant": "new"}
    assert run.with_earlier(found(new), tmp_path)["losses"] == [new, old[0]]
    assert run.with_earlier(found(), tmp_path)["losses"] == [old[1], old[0]]
    other = {**found(new), "machine": {"cpu": "y"}}
    assert run.with_earlier(other, tmp_path)["losses"] == [new]


def test_a_red_check_prints_no_number(monkeypatch):
    """A wrong value, a wrong gradient and a crash are noted and have no row; the others are timed."""

    def wrong(self):
        return self.eager() * 1.001

    def wrong_gradient(self):
        loss = self.eager()
        return loss + (self.h - self.h.detach()).sum() * 1e-3

    def crash(self):
        raise RuntimeError("no kernel\nhere")

    monkeypatch.setattr(losses, "CHECKED", replace(losses.CHECKED, vocab=1001))
    for replaced, sentence in (
        (wrong, "value off by 1.0e-03"),
        (wrong_gradient, "gradient of h"),
        (crash, "no kernel"),
    ):
        monkeypatch.setattr(Case, "potstill", replaced)
        notes: list[str] = []
        found = losses.rows(SMALL, repeats=2, compiled=False, limit=60, peaks=False, note=notes.append)
        assert "potstill" not in [r["variant"] for r in found] and "eager" in [r["variant"] for r in found]
        (note,) = [n for n in notes if "RED" in n]
        assert "potstill" in note and sentence in note, note
    monkeypatch.setattr(topk, "topk", lambda x, k: TopK(x[:, :k].int(), x[:, :k]))
    with pytest.raises(AssertionError, match="differs"):
        topk.check(torch.randn(2, 100), 3)


def test_gradients_near_convergence():
    """GOALS of the precise mode, on fewer rows."""
    rows = {r["variant"]: r for r in objectives.precision_rows(vocab=4_000, rows=16)}
    precise = rows["potstill, precise=True"]
    assert 0.02 < precise["kl"] < 0.08
    assert max(precise["hidden_gradient_error"], precise["head_gradient_error"]) < 3e-3
    assert rows["eager, all in bf16"]["hidden_gradient_error"] > 10 * precise["hidden_gradient_error"]


def teacher_rows(path):
    """A small file as `--teacher-rows` takes it."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (90, 700)).astype(np.float32)
    lp = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)).astype(np.float32)
    ids = np.argsort(-lp, -1)[:, :16]
    top = np.take_along_axis(lp, ids, -1)
    tail = 1 - np.exp(top.astype(np.float64)).sum(-1)
    np.savez(path, ids=ids, lp=top, tail=tail, tok=rng.integers(0, 700, 90), lens=[40, 1, 49], V=700)
    return path


def test_the_cache_is_compared_before_it_is_timed(tmp_path, monkeypatch):
    """A rival that returns other rows, and a cache that does, stop the section."""
    rows = cache_rows.load(teacher_rows(tmp_path / "rows.npz"))
    raw = cache_rivals.Raw.open
    monkeypatch.setattr(cache_rivals, "STORES", (cache_rivals.Raw(),))
    notes: list[str] = []
    names = [r["variant"] for r in cache_bench.figures(rows, repeats=1, note=notes.append)]
    assert names == ["potstill, 1/16", "potstill, 1/32", "potstill, bf16_logits", "raw arrays (memcpy)"] and not notes

    def late(self, folder, rows):
        opened = raw(self, folder, rows)
        return replace(opened, one=lambda i, out: opened.one(0, out))

    monkeypatch.setattr(cache_rivals.Raw, "open", late)
    with pytest.raises(AssertionError, match="raw arrays"):
        cache_bench.figures(rows, repeats=1, note=notes.append)
    given = cache_bench.topk(rows, "1/16")
    cache_bench.write(tmp_path / "c", rows, given, "1/16")
    given.log_probs = given.log_probs - np.float32(0.2)
    with pytest.raises(AssertionError, match="error 0.2"):
        cache_bench.check_ours(cache_bench.Ours(tmp_path / "c", rows), rows, given, "1/16")


def test_bf16_logits_are_taken_at_the_teachers_lse(tmp_path):
    """Of a file, and of a cache of logits; elsewhere at a given one."""
    file = teacher_rows(tmp_path / "rows.npz")
    assert (cache_rows.load(file).as_bf16_logits()[1] == cache_rows.UNKNOWN_LSE).all()
    lse = np.random.default_rng(1).normal(30, 6, 90).astype(np.float32)
    with np.load(file) as z:
        np.savez(tmp_path / "known.npz", **z, lse=lse)
    rows = cache_rows.load(tmp_path / "known.npz")
    log_probs, found = rows.as_bf16_logits()
    bits = (log_probs.astype(np.float64) + lse[:, None]).astype(np.float32).view(np.uint32)
    np.testing.assert_array_equal(found, lse)
    assert (bits & 0xFFFF == 0).mean() > 0.98  # those that the row's lse did not bring above 0
    np.testing.assert_array_equal(rows.repeated(200).lse, np.tile(lse, 3))
    for values, known in (("fp32", None), ("bf16_logits", lse)):
        cache_bench.write(tmp_path / values, rows, cache_bench.topk(rows, values), values)
        np.testing.assert_array_equal(cache_rows.load(tmp_path / values).lse, known)


def test_absent_stores_and_rounded_rows_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_rivals.importlib.util, "find_spec", lambda name: None)
    notes: list[str] = []
    assert cache_rivals.found(notes.append) == [] and "LMDB + zstd skipped, lmdb is not installed" in notes[1]
    rows = cache_rows.load(teacher_rows(tmp_path / "rows.npz"))
    cache_bench.write(tmp_path / "c", rows, cache_bench.topk(rows, "1/16"), "1/16")
    with pytest.raises(ValueError, match="--values fp32"):
        cache_rows.load(tmp_path / "c")


def test_smoke_writes_csv_and_tables(tmp_path, monkeypatch):
    rows = teacher_rows(tmp_path / "rows.npz")
    monkeypatch.setattr(topk, "CASES", [(torch.bfloat16, 16, "gaussian"), (torch.float32, 16, "ascending")])
    monkeypatch.setattr(topk, "VOCAB", 4000)
    monkeypatch.setattr(losses, "SMOKE", [replace(s, vocab=900) for s in losses.SMOKE[:2]])
    monkeypatch.setattr(losses, "extra_peak", lambda *a: 1)
    monkeypatch.setattr(losses, "CHECKED", replace(losses.CHECKED, vocab=1001))
    monkeypatch.setattr(objectives, "extra_peak", lambda *a: 1)
    monkeypatch.setattr(sweeps, "MODELS", {})
    monkeypatch.setattr(fidelity, "missing", lambda: "left to its own test")
    done = CliRunner().invoke(bench, ["all", "--smoke", "--out", str(tmp_path), "--teacher-rows", str(rows)])
    assert done.exit_code == 0, done.output
    assert "skipped" in done.output and "| loss, forward + backward" in done.output
    rows = list(csv.DictReader(open(tmp_path / "losses.csv")))
    assert {"potstill", "eager"} <= {r["variant"] for r in rows} and all(float(r["seconds"]) > 0 for r in rows)
    kinds = list(csv.DictReader(open(tmp_path / "divergences.csv")))
    assert {r["divergence"] for r in kinds} == set(divergences.names()) and len(kinds) == 2 * len(divergences.names())
    stored = list(csv.DictReader(open(tmp_path / "cache.csv")))
    assert {"potstill, 1/16", "potstill, bf16_logits", "raw arrays (memcpy)", "npz, compressed"} <= {
        r["variant"] for r in stored
    }
    for r in stored:
        assert all(float(r[f"{what}_tokens_per_second"]) > 0 for what in ("decode", "random", "write"))
        first = r["variant"] == "potstill, 1/16"  # which writes the long run however long that takes
        assert not first or float(r["long_tokens_per_second"]) > 0
        assert all((float(r[f"two_threads_{what}"] or 0) > 0) == first for what in ("write", "long")), r
        assert float(r["max_error"]) <= (1 / 32 + 1e-5 if r["variant"] == "potstill, 1/16" else 0.13), r
    assert {"precision.csv", "memory.csv", "topk.csv", "cache.csv"} <= {p.name for p in tmp_path.iterdir()}
    assert json.loads((tmp_path / "bench.json").read_text())["machine"]["torch"] == torch.__version__


def test_a_benchmark_cut_short_leaves_what_it_measured(tmp_path, monkeypatch):
    def cut(**arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeps, "models", cut)
    done = CliRunner().invoke(bench, ["all", "--smoke", "--out", str(tmp_path)])
    assert done.exit_code == 1, done.output
    kept = (tmp_path / "bench.json").read_text()
    assert json.loads(kept)["losses"]
    tables = CliRunner().invoke(bench, ["none", "--out", str(tmp_path)])
    assert "potstill" in tables.output and (tmp_path / "losses.csv").is_file(), tables.output
    assert (tmp_path / "bench.json").read_text() == kept
    absent = CliRunner().invoke(bench, ["none", "--out", str(tmp_path / "absent")])
    assert absent.exit_code == 1 and "measures and writes one" in absent.output


def test_shapes_can_be_shrunk():
    plan = run.Plan(rows=64, vocab=500, dtypes=("bfloat16",))
    assert {(s.rows, s.vocab, s.dtype) for s in plan.shapes()} == {(64, 500, "bfloat16")}


def test_docs_are_written_between_the_marks(tmp_path):
    (tmp_path / "docs").mkdir()
    for file in (tmp_path / "README.md", tmp_path / "docs" / "performance.md"):
        file.write_text(f"before\n{run.MARK[0]}\nold\n{run.MARK[1]}\nafter\n")
    machine = dict(cpu="x", cores=2, capability="y", torch="2", potstill="0")
    run.write_docs({"machine": machine, "losses": [], "topk": [], "cache": []}, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before") and text.endswith("after\n") and "Made on x" in text and "old" not in text
    performance = tmp_path / "docs" / "performance.md"
    performance.write_text(f"kept\n{run.MARK[0]}\nkept too\n{run.MARK[1]}\n{run.XTOK_MARK[0]}\n{run.XTOK_MARK[1]}\n")
    row = {"case": "c", "variant": "v", "value": 3.0, "unit": "s", "spread": 0.1}
    run.write_docs({"machine": machine, "losses": [], "xtok": [row]}, tmp_path)
    assert (tmp_path / "README.md").read_text() == text
    assert "kept too" in performance.read_text() and "| c | v | 3 s | 10% |" in performance.read_text()
    (tmp_path / "README.md").write_text(f"{text}{run.CACHE_MARK[0]}\n{run.CACHE_MARK[1]}\n")
    performance.write_text(f"{performance.read_text()}{run.CACHE_MARK[0]}\n{run.CACHE_MARK[1]}\n")
    stored = {"case": "rows", "variant": "potstill", "bytes_per_token": 99.0, "mean_kl": 0.0, "max_error": 0.0}
    for what in ("decode", "random", "write", "long"):
        stored |= {f"{what}_tokens_per_second": 2e6, f"{what}_spread": 0.1}
    run.write_docs({"machine": {**machine, "cpu": "z"}, "losses": [], "cache": [stored]}, tmp_path)
    for file in (tmp_path / "README.md", performance):  # figures of another machine stay beside them
        before, own = file.read_text().split(run.CACHE_MARK[0])
        assert "Made on z" in own and "99" in own and "Made on x" in before and "Made on z" not in before
    which = tmp_path / "docs" / "which-k.md"
    which.write_text(f"{run.FIDELITY_MARK[0]}\n{run.FIDELITY_MARK[1]}\n")
    kept = {"case": "k and tail", "variant": "drop", "k": 8, "gradient_error": 0.3, "mass_outside": 0.2}
    kept |= {"mass_outside_p90": 0.5, "rows": 9, "vocab": 9, "kl": 0.1}
    given = {"case": "ceilings", "threads": 2, "flops_per_second": 1e9, "bytes_per_second": 1e9}
    run.write_docs({"machine": machine, "ceilings": [given], "fidelity": [kept]}, tmp_path)
    assert "mass outside" in which.read_text() and "mass outside" not in performance.read_text(), "one file says it"
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(ValueError, match="README"):
        run.write_docs({"machine": machine, "losses": [], "topk": [], "cache": []}, tmp_path)


def test_the_readme_lists_every_rival_the_best_first():
    def loss(variant, over, peak, case="a"):
        return {"case": case, "variant": variant, "over_floor": over, "peak_bytes": peak}

    def stored(variant, size, decode, long=None):
        rate = {"long_tokens_per_second": long} if long else {}
        case = {"case": "rows", "variant": variant, "bytes_per_token": size, "random_tokens_per_second": 1e6}
        return {**case, "decode_tokens_per_second": decode, **rate}

    rows = [loss("eager", 2, 5e6), loss("potstill", 1.5, 9e6), loss("x", 1, 7e6), loss(FRESH, 1, 0)]
    rivals = [stored("potstill, 1/16", 100, 2e6, 1e6), stored("potstill, 1/32", 90, 3e6), stored("x", 300, 1e6)]
    found = {"losses": [*rows, loss("potstill", 3, None, "b")], "cache": [*rivals, stored("y", 400, 4e6)]}
    assert summary(found).splitlines()[2:] == [
        "| a: time over its matrix products alone | 1.50 | x 1.00; eager 2.00 |",
        "| its peak memory | 9 MB | eager 5 MB; x 7 MB |",
        "| b: time over its matrix products alone | 3.00 |  |",
        "| cache, rows: bytes a token | 100 | x 300; y 400 |",
        "| its tokens/s decoded | 2.00 M | y 4.00 M; x 1.00 M |",
        "| at random, us for 1,000 tokens | 1,000 | x 1,000; y 1,000 |",
        "| its tokens/s of two million written, synced | 1.00 M |  |",
    ]


def test_records_have_the_columns_of_kernel_benchmarks(tmp_path, monkeypatch):
    """Every section's rows become records; times with percentiles; plots are drawn from the same run."""
    monkeypatch.setattr(losses, "CHECKED", replace(losses.CHECKED, vocab=1001))
    made = losses.rows(SMALL, repeats=3, compiled=False, limit=60, peaks=False, note=lambda _: None)
    assert FRESH in {r["variant"] for r in made}
    found = {"machine": machine(), "losses": made, "cost": topk.cost(smoke=True, repeats=3)}
    found |= {
        "ceilings": sweeps.ceilings(smoke=True, repeats=2),
        "cache": [{"case": "c", "variant": "ours", "bytes": 3}],
    }
    found["memory"] = [{**r, "peak_bytes": 10**6} for r in made]
    run.save({name: [] for name in run.SECTIONS} | found, tmp_path)
    rows = list(csv.DictReader(open(tmp_path / "records.csv")))
    shared = (
        "kernel_name kernel_provider kernel_operation_mode metric_name metric_unit x_name x_label x_value y_value_20"
    )
    assert set(shared.split()) | {"y_value_50", "y_value_80", "gpu_name", "timestamp", "commit"} < set(rows[0])
    speed = [r for r in rows if r["metric_name"] == "speed" and r["kernel_provider"] == "potstill"]
    assert {r["kernel_name"] for r in speed} == {"linear_distill_loss_dense", "topk"}
    assert all(0 < float(r["y_value_20"]) <= float(r["y_value_50"]) <= float(r["y_value_80"]) for r in speed)
    assert json.loads(speed[0]["extra_benchmark_config_str"])["vocab"] == SMALL.vocab
    drawn = {p.name for p in (tmp_path / "plots").iterdir()}
    assert drawn == {"losses.png", "memory.png", "topk.png", "roofline.png"}


def test_logarithmic_ticks_are_plain_numbers():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    found = [{"variant": "potstill", "x": x, x: n, "over_read": n / 5} for x in ("vocab", "k") for n in (64, 512, 8192)]
    assert plots.topk(figure, {"cost": found})
    figure.draw_without_rendering()
    for axes in figure.axes:
        across, up = ([t.get_text() for t in axis.get_majorticklabels()] for axis in (axes.xaxis, axes.yaxis))
        # which powers of two are marked is the library's choice
        powers = {str(2**i) for i in range(10)} | {f"{2**i}k" for i in range(10)}
        assert len(powers & set(across)) >= 3 and not set(across) - powers - {""} and {"20", "50", "100"} <= set(up)
        assert not any(tick.get_text() for tick in axes.yaxis.get_minorticklabels())


def test_sweeps_cover_models_and_threads(monkeypatch):
    monkeypatch.setattr(losses, "CHECKED", replace(losses.CHECKED, vocab=1001))
    monkeypatch.setattr(rivals, "version", lambda package: None)
    options = dict(smoke=True, repeats=2, limit=60, note=lambda _: None)
    assert {r["model"] for r in sweeps.models(**options)} == set(sweeps.MODELS)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert {r["threads"] for r in sweeps.threads(**options)} == {1, 2} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.nightly
@pytest.mark.skipif(fidelity.missing() is not None, reason=str(fidelity.missing()))
def test_fidelity_falls_with_k_and_step():
    found = fidelity.figures(smoke=True)
    by_tail = {t: [r["gradient_error"] for r in found if r["variant"] == t] for t in ("bucket", "drop", "renormalize")}
    assert all(errors == sorted(errors, reverse=True) and errors[-1] < errors[0] for errors in by_tail.values())
    assert all(b <= r for b, r in zip(by_tail["bucket"], by_tail["renormalize"], strict=True))
    steps = [r for r in found if r["case"] != "k and tail"]
    assert [r["stored_kl"] for r in steps] == sorted((r["stored_kl"] for r in steps), reverse=True)
    assert "gradient error, bucket" in fidelity_tables({"fidelity": found})


def test_a_section_of_two_kinds_of_rows_is_one_table(tmp_path):
    run.write_csv(tmp_path / "x.csv", [{"case": "a", "k": 1}, {"case": "b", "largest_error": 0.5}])
    rows = list(csv.DictReader(open(tmp_path / "x.csv")))
    assert rows == [{"case": "a", "k": "1", "largest_error": ""}, {"case": "b", "k": "", "largest_error": "0.5"}]
