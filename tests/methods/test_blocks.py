"""Block-local training and replace-one scoring on a tiny Llama: the same as doing each block by itself."""

from __future__ import annotations

import copy
import itertools

import potstill as ps
import pytest
import torch
from potstill.capture import final_hidden
from potstill.methods import blocks
from torch import nn

from ..tiny_model import tiny_llama

LAYERS = [f"model.layers.{i}" for i in range(3)]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(3, layers=3).double().requires_grad_(False)


@pytest.fixture(scope="module")
def batch():
    return {"input_ids": torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))}


def changed(block, seed=0, by=0.1):
    """A trainable copy of a block with other weights."""
    new = copy.deepcopy(block).requires_grad_(True)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in new.parameters():
            p.add_(by * torch.randn(p.shape, generator=g))
    return new


def normalised(made, wanted):
    return (made - wanted).square().mean() / (wanted.square().mean() + 1e-6)


@pytest.mark.parametrize("backward", [False, True])
def test_together_is_each_alone_on_the_teachers_inputs(model, batch, backward):
    students = {name: changed(model.get_submodule(name), i) for i, name in enumerate(LAYERS)}
    got = blocks.block_losses(model, students, **batch, use_cache=False, loss=normalised, backward=backward)
    if not backward:
        sum(got.values()).backward()
    inputs = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
    x = model.model.embed_tokens(batch["input_ids"])
    places = torch.arange(9)[None]
    rotary = model.model.rotary_emb(x, places)
    for i, name in enumerate(LAYERS):
        alone = copy.deepcopy(students[name])
        alone.zero_grad()
        call = dict(attention_mask=None, position_ids=places, position_embeddings=rotary)
        mask = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
        made = blocks.first_tensor(alone(inputs[i], **{**call, "attention_mask": mask}))
        wanted = blocks.first_tensor(model.get_submodule(name)(inputs[i], **{**call, "attention_mask": mask}))
        loss = normalised(made, wanted)
        torch.testing.assert_close(got[name], loss.detach() if backward else loss, rtol=1e-9, atol=1e-12)
        loss.backward()
        for p, q in zip(students[name].parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_a_block_learns_and_the_assembled_model_comes_nearer(model, batch):
    """A part of a layer, the MLP, replaced by a smaller one: its loss falls, and so does the model's KL with it in."""
    name = "model.layers.1.mlp"
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(32, 24), nn.SiLU(), nn.Linear(24, 32)).double()
    optimizer = torch.optim.Adam(small.parameters(), lr=0.01)
    scores, losses = [], []
    for step in range(120):
        if step in (0, 119):
            scores.append(kl_of(blocks.assembled(model, {name: small}), model, batch))
        found = blocks.block_losses(model, {name: small}, **batch, use_cache=False, backward=True)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(found[name]))
    assert losses[-1] < 0.3 * losses[0] and scores[1] < 0.5 * scores[0]


def run(model, batch):
    return final_hidden(model, **batch, use_cache=False)[0]


def score_with(head):
    return lambda a, b: ps.linear_distill_loss(a, head, ps.HiddenTeacher(b, head))


def kl_of(student, teacher, batch):
    head = ps.Head.from_model(teacher)
    with torch.no_grad():
        return float(score_with(head)(run(student, batch), run(teacher, batch)))


@pytest.mark.parametrize("order", [None, LAYERS])
def test_replace_one_is_a_full_recompute(model, batch, order):
    candidates = {
        LAYERS[0]: {"a": changed(model.model.layers[0], 1), "b": changed(model.model.layers[0], 2, 0.01)},
        LAYERS[2]: {"a": changed(model.model.layers[2], 3)},
    }
    runs = []

    def counted(m, b):
        runs.append(m)
        return run(m, b)

    batches = [batch, {"input_ids": batch["input_ids"].flip(1)}]
    score = score_with(ps.Head.from_model(model))
    got = blocks.replace_one_scores(model, candidates, batches, counted, score, order=order)
    assert set(got) == {(LAYERS[0], "a"), (LAYERS[0], "b"), (LAYERS[2], "a")} and len(runs) == 2 * 4
    for (name, label), value in got.items():
        whole = blocks.assembled(model, {name: candidates[name][label]})
        expected = sum(kl_of(whole, model, b) for b in batches) / 2
        assert value == pytest.approx(expected, rel=1e-9)
    assert got[LAYERS[0], "b"] < got[LAYERS[0], "a"]
    # nothing of the exchange is left
    assert kl_of(model, copy.deepcopy(model), batch) == pytest.approx(0, abs=1e-12)


def test_sums_of_scores_rank_whole_choices(model, batch):
    """One candidate a layer: the sum of their scores orders the choices as the assembled models' divergence does."""
    candidates = {
        name: {str(by): changed(model.get_submodule(name), 10 * i, by) for by in (0.03, 0.1)}
        for i, name in enumerate(LAYERS)
    }
    scores = blocks.replace_one_scores(model, candidates, [batch], run, score_with(ps.Head.from_model(model)))
    sums, whole = [], []
    for labels in itertools.product(("0.03", "0.1"), repeat=len(LAYERS)):
        choice = dict(zip(LAYERS, labels, strict=True))
        sums.append(sum(scores[name, label] for name, label in choice.items()))
        whole.append(kl_of(blocks.assembled(model, {n: candidates[n][x] for n, x in choice.items()}), model, batch))
    ranks = [torch.tensor(x).argsort().argsort().double() for x in (sums, whole)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.8, (sums, whole)


def test_known_prefixes_are_not_computed_again(model, batch):
    calls = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    candidates = {LAYERS[2]: {str(i): model.model.layers[2] for i in range(5)}}
    found = blocks.replace_one_scores(model, candidates, [batch], run, lambda a, b: (a - b).abs().max(), order=LAYERS)
    handle.remove()
    assert len(calls) == 1 and set(found.values()) == {0.0}


def test_refusals(model, batch):
    with pytest.raises(ValueError, match="no module 'model.layers.9'"):
        blocks.block_losses(model, {"model.layers.9": nn.Identity()}, **batch)
    with pytest.raises(ValueError, match="not in order"):
        blocks.replace_one_scores(model, {LAYERS[1]: {}}, [batch], run, max, order=[LAYERS[0]])
    with pytest.raises(TypeError, match="a block gave str"):
        blocks.first_tensor("x")
