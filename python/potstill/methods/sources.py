"""Sources of rollouts: a transformers model, vLLM or what is called like it, a mixture of two models token by token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .rollout import FirstError, Ids, Source, pad


def model_source(
    model: Any,
    *,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    **options: Any,
) -> Source:
    """`model.generate` of a transformers causal LM as a `Source`; completions end with their first end of text.

    Sampling is what is said here (default: softmax(logits) as it is) and nothing that the model's own generation_config
    asks for. Prompts are padded on the left. Evaluation mode lasts for the call; the global random state is left alone.
    options: further fields of transformers.GenerationConfig.
    """
    from transformers import GenerationConfig

    sampling = {} if greedy else {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    ends = set(_ends(eos_token_id))

    def generate(prompts: Sequence[Ids], max_new_tokens: int, seed: int) -> list[list[int]]:
        device = next(model.parameters()).device
        tokens, mask = (x.to(device) for x in pad(prompts, pad_token_id, left=True))
        config = GenerationConfig(
            do_sample=not greedy,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=pad_token_id,
            use_cache=True,
            **{**sampling, **options},
        )
        with _evaluating(model), _own_generation_config(model), _seeded(device, seed), torch.no_grad():
            found = model.generate(tokens, attention_mask=mask.long(), generation_config=config)
        return [_cut(row, ends) for row in found[:, tokens.shape[1] :].tolist()]

    return generate


def vllm_source(llm: Any, sampling_params: Any) -> Source:
    """vLLM's `LLM`, or anything with its `generate(prompts, sampling_params)`, as a `Source`.

    sampling_params: a callable (max_new_tokens, seed) -> what generate takes, for instance
    `lambda n, seed: SamplingParams(max_tokens=n, seed=seed, temperature=1.0)`. Prompts are given as
    {"prompt_token_ids": [...]}; of each answer `outputs[0].token_ids` are the completion.
    """

    def generate(prompts: Sequence[Ids], max_new_tokens: int, seed: int) -> list[list[int]]:
        asked = [{"prompt_token_ids": list(p)} for p in prompts]
        answers = llm.generate(asked, sampling_params(max_new_tokens, seed % 2**31))
        return [list(a.outputs[0].token_ids) for a in answers]

    return generate


def mixture_source(
    student: Any,
    teacher: Any,
    *,
    teacher_weight: float,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int,
    temperature: float = 1.0,
) -> Source:
    """Each token drawn from teacher_weight * p + (1 - teacher_weight) * q, both at `temperature` (MiniLLM's
    teacher-mixed sampling, arXiv:2306.08543, without its importance weights).

    student, teacher: transformers causal LMs of one vocabulary, each with its own key-value cache.
    """
    if not 0 <= teacher_weight <= 1 or temperature <= 0:
        raise ValueError(f"teacher_weight={teacher_weight} must lie in 0..1 and temperature={temperature} be above 0")
    ends = torch.tensor(_ends(eos_token_id), dtype=torch.int64)
    models = [(m, w) for m, w in ((student, 1 - teacher_weight), (teacher, teacher_weight)) if w > 0]

    @torch.no_grad()
    def generate(prompts: Sequence[Ids], max_new_tokens: int, seed: int) -> list[list[int]]:
        tokens, mask = pad(prompts, pad_token_id, left=True)
        g = torch.Generator().manual_seed(seed)
        with contextlib.ExitStack() as stack:
            for model, _ in models:
                stack.enter_context(_evaluating(model))
            decoders = [(_Decoder(m, tokens, mask), w) for m, w in models]
            done = torch.zeros(len(prompts), dtype=torch.bool)
            written: list[Tensor] = []
            while len(written) < max_new_tokens and not done.all():
                probs: Any = sum(w * (d.logits / temperature).softmax(-1) for d, w in decoders)
                token = torch.multinomial(probs, 1, generator=g)[:, 0]
                written.append(token)
                done |= torch.isin(token, ends)
                if len(written) < max_new_tokens and not done.all():
                    for decoder, _ in decoders:
                        decoder.step(token)
        return [_cut(row, set(ends.tolist())) for row in torch.stack(written, 1).tolist()]

    return generate


class _Decoder:
    """One model's key-value cache over left-padded prompts; `logits` float32 [B, V] of the next token, on the CPU."""

    def __init__(self, model: Any, tokens: Tensor, mask: Tensor) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.mask = mask.long()
        self.cache: Any = None
        self._forward(tokens, (self.mask.cumsum(-1) - 1).clamp(min=0))

    def step(self, token: Tensor) -> None:
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        self._forward(token[:, None], self.mask.sum(-1, keepdim=True) - 1)

    def _forward(self, tokens: Tensor, positions: Tensor) -> None:
        out = self.model(
            input_ids=tokens.to(self.device),
            attention_mask=self.mask.to(self.device),
            position_ids=positions.to(self.device),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = out.past_key_values
        self.logits = out.logits[:, -1].float().cpu()


def outside_top_k(model: Any, k: int, *, pad_token_id: int) -> FirstError:
    """The first token of a completion that is not among the model's k most probable there (the acceptance rule of
    speculative knowledge distillation, arXiv:2410.11325); one forward pass, no key-value cache.
    """

    def accepted(row: Tensor, following: Tensor) -> Tensor:
        own = row.gather(-1, following[..., None])
        return (row > own).sum(-1) < k  # ties with the k-th are inside

    return _first(model, accepted, pad_token_id)


def below_log_prob(model: Any, least: float, *, pad_token_id: int) -> FirstError:
    """The first token of a completion whose log-probability under the model is below `least` nats."""

    def accepted(row: Tensor, following: Tensor) -> Tensor:
        return row.log_softmax(-1).gather(-1, following[..., None])[..., 0] >= least

    return _first(model, accepted, pad_token_id)


def _first(model: Any, accepted: Any, pad_token_id: int) -> FirstError:
    def first_error(prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[int]:
        device = next(model.parameters()).device
        tokens, mask = pad([[*p, *c] for p, c in zip(prompts, completions, strict=True)], pad_token_id)
        found = []
        with _evaluating(model), torch.no_grad():
            logits = model(tokens.to(device), attention_mask=mask.long().to(device), use_cache=False).logits.float()
        for row, p, c in zip(range(len(tokens)), prompts, completions, strict=True):
            if not len(c):
                found.append(0)
                continue
            at = slice(len(p) - 1, len(p) + len(c) - 1)
            good = accepted(logits[row, at], torch.tensor(list(c), dtype=torch.int64, device=device))
            found.append(int(good.long().cumprod(0).sum()))
        return found

    return first_error


def _ends(eos_token_id: int | Sequence[int] | None) -> list[int]:
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def _cut(row: list[int], ends: set[int]) -> list[int]:
    """Up to and with the first end-of-text token."""
    at = next((i for i, t in enumerate(row) if t in ends), len(row) - 1)
    return row[: at + 1]


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """A plain generation_config for the call: fields that a caller leaves at None would be filled from the model's."""
    from transformers import GenerationConfig

    before = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
