"""A tiny random Llama, ragged token sequences, and a cache of the model's own next-token distributions at k =
V.
"""

from __future__ import annotations

import os

import numpy as np
import potstill as ps
import pytest
import torch
import transformers
from potstill.integrations.inputs import PACKED_SINCE

from .. import tiny_model

VOCAB = 300
LENGTHS = (23, 9, 17, 2)
needs_packing = pytest.mark.skipif(
    tuple(int(x) for x in transformers.__version__.split(".")[:2]) < PACKED_SINCE,
    reason=f"transformers {transformers.__version__} does not keep packed sequences apart, and is refused",
)


@pytest.fixture(autouse=True)
def full_precision():
    """Before transformers 5 TrainingArguments(bf16=True) leaves its precision in the environment to what follows."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


def tiny_llama(seed: int = 0):
    return tiny_model.tiny_llama(seed, vocab_size=VOCAB, pad_token_id=0)


def exact_rows(model, tokens, k: int = VOCAB) -> ps.TopK:
    """What the model says of each next token, not rounded by a cache: TopK [L, k]."""
    with torch.no_grad():
        return ps.topk(model(torch.as_tensor(tokens, dtype=torch.int64)[None]).logits[0], k)


@pytest.fixture(scope="session")
def model():
    return tiny_llama()


@pytest.fixture(scope="session")
def sequences() -> dict[str, np.ndarray]:
    g = np.random.default_rng(0)
    return {f"s{i}": g.integers(1, VOCAB, n).astype(np.int32) for i, n in enumerate(LENGTHS)}


@pytest.fixture(scope="session")
def cache(tmp_path_factory, model, sequences):
    folder = tmp_path_factory.mktemp("cache") / "c"
    with ps.cache.Writer(folder, ps.cache.Spec(vocab_size=VOCAB, k=VOCAB, teacher="tiny")) as writer:
        for key, tokens in sequences.items():
            writer.add(key, tokens, exact_rows(model, tokens))
    return ps.cache.open(folder)


def tiny_tokenizer(changed: str = ""):
    """Words w1, w2, ... as the ids 1, 2, ...; a chat template; `changed` replaces the last word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", *(f"w{i}" for i in range(1, VOCAB - 1)), changed or f"w{VOCAB - 1}"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="w2")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()
