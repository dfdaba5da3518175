"""Head.from_model applies what the model applies, checked against the model's own logits, family by family."""

from __future__ import annotations

import inspect

import potstill as ps
import pytest
import torch
from potstill.capture.hidden import final_hidden, unwrap
from torch import nn

transformers = pytest.importorskip("transformers")

V = 97
SMALL = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64,
)  # fmt: skip
GPT = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, rotary_dim=8)
BART = dict(
    vocab_size=V, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    max_position_embeddings=64, forced_eos_token_id=None,
)  # fmt: skip
OPT = dict(BART, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=48)
T5 = dict(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
MAMBA = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4)
MOE = dict(num_local_experts=2, num_experts_per_tok=1)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)
# class, configuration, and what is unusual: scale, softcap, bias, head input over last hidden state
FAMILIES = {
    "llama": ("LlamaForCausalLM", SMALL, {}),
    "llama, tied": ("LlamaForCausalLM", dict(SMALL, tie_word_embeddings=True), {}),
    "llama, biased attention": ("LlamaForCausalLM", dict(SMALL, attention_bias=True), {}),
    "mistral": ("MistralForCausalLM", SMALL, {}),
    "qwen2": ("Qwen2ForCausalLM", SMALL, {}),
    "qwen3": ("Qwen3ForCausalLM", SMALL, {}),
    "olmo": ("OlmoForCausalLM", SMALL, {}),
    "olmo2": ("Olmo2ForCausalLM", SMALL, {}),
    "nemotron": ("NemotronForCausalLM", SMALL, {}),
    "stablelm": ("StableLmForCausalLM", SMALL, {}),
    "starcoder2": ("Starcoder2ForCausalLM", SMALL, {}),
    "opt": ("OPTForCausalLM", OPT, {}),
    "gpt2, tied": ("GPT2LMHeadModel", GPT, {}),
    "gpt_neox": ("GPTNeoXForCausalLM", SMALL, {}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", GPT, {}),
    "gptj": ("GPTJForCausalLM", GPT, dict(bias=True)),
    "codegen": ("CodeGenForCausalLM", GPT, dict(bias=True)),
    "phi": ("PhiForCausalLM", SMALL, dict(bias=True)),
    "ctrl": ("CTRLLMHeadModel", dict(vocab_size=V, n_embd=32, n_layer=1, n_head=2, dff=48), dict(bias=True)),
    "gemma": ("GemmaForCausalLM", SMALL, {}),
    "gemma2": ("Gemma2ForCausalLM", dict(SMALL, final_logit_softcapping=0.5), dict(softcap=0.5)),
    "gemma2, no softcap": ("Gemma2ForCausalLM", dict(SMALL, final_logit_softcapping=None), {}),
    "gemma3 text": ("Gemma3ForCausalLM", dict(SMALL, final_logit_softcapping=0.7), dict(softcap=0.7)),
    "nanochat": ("NanoChatForCausalLM", dict(SMALL, final_logit_softcapping=0.9), dict(softcap=0.9)),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        dict(SMALL, logits_soft_cap=0.8, lru_width=32, num_hidden_layers=3),
        dict(softcap=0.8),
    ),
    "cohere": ("CohereForCausalLM", dict(SMALL, logit_scale=0.25), dict(scale=0.25)),
    "cohere2": ("Cohere2ForCausalLM", dict(SMALL, logit_scale=0.3), dict(scale=0.3)),
    "granite, divides": ("GraniteForCausalLM", dict(SMALL, logits_scaling=4.0), dict(scale=0.25)),
    "granitemoe, divides": ("GraniteMoeForCausalLM", dict(SMALL, logits_scaling=5.0, **MOE), dict(scale=0.2)),
    "hyperclovax, multiplies": ("HyperCLOVAXForCausalLM", dict(SMALL, logits_scaling=4.0), dict(scale=4.0)),
    "minicpm3, divides the hidden": (
        "MiniCPM3ForCausalLM",
        dict(SMALL, num_key_value_heads=4, hidden_size=32, dim_model_base=8, **LATENT),
        dict(pre=0.25),
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        dict(SMALL, lm_head_multiplier=0.4, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
        dict(scale=0.4),
    ),
    "mamba, fp32 logits": ("MambaForCausalLM", MAMBA, {}),
    "bert, transform and bias": (
        "BertLMHeadModel", dict(SMALL, is_decoder=True), dict(bias=True, pre=None)
    ),
    "modernbert decoder, transform": (
        "ModernBertDecoderForCausalLM", dict(SMALL, cls_token_id=1, sep_token_id=2), dict(bias=True, pre=None)
    ),
    "bert, masked": ("BertForMaskedLM", SMALL, dict(bias=True, pre=None)),
    "t5, tied: scales": ("T5ForConditionalGeneration", T5, dict(pre=32**-0.5)),
    "bart, final_logits_bias": ("BartForConditionalGeneration", BART, dict(bias=True)),
    "marian, final_logits_bias": ("MarianMTModel", BART, dict(bias=True)),
}  # fmt: skip
SOFT = dict(SMALL, final_logit_softcapping=0.6)
COMPOSED = {
    "gemma3, multimodal": ("Gemma3ForConditionalGeneration", "Gemma3TextConfig", SOFT, "SiglipVisionConfig"),
    "paligemma over gemma2": ("PaliGemmaForConditionalGeneration", "Gemma2Config", SOFT, "SiglipVisionConfig"),
    "llava over llama": ("LlavaForConditionalGeneration", "LlamaConfig", SMALL, "CLIPVisionConfig"),
    "llava over gemma2": ("LlavaForConditionalGeneration", "Gemma2Config", SOFT, "CLIPVisionConfig"),
    "aya_vision over cohere2": (
        "AyaVisionForConditionalGeneration", "Cohere2Config", dict(SMALL, logit_scale=0.3), "SiglipVisionConfig",
    ),
    "idefics3": ("Idefics3ForConditionalGeneration", "LlamaConfig", SMALL, "Idefics3VisionConfig"),
}  # fmt: skip


def named(name: str) -> type:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)


