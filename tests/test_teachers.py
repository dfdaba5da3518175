"""Head.from_model applies what the model applies, checked against the model's own logits."""

from __future__ import annotations

from dataclasses import replace

import potstill as ps
import pytest
import torch
from potstill.capture.hidden import teacher_hidden

transformers = pytest.importorskip("transformers")

SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "llama, tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama": ("Llama", dict(tie_word_embeddings=False)),
    "qwen2": ("Qwen2", {}),
    "gemma2, softcap": ("Gemma2", dict(final_logit_softcapping=0.5, head_dim=8, query_pre_attn_scalar=8)),
    "cohere, logit_scale": ("Cohere", dict(logit_scale=0.25)),
    "granite, logits_scaling": ("Granite", dict(logits_scaling=4.0)),
    "phi, biased head": ("Phi", {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_pitfall_10_the_head_is_the_models(family):
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that biases and norms are not at their initial 0 and 1
            parameter.add_(0.3 * torch.randn_like(parameter))
        ids = torch.randint(3, 97, (2, 11))
        logits = model(ids).logits
        hidden = teacher_hidden(model, ids)
        head = ps.Head.from_model(model)
        top = ps.linear_topk(hidden, head, 97)
        expected = ps.topk(logits, 97)
        torch.testing.assert_close(top.lse, expected.lse, rtol=1e-4, atol=1e-4)
        got, want = (t.log_probs.new_zeros(2, 11, 97).scatter(-1, t.ids.long(), t.log_probs) for t in (top, expected))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        self_distilled = ps.linear_distill_loss(hidden, head, ps.LogitsTeacher(logits))
        assert abs(self_distilled.item()) < 1e-5


def test_what_has_no_head_is_refused():
    model = transformers.LlamaModel(transformers.LlamaConfig(**SMALL))
    with pytest.raises(TypeError, match="no output embeddings"):
        ps.Head.from_model(model)


def test_topk_moves_and_indexes_as_one():
    top = ps.topk(torch.randn(3, 5, 20), 4)
    mask = torch.rand(3, 5) > 0.5
    part = top[mask]
    assert part.ids.shape == (int(mask.sum()), 4) and part.log_rest.shape == (int(mask.sum()),)
    assert torch.equal(part.log_probs, top.log_probs[mask])
    assert top.to("cpu").k == 4 and top.counts is None and top.to("cpu").counts is None


def test_topk_carries_every_tensor():
    """What is moved or indexed takes the realised token and the rest at other temperatures along."""
    top = ps.topk(torch.randn(3, 5, 20), 4)
    full = replace(
        top, token_log_probs=torch.randn(3, 5), token_ranks=torch.arange(15).view(3, 5),
        log_rest_at={2.0: torch.randn(3, 5)}, counts=torch.ones(3, 5, 4), sample_temperature=0.8,
    )  # fmt: skip
    for part, pick in ((full[1], lambda x: x[1]), (full.to("cpu"), lambda x: x)):
        for name in ("ids", "log_probs", "log_rest", "lse", "counts", "token_log_probs", "token_ranks"):
            assert torch.equal(getattr(part, name), pick(getattr(full, name))), name
        assert list(part.log_rest_at) == [2.0] and torch.equal(part.log_rest_at[2.0], pick(full.log_rest_at[2.0]))
        assert part.sample_temperature == 0.8
    assert full.to("meta").log_rest_at[2.0].is_meta and top.log_rest_at == {}
    for name in ("token_log_probs", "token_ranks"):
        with pytest.raises(ValueError, match=rf"{name} has shape \[3\]; it must be \[3, 5\]"):
            replace(full, **{name: torch.zeros(3)})
    with pytest.raises(ValueError, match=r"log_rest_at\[2.0\] has shape \[3, 5, 1\]"):
        replace(full, log_rest_at={2.0: torch.randn(3, 5, 1)})
    with pytest.raises(ValueError, match="log_rest_at names the temperature 0.0"):
        replace(full, log_rest_at={0.0: torch.randn(3, 5)})
    with pytest.raises(ValueError, match="sample_temperature names the temperature inf"):
        replace(full, sample_temperature=float("inf"))
