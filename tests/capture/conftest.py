"""A tiny byte tokenizer and a tiny random Llama, saved as a user would have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..tiny_model import tiny_llama


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model():
    return tiny_llama(initializer_range=0.4)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, model, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder of texts of uneven lengths, in nested folders, with things that must be left out."""
    root = tmp_path / "corpus"
    for number in range(30):
        path = root / f"part{number % 3}" / f"{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"line {i} of file {number}: été\n" for i in range(number % 7)))
    (root / ".hidden").mkdir()
    (root / ".hidden" / "no.txt").write_text("never read")
    (root / "image.png").write_bytes(b"\x89PNG")
    return root