def built(name: str, **config) -> nn.Module:
    """The tiny model with every parameter and bias away from its initial 0 or 1."""
    cls = named(name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**config)).eval()
    return shaken(model)


def composed(family: str) -> nn.Module:
    name, text, words, vision = COMPOSED[family]
    return built(name, text_config=named(text)(**words), vision_config=named(vision)(**VISION))


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def inputs_of(model: nn.Module) -> dict:
    ids = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    inputs = dict(input_ids=ids)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.flip(-1)
    return inputs


def applied(head: ps.Head, hidden: torch.Tensor) -> torch.Tensor:
    """The formula of Head's docstring."""
    z = head.logit_scale * (hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return z[..., : head.vocab_size]


@torch.no_grad()
def check(model: nn.Module, pre: float | None = 1.0) -> ps.Head:
    """Both ways to take hidden states give the model's logits; where they differ, the head must be told which."""
    inputs = inputs_of(model)
    out = model(**inputs, output_hidden_states=True)
    states = out.decoder_hidden_states if "decoder_input_ids" in inputs else out.hidden_states
    head = ps.Head.from_model(model, hidden="head_input")
    torch.testing.assert_close(applied(head, head_input(model, inputs)), out.logits, rtol=1e-4, atol=1e-4)
    if pre == 1.0:
        assert ps.Head.from_model(model).logit_scale == head.logit_scale
        torch.testing.assert_close(applied(head, states[-1]), out.logits, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="does not project its last hidden state.*head_input"):
            ps.Head.from_model(model)
    if pre is None:
        with pytest.raises(ValueError, match="transforms it first"):
            ps.Head.from_model(model, hidden="last_hidden_state")
    else:
        last = ps.Head.from_model(model, hidden="last_hidden_state")
        assert last.logit_scale == pytest.approx(pre * head.logit_scale)
        torch.testing.assert_close(applied(last, states[-1]), out.logits, rtol=1e-4, atol=1e-4)
    # through the library, softcap and all: the model's own logits as teacher are matched
    loss = ps.linear_distill_loss(head_input(model, inputs), head, ps.LogitsTeacher(out.logits))
    assert abs(loss.item()) < 1e-5
    return head


def head_input(model: nn.Module, inputs: dict) -> torch.Tensor:
    return final_hidden(model, all_logits=True, **inputs)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_pitfall_10_the_head_is_the_models(family):
    name, config, expected = FAMILIES[family]
    if family == "recurrent_gemma" and transformers.__version__.startswith("4.51"):
        pytest.skip("of that release it keeps the last batch's state, and its size, whatever use_cache says")
    head = check(built(name, **config), expected.get("pre", 1.0))
    assert head.logit_scale == pytest.approx(expected.get("scale", 1.0))
    assert head.softcap == expected.get("softcap") and (head.bias is not None) == expected.get("bias", False)


@pytest.mark.parametrize("family", COMPOSED)
def test_what_a_multimodal_wrapper_applies_counts_not_what_its_text_model_would(family):
    check(composed(family))


@pytest.mark.parametrize("family", ["gemma2", "cohere", "phi", "granite, divides"])
def test_gradient_through_the_models_own_head(family):
    """Loss and gradient through from_model's head equal autograd through the model's logits."""
    name, config, _ = FAMILIES[family]
    model = built(name, **config).double()
    inputs = inputs_of(model)
    teacher = torch.randn(2, 7, V, dtype=torch.float64)
    hidden = head_input(model, inputs)
    fused = ps.linear_distill_loss(hidden, ps.Head.from_model(model), ps.LogitsTeacher(teacher))
    plain = torch.nn.functional.kl_div(
        model(**inputs).logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum"
    )
    used = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(fused, used, allow_unused=True)
    want = torch.autograd.grad(plain / 14, used, allow_unused=True)
    rtol = dict(rtol=1e-5, atol=1e-6)  # norms inside these models compute in fp32
    torch.testing.assert_close(fused, plain / 14, **rtol)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **rtol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite, divides", "phi", "mamba, fp32 logits"])
def test_16_bit_models_are_recognised(family, dtype):
    name, config, expected = FAMILIES[family]
    head = ps.Head.from_model(built(name, **config).to(dtype))
    assert head.logit_scale == pytest.approx(expected.get("scale", 1.0)) and head.softcap == expected.get("softcap")


def test_padded_vocabulary_is_the_users_word():
    """Qwen pads its matrix: the columns past the tokenizer's length get no mass when vocab_size says so."""
    model = built("Qwen2ForCausalLM", **dict(SMALL, vocab_size=128))
    assert ps.Head.from_model(model).vocab_size == 128
    head = ps.Head.from_model(model, vocab_size=V)
    inputs = inputs_of(model)
    with torch.no_grad():
        logits = model(**inputs).logits[..., :V]
        top = ps.linear_topk(head_input(model, inputs), head, 5)
    torch.testing.assert_close(top.lse, logits.logsumexp(-1), rtol=1e-4, atol=1e-4)


class Odd(transformers.LlamaForCausalLM):
    """A family nobody has heard of: its own rule after the projection."""

    def rule(self, logits):
        return 3.0 * logits

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.rule(out.logits)
        return out


class Capped(Odd):
    def rule(self, logits):
        return 15 * torch.tanh(logits / 15)


class Masked(Odd):
    def rule(self, logits):
        logits = logits.clone()
        logits[..., 40:43] = torch.finfo(logits.dtype).min
        return logits


class Narrow(Odd):
    def rule(self, logits):
        return logits[..., :90]


@pytest.mark.parametrize("cls", [Odd, Capped, Masked])
def test_an_unknown_rule_is_refused_by_name(cls):
    model = cls(transformers.LlamaConfig(**SMALL))
    with pytest.raises(ValueError, match=f"{cls.__name__} is not supported.*another objective"):
        ps.Head.from_model(model)
    assert ps.Head.from_model(model, check=False).logit_scale == 1.0


def test_a_model_that_drops_its_padding_columns_has_a_smaller_vocabulary():
    model = shaken(Narrow(transformers.LlamaConfig(**SMALL)).eval())
    assert check(model).vocab_size == 90


def test_the_question_leaves_no_trace_and_is_asked_once():
    model = built("GraniteForCausalLM", **dict(SMALL, logits_scaling=4.0, attention_dropout=0.5)).train()
    model.model.layers[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    heads = [ps.Head.from_model(model) for _ in range(3)]
    assert len(calls) == 1 and [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert not model.lm_head._forward_hooks and heads[2].weight is model.lm_head.weight
    model.config.logits_scaling = 2.0
    assert ps.Head.from_model(model).logit_scale == 0.5 and len(calls) == 2


def test_what_has_no_plain_head_is_refused():
    with pytest.raises(TypeError, match="no output embeddings"):
        ps.Head.from_model(transformers.LlamaModel(transformers.LlamaConfig(**SMALL)))
    model = built("LlamaForCausalLM", **SMALL)
    with pytest.raises(ValueError, match="hidden='logits'"):
        ps.Head.from_model(model, hidden="logits")

    class Normed(nn.Linear):
        def forward(self, x):
            return super().forward(x / x.norm(dim=-1, keepdim=True))

    model.lm_head = Normed(32, V, bias=False)
    with pytest.raises(TypeError, match="Normed, not a plain nn.Linear"):
        ps.Head.from_model(model)


def test_a_model_that_cannot_run_on_two_tokens_says_why():
    model = built("LlamaForCausalLM", **SMALL)
    model.model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ValueError, match="LlamaForCausalLM could not be run.*ZeroDivisionError.*check=False"):
        ps.Head.from_model(model)


def test_adapters():
    """LoRA inside the model is part of its hidden states; on the head it is refused."""
    peft = pytest.importorskip("peft")
    inside = peft.get_peft_model(built("LlamaForCausalLM", **SMALL), peft.LoraConfig(target_modules=["q_proj"]))
    head = ps.Head.from_model(inside)
    assert head.weight is unwrap(inside).lm_head.weight
    check(unwrap(shaken(inside)))
    on_head = peft.get_peft_model(built("LlamaForCausalLM", **SMALL), peft.LoraConfig(target_modules=["lm_head"]))
    saved = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    for model in (on_head, peft.get_peft_model(built("LlamaForCausalLM", **SMALL), saved)):
        with pytest.raises(ValueError, match="wrapped by an adapter.*merge"):
            ps.Head.from_model(model)
