"""Rollouts: who writes, the first error, regeneration, padding and key-value caches, and the two recipes."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from potstill.methods import on_policy, rollout, sources

from ..tiny_model import tiny_llama

PAD, EOS, V = 0, 1, 40
PROMPTS = [[5, 6, 7, 8, 9], [3], [11, 12], [4, 4, 4, 2, 30, 31, 32]]
WORDS = {"eos_token_id": EOS, "pad_token_id": PAD}


@pytest.fixture(scope="module")
def models():
    return tuple(tiny_llama(s, vocab_size=V, pad_token_id=PAD, initializer_range=0.2) for s in (0, 1))


def plain(model, tokens):
    """float32 log-probabilities [L, V] of one sequence, without padding or cache."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float().log_softmax(-1)


def greedy(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(plain(model, tokens)[-1].argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def constant(*completion):
    return lambda prompts, room, seed: [list(completion)[:room] for _ in prompts]


# ---- sources ----


def test_left_padding_and_the_cache_change_no_token(models):
    found = sources.model_source(models[0], greedy=True, **WORDS)(PROMPTS, 9, seed=3)
    assert found == [greedy(models[0], p, 9) for p in PROMPTS]


def test_the_models_own_generation_config_does_not_sample(models):
    """A hub model's top_k = 1 would make every draw the most probable token."""
    trap = copy.deepcopy(models[0])
    trap.generation_config.top_k, trap.generation_config.temperature = 1, 0.01
    trap.train()
    state = torch.get_rng_state()
    drawn = sources.model_source(trap, **WORDS)([[5, 6]] * 600, 1, seed=7)
    assert torch.equal(torch.get_rng_state(), state) and trap.training and trap.generation_config.top_k == 1
    counts = torch.bincount(torch.tensor(drawn)[:, 0], minlength=V) / 600
    p = plain(models[0], [5, 6])[-1].exp()
    assert (counts - p).abs().max() < 5 * (p.max() * (1 - p.max()) / 600) ** 0.5
    again = sources.model_source(trap, **WORDS)([[5, 6]] * 600, 1, seed=7)
    other = sources.model_source(trap, **WORDS)([[5, 6]] * 600, 1, seed=8)
    assert again == drawn != other


class Engine:
    """Answers as vLLM's LLM does."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def generate(self, prompts, params):
        self.calls.append(params)
        made = [greedy(self.model, p["prompt_token_ids"], params.max_tokens) for p in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(m))]) for m in made]


def test_a_vllm_like_engine_writes(models):
    engine = Engine(models[0])
    source = sources.vllm_source(engine, lambda n, seed: SimpleNamespace(max_tokens=n, seed=seed))
    assert source(PROMPTS, 5, 2**40 + 3) == [greedy(models[0], p, 5) for p in PROMPTS]
    assert engine.calls[0].max_tokens == 5 and engine.calls[0].seed == 3


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_mixture_draws_from_the_mixed_distribution(models, weight):
    source = sources.mixture_source(*models, teacher_weight=weight, **WORDS)
    found = source([[9, 8, 7]] * 500 + [[2]] * 500, 2, seed=1)
    for at, prompt in ((slice(0, 500), [9, 8, 7]), (slice(500, 1000), [2])):  # the short prompt is padded
        q, p = (plain(m, prompt)[-1].exp() for m in models)
        mixed = weight * p + (1 - weight) * q
        counts = torch.bincount(torch.tensor([c[0] for c in found[at]]), minlength=V) / 500
        assert (counts - mixed).abs().max() < 5 * (mixed.max() * (1 - mixed.max()) / 500) ** 0.5
    assert found == source([[9, 8, 7]] * 500 + [[2]] * 500, 2, seed=1)


def test_the_mixtures_key_value_cache_and_positions_are_exact(models):
    """Logits of every step, of ragged prompts, against a plain forward of each sequence alone."""
    tokens, mask = rollout.pad(PROMPTS, PAD, left=True)
    decoder = sources._Decoder(models[0], tokens, mask)
    whole = [list(p) for p in PROMPTS]
    for step in range(4):
        for row, sequence in enumerate(whole):
            torch.testing.assert_close(decoder.logits[row].log_softmax(-1), plain(models[0], sequence)[-1])
        token = torch.tensor([7 + step, 3, 30, 2])
        for row, sequence in enumerate(whole):
            sequence.append(int(token[row]))
        with torch.no_grad():
            decoder.step(token)


# ---- rollouts ----


def test_sources_come_in_their_proportions_and_by_seed():
    writers = {"student": constant(2, 3), "teacher": constant(4), "data": None}
    parts = {"student": 0.5, "teacher": 0.2, "data": 0.3}
    make = {"max_new_tokens": 4, "pad_token_id": PAD}
    rolls = rollout.Rollouts(writers, parts, seed=1, **make)
    given = [[9, 9, 9]] * 2000
    found = rolls([[5]] * 2000, completions=given, step=0)
    for name, part in parts.items():
        assert abs(found.sources.count(name) / 2000 - part) < 0.05
    for tokens, source in zip(found.tokens.tolist(), found.sources, strict=True):
        assert tokens[1:] == {"student": [2, 3, 0], "teacher": [4, 0, 0], "data": [9, 9, 9]}[source]
    same = rollout.Rollouts(writers, parts, seed=1, **make)([[5]] * 2000, completions=given, step=0)
    later, other = rolls.draw(2000, 1), rollout.Rollouts(writers, parts, seed=2, **make).draw(2000, 0)
    assert same.sources == found.sources and later != found.sources != other


def test_seeds_make_rollouts_reproducible_whatever_else_is_drawn(models):
    rolls = rollout.Rollouts(
        {"student": sources.model_source(models[0], **WORDS)}, {"student": 1.0}, max_new_tokens=6, pad_token_id=PAD
    )
    one = rolls(PROMPTS, step=4)
    torch.rand(100)
    assert torch.equal(one.tokens, rolls(PROMPTS, step=4).tokens)
    assert not torch.equal(one.tokens, rolls(PROMPTS, step=5).tokens)


def test_labels_are_the_tokens_of_the_completions():
    found = rollout.Rollouts({"data": None}, {"data": 1.0}, max_new_tokens=9, pad_token_id=PAD)(
        [[5, 6], [7]], completions=[[1, 2, 3], [4]]
    )
    assert found.tokens.tolist() == [[5, 6, 1, 2, 3], [7, 4, 0, 0, 0]]
    assert found.mask.sum(1).tolist() == [5, 2]
    assert found.labels.tolist() == [[-100, 1, 2, 3, -100], [4, -100, -100, -100, -100]]
    assert found.first_error.tolist() == [3, 1]


@pytest.mark.parametrize("k", [1, 4, 12])
def test_the_first_error_is_exact(models, k):
    g = torch.Generator().manual_seed(k)
    completions = [torch.randint(2, V, (n,), generator=g).tolist() for n in (6, 0, 9, 3)]
    completions[0] = greedy(models[1], PROMPTS[0], 6)  # no error at all
    found = sources.outside_top_k(models[1], k, pad_token_id=PAD)(PROMPTS, completions)
    least = sources.below_log_prob(models[1], -3.0, pad_token_id=PAD)(PROMPTS, completions)
    for at, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
        lp = plain(models[1], prompt + completion)[len(prompt) - 1 :]
        errors = [i for i, t in enumerate(completion) if t not in lp[i].topk(k).indices.tolist()]
        assert found[at] == (errors[0] if errors else len(completion))
        errors = [i for i, t in enumerate(completion) if lp[i, t] < -3.0]
        assert least[at] == (errors[0] if errors else len(completion))
    assert found[0] == len(completions[0]) and found[1] == 0


def test_another_writes_on_from_the_first_error():
    """A 7 is an error; the mender writes 8s behind what precedes it, and each repair is looked at again."""

    def first_error(prompts, completions):
        return [c.index(7) if 7 in c else len(c) for c in completions]

    asked = []

    def mender(prompts, room, seed):
        asked.append(([list(p) for p in prompts], room))
        return [[8, 7, 8][:room] if len(asked) == 1 else [8] * room for _ in prompts]

    words = {"max_new_tokens": 4, "pad_token_id": PAD, "first_error": first_error}
    given = [[2, 7, 2], [2, 3], [7, 7, 7, 7]]
    rolls = rollout.Rollouts({"data": None}, {"data": 1.0}, regenerate=mender, rounds=2, **words)
    found = rolls([[5], [5, 5], [6]], completions=given)
    # room 3 behind [5, 2], room 4 behind [6]
    assert asked[:2] == [([[5, 2]], 3), ([[6]], 4)]
    assert found.first_error.tolist() == [1, 2, 0]
    assert found.sources == ["data+regenerated", "data", "data+regenerated"]
    assert [t for t in found.tokens[0].tolist() if t] == [5, 2, 8, 8, 8] and 7 not in found.tokens
    assert found.labels[0].tolist() == [2, 8, 8, 8, -100]
    # without a mender: learnt from up to and with the error, which is where the teacher has most to say
    cut = rollout.Rollouts({"data": None}, {"data": 1.0}, learn_past_error=False, **words)(
        [[5], [5, 5], [6]], completions=given
    )
    assert cut.labels.tolist() == [[2, 7, -100, -100, -100], [-100, 2, 3, -100, -100], [7, -100, -100, -100, -100]]


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"probabilities": {"student": 0.5}}, "sum of 1"),
        ({"probabilities": {"teacher": 1.0}}, r"name \['teacher'\]"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"learn_past_error": False}, "need first_error"),
        ({"sources": {"student": constant(*range(9))}}, "none longer"),
        ({"sources": {"student": None}}, "give completions"),
        ({"sources": {"student": lambda prompts, room, seed: []}}, "gave 0 completions"),
        ({"first_error": lambda p, c: [9]}, r"first_error gave \[9\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, sentence):
    words = {"sources": {"student": constant(3)}, "probabilities": {"student": 1.0}, "max_new_tokens": 4}
    words = {**words, "pad_token_id": PAD, **change}
    if "9" in sentence or "longer" in sentence:
        words["sources"] = {
            "student": lambda prompts, room, seed: [[3] * (9 if "longer" in sentence else 1)] * len(prompts)
        }
    with pytest.raises(ValueError, match=sentence):
        rollout.Rollouts(**words)([[5]])
    with pytest.raises(ValueError, match="prompts of at least 1 token"):
        rollout.Rollouts({"s": constant(3)}, {"s": 1.0}, max_new_tokens=4, pad_token_id=PAD)([[]])


# ---- the loss and the recipes ----


def by_hand(student, teacher, found, divergence):
    """Mean of the divergence over the rows of the completions, sequence by sequence, without padding."""
    rows = []
    for tokens, mask, start in zip(found.tokens, found.mask, found.prompt_lengths.tolist(), strict=True):
        tokens = tokens[mask].tolist()
        at = slice(start - 1, len(tokens) - 1)
        p, q = plain(teacher, tokens)[at], plain(student, tokens)[at]
        rows.append(divergence(p, q))
    return torch.cat(rows).mean()


def kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def jsd(w):
    def value(p, q):
        m = torch.logaddexp(p + torch.tensor(w).log(), q + torch.tensor(1 - w).log())
        return w * kl(p, m) + (1 - w) * kl(q, m)

    return value


def test_gkd_is_the_jsd_of_the_rows_of_its_sequences(models):
    student, teacher = models
    given = [[9, 10, 11], [12], [13, 14], [15]]
    recipe = on_policy.gkd(student, max_new_tokens=5, on_policy=0.5, teacher_weight=0.9, seed=3, **WORDS)
    found = recipe.rollouts(PROMPTS, completions=given, step=1)
    assert {"student", "data"} == set(found.sources)
    loss = recipe.loss(student, teacher, found)
    torch.testing.assert_close(loss, by_hand(student, teacher, found, jsd(0.9)), atol=1e-5, rtol=1e-4)
    loss.backward()
    assert student.model.embed_tokens.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    student.zero_grad()
    assert abs(recipe.loss(teacher, teacher, found).item()) < 1e-6


def test_distillspec_lowers_the_drafts_rejections(models):
    draft, target = copy.deepcopy(models[0]), models[1]
    recipe = on_policy.distillspec(draft, target, max_new_tokens=6, **WORDS)
    found = recipe.rollouts(PROMPTS, step=0)
    expected = by_hand(draft, target, found, lambda p, q: (p.exp() - q.exp()).abs().sum(-1) / 2)
    torch.testing.assert_close(recipe.loss(draft, target, found), expected, atol=1e-5, rtol=1e-4)
    before = on_policy.acceptance_rate(draft, target, found)
    assert before == pytest.approx(1 - expected.item(), abs=1e-5)
    optimizer = torch.optim.Adam(draft.parameters(), 3e-3)
    for step in range(25):
        loss = recipe.loss(draft, target, recipe.rollouts(PROMPTS, step=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert on_policy.acceptance_rate(draft, target, recipe.rollouts(PROMPTS, step=99)) > before + 0.05
    mixed = on_policy.distillspec(draft, target, max_new_tokens=6, teacher_weight=0.5, divergence="forward_kl", **WORDS)
    found = mixed.rollouts(PROMPTS)
    torch.testing.assert_close(
        mixed.loss(draft, target, found), by_hand(draft, target, found, kl), atol=1e-5, rtol=1e-4
    )


def test_speculative_kd_leaves_only_what_the_teacher_accepts(models):
    student, teacher = models
    recipe = on_policy.speculative_kd(student, teacher, max_new_tokens=6, k=5, **WORDS)
    found = recipe.rollouts(PROMPTS)
    assert any(s.endswith("+regenerated") for s in found.sources)
    completions = [t[m][n:].tolist() for t, m, n in zip(found.tokens, found.mask, found.prompt_lengths, strict=True)]
    errors = sources.outside_top_k(teacher, 5, pad_token_id=PAD)(PROMPTS, completions)
    assert errors == [len(c) for c in completions]
    assert recipe.loss(student, teacher, found) > 0
