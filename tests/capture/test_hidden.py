from __future__ import annotations

import pytest
import torch
import transformers
from potstill.capture.hidden import final_hidden, teacher_hidden, unwrap
from torch import nn

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def models():
    torch.manual_seed(0)
    t = transformers
    yield t.LlamaForCausalLM(t.LlamaConfig(**SMALL, num_key_value_heads=1))
    yield t.GPT2LMHeadModel(t.GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    yield t.Gemma2ForCausalLM(t.Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8))
    yield t.OPTForCausalLM(
        t.OPTConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
                    word_embed_proj_dim=8, max_position_embeddings=32)
    )  # fmt: skip
    yield t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SMALL, max_position_embeddings=32))


@pytest.mark.parametrize("model", list(models()), ids=lambda m: type(m).__name__)
def test_hidden_is_what_the_head_is_given(model):
    model.eval()
    ids = torch.randint(0, 61, (2, 7))
    with torch.no_grad():
        hidden, outputs = final_hidden(model, input_ids=ids)
        full = model(input_ids=ids).logits
        again, all_outputs = final_hidden(model, all_logits=True, input_ids=ids)
    assert outputs.logits.shape == (2, 1, 61), "no logits but the last position's"
    head = model.get_output_embeddings()
    logits = head(hidden)
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    torch.testing.assert_close(logits, full)
    torch.testing.assert_close(all_outputs.logits, full)
    torch.testing.assert_close(again, hidden)
    torch.testing.assert_close(teacher_hidden(model, ids), hidden)
    assert not head._forward_pre_hooks, "the hook is gone"


def test_wrappers_are_called_themselves(model):
    class Wrapper(nn.Module):
        calls = 0

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    wrapped = Wrapper(model)
    assert unwrap(wrapped) is model
    ids = torch.arange(5)[None]
    hidden, _ = final_hidden(wrapped, input_ids=ids)
    assert wrapped.calls == 1
    torch.testing.assert_close(hidden, final_hidden(model, input_ids=ids)[0])


def test_gradients_reach_the_model_through_hidden(model):
    hidden, _ = final_hidden(model, input_ids=torch.arange(5)[None])
    (grad,) = torch.autograd.grad(hidden.square().sum(), model.model.layers[0].mlp.up_proj.weight)
    assert grad.abs().sum() > 0


def test_a_model_without_a_head_is_refused(model):
    with pytest.raises(TypeError, match="LlamaModel has no output embeddings"):
        final_hidden(model.model, input_ids=torch.arange(5)[None])


def test_a_head_that_is_not_called_is_refused(model, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda self, **inputs: self.model(**inputs))
    with pytest.raises(ValueError, match="called its head 0 times"):
        final_hidden(model, input_ids=torch.arange(5)[None])


def test_the_hook_is_removed_when_the_forward_fails(model):
    with pytest.raises(IndexError):
        final_hidden(model, input_ids=torch.tensor([[10**6]]))
    assert not model.get_output_embeddings()._forward_pre_hooks


class Engine(nn.Module):
    """As DeepSpeed's engine: it has its model's attributes beside its own."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *inputs, **kwargs):
        return self.module(*inputs, **kwargs)


def test_an_engine_with_its_models_attributes_is_looked_through():
    from potstill.integrations.transformers import student_hidden

    model = next(models()).eval()
    engine = Engine(model)
    assert unwrap(engine) is model and unwrap(model) is model
    batch = {"input_ids": torch.randint(0, 61, (2, 7)), "labels": torch.zeros(2, 7), "key": ["a", "b"]}
    torch.testing.assert_close(student_hidden(engine, batch)[0], student_hidden(model, batch)[0])
