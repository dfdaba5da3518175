"""Caches on a local Ray of two workers: the rows of one process, a killed worker made up for, the datasink."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import potstill as ps
import pytest
from click.testing import CliRunner
from potstill.cache.exchange.convert import convert
from potstill.capture import build
from potstill.cli import main

from ..capture.test_build import assert_same_content
from . import ray_work

pytest.importorskip("ray.data")
TEXTS = [f"text {n}: " + "the potatoes are in the kettle and the water is hot " * (n % 5 + 1) for n in range(16)]
OPTIONS = {"k": 8, "length": 24, "batch_size": 2, "temperatures": (1.0, 2.0), "values": "fp32"}
WORDS = ["--k", 8, "--length", 24, "--batch-size", 2, "--device", "cpu", "--quiet"]
# a busy machine is slow, and no test of Ray's
PATIENCE = {
    "RAY_gcs_server_port_wait_time_s": "300",
    "RAY_gcs_server_request_timeout_seconds": "300",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_health_check_timeout_ms": "120000",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def cluster():
    import ray

    paths = [str(Path(__file__).parents[2]), str(Path(ps.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # names of sockets have to be short
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**PATIENCE, "PYTHONPATH": os.pathsep.join(filter(None, paths))}.items():
            patch.setenv(name, value)
        for attempt in range(8):  # it gives up a node that is not up in 30 s
            try:
                ray.init(
                    address="local", num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=96 << 20,
                    logging_level="ERROR", _temp_dir=folder,
                )  # fmt: skip
                break
            except Exception:
                ray.shutdown()
                if attempt == 7:
                    raise
        yield ray
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def loaded():
    return ray_work.load()


@pytest.fixture(scope="module")
def single(loaded, tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / "c"
    build(loaded.model, loaded.tokenizer, TEXTS, out, teacher="tiny", **OPTIONS)
    return ps.cache.open(out)


def assert_equal(single, out):
    found = ps.cache.open(out)
    assert found.verify().ok and found.spec == single.spec and len(found) > 20
    assert_same_content(found, single)


def call(*words):
    return CliRunner().invoke(main, list(map(str, ["build", *words])))


def test_the_command_on_two_workers_one_of_them_killed(cluster, loaded, tmp_path, monkeypatch):
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    for n, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{n:02d}.txt").write_text(text)
    (tmp_path / "texts" / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    marks = tmp_path / "marks"
    marks.mkdir()
    local = call(tmp_path / "model", tmp_path / "texts", tmp_path / "local", *WORDS)
    assert local.exit_code == 0, local.output
    with monkeypatch.context() as patch:
        patch.setattr("potstill.capture.models.load_model", partial(ray_work.mortal_load_model, str(marks)))
        words = [*WORDS, "--engine", "ray", "--workers", 2]
        done = call(tmp_path / "model", tmp_path / "texts", tmp_path / "ray", *words)
    assert done.exit_code == 0, done.output
    assert (marks / "killed").exists() and len(list(marks.glob("loaded-*"))) >= 2
    assert_equal(ps.cache.open(tmp_path / "local"), tmp_path / "ray")
    own = ps.cache.open(tmp_path / "local")
    for report in (local, done):
        assert f"this run: {len(own)} sequences, {own.num_tokens:,} tokens" in report.output, report.output
        assert "left out: 1 files that are not UTF-8 (first: latin.txt)" in report.output


def table_rows(cache):
    for key in cache.keys():
        sequence = cache[key]
        rows = sequence.topk
        yield {
            "key": key, "tokens": np.asarray(sequence.tokens), "ids": rows.ids.numpy(),
            "log_probs": rows.log_probs.numpy(), "log_rest": rows.log_rest.numpy(),
            "log_rest_at_2.0": rows.log_rest_at[2.0].numpy(),
        }  # fmt: skip


def test_the_datasink_writes_rows_of_a_data_set(cluster, single, tmp_path):
    from potstill.integrations.ray import CacheDatasink

    data = cluster.data.from_items(list(table_rows(single)), override_num_blocks=4)
    data.write_datasink(CacheDatasink(tmp_path / "c", single.spec, shard_bytes=2048))
    assert_equal(single, tmp_path / "c")


def test_a_block_is_a_table_that_convert_writes(single, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from potstill.integrations.ray import CacheDatasink

    convert(Path(single.path), tmp_path / "rows.parquet")
    table = pq.read_table(tmp_path / "rows.parquet")
    sink = CacheDatasink(tmp_path / "c", single.spec)
    assert sink.write([table.slice(0, 5), table.slice(5)], None) == len(single)
    assert sink.write([table], None) == 0
    assert_equal(single, tmp_path / "c")
    for broken, sentence in (
        (table.drop(["ids"]), "no column ids"),
        (table.set_column(0, "key", pa.nulls(len(table), pa.string())), "has no key"),
        (table.set_column(0, "key", table["key"].take(list(range(1, len(table))) + [0])), "other content"),
    ):
        with pytest.raises(ValueError, match=sentence):
            sink.write([broken], None)
    with pytest.raises(ValueError, match="the column 'x'"):
        CacheDatasink(tmp_path / "d", ps.cache.Spec(vocab_size=8, k=2, columns=("x",)))
    with pytest.raises(ValueError, match="layout is 'other'"):
        CacheDatasink(tmp_path / "d", single.spec, layout="other")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--engine", "ray", "--shard", "0/2"], "--engine ray shares the work itself"),
        (["--engine", "ray", "--server", "http://x", "--server-kind", "vllm"], "--engine ray shares the work itself"),
        (["--engine", "ray", "--workers", 0], "--workers is 0"),
        (["--workers", 2], "--engine ray for more than one"),
    ],
)
def test_what_does_not_go_together_is_refused(words, sentence, tmp_path):
    refused = call("model", tmp_path, tmp_path / "c", *words)
    assert refused.exit_code == 1 and sentence in refused.output and "Traceback" not in refused.output


@pytest.mark.nightly
def test_any_parts_on_any_workers_are_the_build_of_one_process(cluster, single, tmp_path):
    from potstill.integrations.ray import build_parts

    found = build_parts(ray_work.load, lambda: TEXTS, tmp_path / "c", workers=2, parts=5, **OPTIONS)
    assert (found.new_sequences, found.new_tokens) == (len(single), single.num_tokens)
    assert_equal(single, tmp_path / "c")
    again = build_parts(ray_work.load, lambda: TEXTS, tmp_path / "c", workers=1, parts=2, **OPTIONS)
    assert again.new_sequences == 0 and again.sequences == len(single)
    with pytest.raises(ValueError, match="at least 1 each"):
        build_parts(ray_work.load, lambda: TEXTS, tmp_path / "d", workers=0)
