from __future__ import annotations

import json
import shutil

import pytest
from potstill.capture.text import Document, open_text


def names(source):
    return [d.name for d in source]


def test_folder_names_are_relative_sorted_and_stable(corpus, tmp_path):
    first = list(open_text(corpus))
    assert [d.name for d in first] == sorted(f"part{n % 3}/{n:02d}.txt" for n in range(30))
    assert first[0] == Document("part0/00.txt", (corpus / "part0/00.txt").read_text(), 0)
    moved = tmp_path / "elsewhere"
    shutil.copytree(corpus, moved)
    assert list(open_text(moved)) == first


def test_sizes_add_up_to_the_total(corpus):
    source = open_text(corpus)
    assert source.size == sum(d.size for d in source) == sum(len(d.text.encode()) for d in source)


def test_suffixes_choose_files(corpus):
    (corpus / "code.c").write_text("int main;")
    assert names(open_text(corpus, suffixes=["c"])) == ["code.c"]
    with pytest.raises(ValueError, match=r"no text found .* \.zig"):
        open_text(corpus, suffixes=[".zig"])


def test_several_inputs_keep_names_apart(corpus, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "00.txt").write_text("x")
    got = names(open_text([corpus / "part0", other / "00.txt"]))
    assert "other/00.txt" in got and "corpus/part0/00.txt" in got and len(set(got)) == len(got)


def test_the_order_and_names_do_not_hang_on_how_the_inputs_are_written(corpus, tmp_path, monkeypatch):
    (tmp_path / "z.txt").write_text("x")
    monkeypatch.chdir(corpus)
    assert list(open_text(["part1", "../z.txt"])) == list(open_text([tmp_path / "z.txt", corpus / "part1"]))


def test_two_inputs_of_one_name_are_refused(corpus):
    with pytest.raises(ValueError, match="two documents are named 'corpus/part0/00.txt'"):
        open_text([corpus, corpus / "part0" / "00.txt"])


def test_one_file_whatever_its_suffix(tmp_path):
    (tmp_path / "notes.log").write_text("hello")
    assert list(open_text(tmp_path / "notes.log")) == [Document("notes.log", "hello", 5)]


def test_files_that_are_not_utf8_are_reported(corpus):
    (corpus / "part0" / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    source = open_text(corpus)
    assert "part0/latin.txt" not in names(source) and source.skipped == ["part0/latin.txt"]
    assert list(source) and source.skipped == ["part0/latin.txt"], "counted anew at each iteration"


def test_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "one"}\n\n{"body": "two", "id": 7}\n')
    assert [(d.name, d.text) for d in open_text(path, text_field="body")] == [
        ("rows.jsonl:1", "one"),
        ("rows.jsonl:3", "two"),
    ]
    with pytest.raises(ValueError, match=r"line 1: no field 'text' \(it has 'body'\).*--text-field"):
        list(open_text(path))
    path.write_text('{"text": "one"}\nnot json\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        list(open_text(path))
    path.write_text(json.dumps({"text": 3}))
    with pytest.raises(TypeError, match="holds int"):
        list(open_text(path))


def test_datasets_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "other": [1, 2]})
    rows.save_to_disk(str(tmp_path / "flat"))
    source = open_text(tmp_path / "flat")
    assert [(d.name, d.text) for d in source] == [("flat:0", "a"), ("flat:1", "b")] and source.size == 2
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "splits"))
    assert names(open_text(tmp_path / "splits")) == ["train:0", "train:1", "test:0", "test:1"]
    with pytest.raises(ValueError, match="no column 'body'.*'text', 'other'"):
        open_text(tmp_path / "flat", text_field="body")


def test_missing_input_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        open_text(tmp_path / "nowhere")
