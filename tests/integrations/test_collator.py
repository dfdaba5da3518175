from __future__ import annotations

import numpy as np
import potstill as ps
import pytest
import torch
from potstill.integrations.collator import CacheCollator, next_token_labels

KEYS = [{"key": f"s{i}"} for i in range(4)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_row_lies_at_its_token(cache, sequences, side):
    batch = CacheCollator(cache, 7, padding_side=side, pad_to_multiple_of=8)(KEYS)
    assert batch["input_ids"].shape == (4, 24) and batch["teacher_ids"].shape == (4, 24, 300)
    for b, (key, tokens) in enumerate(sequences.items()):
        n = len(tokens)
        at = slice(24 - n, 24) if side == "left" else slice(0, n)
        mask = torch.zeros(24, dtype=torch.bool)
        mask[at] = True
        assert batch["attention_mask"][b].bool().equal(mask)
        assert batch["input_ids"][b, at].tolist() == tokens.tolist() and (batch["input_ids"][b, ~mask] == 7).all()
        assert batch["labels"][b, at].tolist() == [-100, *tokens[1:].tolist()]
        assert (batch["labels"][b, ~mask] == -100).all()
        rows = cache[key].topk
        assert batch["teacher_ids"][b, at].equal(rows.ids) and (batch["teacher_ids"][b, ~mask] == -1).all()
        assert batch["teacher_log_probs"][b, at].equal(rows.log_probs)
        assert batch["teacher_log_rest"][b, at].equal(rows.log_rest)
    if side == "left":
        assert batch["position_ids"][3].tolist() == [0] * 22 + [0, 1]


def test_labels_count_the_same_however_a_trainer_counts(cache):
    for side in ("left", "right"):
        labels = CacheCollator(cache, 0, padding_side=side)(KEYS)["labels"]
        assert (labels != -100).sum() == (labels[:, 1:] != -100).sum() == (next_token_labels(labels) != -100).sum()


def test_shifting_once():
    labels = torch.tensor([[-100, 5, 6, 7], [-100, 8, -100, -100]])
    assert next_token_labels(labels).tolist() == [[5, 6, 7, -100], [8, -100, -100, -100]]


def test_given_labels_and_prefixes_are_kept(cache, sequences):
    tokens = sequences["s0"][:10]
    labels = tokens.copy()
    labels[:6] = -100
    batch = CacheCollator(cache, 0)([{"key": "s0", "input_ids": tokens.tolist(), "labels": labels.tolist()}])
    assert batch["labels"][0].tolist() == labels.tolist() and batch["teacher_ids"].shape[1] == 10
    assert batch["teacher_ids"][0].equal(cache["s0"].topk.ids[:10])
    cut = CacheCollator(cache, 0, max_length=4)([{"key": "s0"}, {"key": "s3"}])
    assert cut["input_ids"].shape == (2, 4) and cut["input_ids"][0].tolist() == sequences["s0"][:4].tolist()


def test_tokens_that_are_not_the_cached_ones_are_refused(cache, sequences):
    other = sequences["s0"].copy()
    other[5] += 1
    with pytest.raises(ps.cache.TokenMismatch, match="(?s)s0.*5"):
        CacheCollator(cache, 0)([{"key": "s0", "input_ids": other}])


@pytest.mark.parametrize(
    "example, error, sentence",
    [
        ({"key": "nowhere"}, ValueError, "no teacher rows for 'nowhere'"),
        ({"input_ids": [1, 2]}, TypeError, "has no 'key' .it has 'input_ids'.*remove_unused_columns"),
        ({"key": "s3", "labels": [1]}, ValueError, "'s3'.*labels for 2 tokens"),
        ({"key": "s3", "attention_mask": [0, 1]}, ValueError, "'s3'.*attention_mask"),
        ({"key": "s3", "input_ids": []}, ValueError, "'s3'.*at least 1 token"),
    ],
)
def test_refused_examples_are_named(cache, example, error, sentence):
    with pytest.raises(error, match=sentence):
        CacheCollator(cache, 0)([{"key": "s0"}, example])


def test_what_to_pad_with(cache):
    class Tokenizer:
        pad_token_id, eos_token_id, padding_side = None, 11, "left"

    collator = CacheCollator(cache, Tokenizer())
    assert (collator.pad_id, collator.padding_side) == (11, "left")
    Tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="give CacheCollator an id"):
        CacheCollator(cache, Tokenizer())
    with pytest.raises(ValueError, match="'middle'"):
        CacheCollator(cache, 0, padding_side="middle")


def test_a_path_is_opened(cache, sequences):
    batch = CacheCollator(cache.path, 0)([{"key": "s1"}])
    np.testing.assert_array_equal(batch["input_ids"][0].numpy(), sequences["s1"])
