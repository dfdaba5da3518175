"""A cache that is not the one meant is a named error before the first step."""

from __future__ import annotations

import potstill as ps
import pytest
import torch
from potstill.capture.models import tokenizer_hash
from potstill.integrations.checks import WrongCache, check_cache, template_hash
from potstill.integrations.transformers import CacheCollator, DistillConfig, DistillTrainer
from transformers import TrainingArguments

from .conftest import VOCAB, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def named(tmp_path_factory, tokenizer):
    """A cache that names teacher, revision, tokenizer and template."""
    spec = ps.cache.Spec(
        vocab_size=VOCAB, k=4, teacher="big", teacher_revision="r1", tokenizer=tokenizer_hash(tokenizer),
        extra={"chat_template": template_hash(tokenizer)},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("named") / "c"
    with ps.cache.Writer(folder, spec) as writer:
        for i in range(3):
            tokens = torch.randint(1, VOCAB, (6,))
            writer.add(f"s{i}", tokens.numpy(), ps.topk(torch.randn(6, VOCAB), 4))
    return ps.cache.open(folder)


def trainer_of(cache, tmp_path, processing, data=None, **expect):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    return DistillTrainer(
        model=tiny_llama(), args=args, processing_class=processing,
        train_dataset=[{"key": k} for k in cache] if data is None else data, data_collator=CacheCollator(cache, 0),
        distill=DistillConfig(expect=expect),
    )  # fmt: skip


def test_the_cache_that_is_meant_passes(named, tokenizer, tmp_path):
    trainer_of(named, tmp_path, tokenizer, teacher="big", teacher_revision="r1")
    trainer_of(named, tmp_path, tiny_tokenizer(changed="other"), tokenizer=None)
    trainer_of(named, tmp_path, None)


@pytest.mark.parametrize(
    "expect, sentence",
    [
        ({"teacher": "small"}, "built with the teacher 'big', 'small' is expected"),
        ({"teacher_revision": "r2"}, "teacher's revision 'r1', 'r2' is expected"),
        ({"chat_template": "{{ messages }}"}, "chat template 'blake2b:.*' is expected"),
        ({"chat_template": ""}, "chat template 'blake2b:.*, '' is expected"),
    ],
)
def test_another_teacher_revision_or_template(named, tokenizer, tmp_path, expect, sentence):
    with pytest.raises(WrongCache, match=sentence):
        trainer_of(named, tmp_path, tokenizer, **expect)


def test_another_tokenizer_or_its_template(named, tokenizer, tmp_path):
    with pytest.raises(WrongCache, match="built with the tokenizer 'blake2b:"):
        trainer_of(named, tmp_path, tiny_tokenizer(changed="other"))
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("role", "name")
    with pytest.raises(WrongCache, match="built with the chat template 'blake2b:"):
        trainer_of(named, tmp_path, other)


def test_missing_keys_and_columns(named, tokenizer, tmp_path):
    with pytest.raises(WrongCache, match="no teacher rows for 'elsewhere', example 1 of the data set"):
        trainer_of(named, tmp_path, tokenizer, [{"key": "s0"}, {"key": "elsewhere"}])
    datasets = pytest.importorskip("datasets")
    with pytest.raises(WrongCache, match="no teacher rows for 'elsewhere'"):
        trainer_of(named, tmp_path, tokenizer, datasets.Dataset.from_dict({"key": ["s0", "elsewhere"]}))
    with pytest.raises(WrongCache, match="no column 'key' .it has input_ids"):
        trainer_of(named, tmp_path, tokenizer, datasets.Dataset.from_dict({"input_ids": [[1, 2]]}))


def test_a_cache_that_does_not_say(cache):
    with pytest.raises(WrongCache, match="does not say which teacher's revision it has, 'r1' is expected"):
        check_cache(cache, expect={"teacher_revision": "r1"})
    check_cache(cache, tokenizer=tiny_tokenizer())  # it names no tokenizer either: nothing to hold against
    with pytest.raises(ValueError, match="expect names 'revision'; known are teacher, teacher_revision"):
        check_cache(cache, expect={"revision": "r1"})
