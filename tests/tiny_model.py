"""A tiny random Llama for tests that need a model and not its knowledge."""

from __future__ import annotations

from typing import Any


def tiny_llama(seed: int = 0, *, layers: int = 2, **config: Any):
    """A LlamaForCausalLM in evaluation mode, D = 32, V = 300 unless `config` says otherwise; the same for a seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    words = dict(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**words, **config})).eval()
