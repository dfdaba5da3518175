"""The head of a Hugging Face model as the model applies it, found out by asking the model.

Families disagree on what happens around the output projection, under the same names: `logits_scaling` divides the
logits in Granite, multiplies them in HyperCLOVA X and divides the hidden states in MiniCPM 3; a multimodal wrapper may
leave out what its text model applies. So the configuration only proposes: the model runs once on two tokens with known
raw logits put in the place of its projection's, and the proposal that gives the model's own logits is taken. Where none
does, the model is refused.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

HIDDEN = (None, "last_hidden_state", "head_input")
# attribute of the text configuration -> the power it usually has as a factor of the logits
SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "output_multiplier": 1, "logits_scaling": -1}
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_softcap")
# divisors of the last hidden state in front of the projection
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")


@dataclass(frozen=True)
class Rule:
    """logits = softcap * tanh(scale * (projection + extra bias) / softcap), of the hidden states' multiple.

    columns: how many logits the model returns (None: not asked). pre_scale: head input over last hidden state, or None
    where one is no multiple of the other.
    """

    scale: float = 1.0
    softcap: float | None = None
    extra_bias: bool = False
    columns: int | None = None
    pre_scale: float | None = 1.0

    def __call__(self, raw: Tensor, extra: Tensor | None) -> Tensor:
        """Logits fp32 [..., V] of raw logits [..., V]."""
        z = raw.float()
        if self.extra_bias and extra is not None:
            z = z + extra.float()
        z = self.scale * z
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


_asked: WeakKeyDictionary[Any, tuple[Any, Rule]] = WeakKeyDictionary()


def head_of(
    model: Any, *, vocab_size: int | None = None, hidden: str | None = None, check: bool = True,
    whole: Callable[[Any], Tensor] = lambda parameter: parameter,
) -> Any:  # fmt: skip
    """potstill.Head of a Hugging Face model; the contract is Head.from_model's. `whole` gathers its parameters."""
    from potstill.teachers import Head

    name = type(model).__name__
    if hidden not in HIDDEN:
        raise ValueError(f"hidden={hidden!r} is not known; known are {', '.join(map(repr, HIDDEN))}")
    module = output_projection(model)
    rule = checked_rule(model, module) if check else remembered_rule(model)
    scale = rule.scale
    bias: Tensor | None = None if module.bias is None else whole(module.bias)
    if hidden != "head_input" and rule.pre_scale != 1.0:
        scale = scale * _pre_scale(name, rule, hidden, bias)
    if rule.extra_bias:
        extra = _extra_bias(model)
        assert extra is not None
        bias = extra.to(module.weight.dtype) if bias is None else bias + extra.to(bias.dtype)
    if vocab_size is None and rule.columns is not None and rule.columns < len(module.weight):
        vocab_size = rule.columns
    return Head(whole(module.weight), bias, logit_scale=scale, softcap=rule.softcap, vocab_size=vocab_size)


def _pre_scale(name: str, rule: Rule, hidden: str | None, bias: Tensor | None) -> float:
    """What the last hidden state is multiplied by on its way to the projection, or the sentence that refuses it."""
    if hidden == "last_hidden_state" and rule.pre_scale is not None and bias is None:
        return rule.pre_scale
    what = "transforms it" if rule.pre_scale is None else f"multiplies it by {rule.pre_scale:.6g}"
    advice = "take hidden states at the projection's input (potstill.integrations.transformers.student_hidden does) "
    advice += "and give hidden='head_input'"
    if rule.pre_scale is not None and bias is None:
        advice = "for hidden_states[-1] give hidden='last_hidden_state'; or " + advice
    raise ValueError(f"{name} does not project its last hidden state: it {what} first; {advice}")


def output_projection(model: Any) -> nn.Linear:
    """The model's output embeddings, a plain linear layer. TypeError or ValueError where there is none."""
    name = type(model).__name__
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if module is None:
        raise TypeError(f"{name} has no output embeddings; Head.from_model takes a model with a language-model head")
    if any(hasattr(module, x) for x in ("lora_A", "base_layer", "modules_to_save")):
        raise ValueError(
            f"the head of {name} is wrapped by an adapter ({type(module).__name__}): its weight alone is not what "
            "the model applies; merge the adapter, or leave the head out of its target modules"
        )
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise TypeError(
            f"the output embeddings of {name} are a {type(module).__name__}, not a plain nn.Linear, and their rule "
            "is not known; build Head(weight, bias, ...) yourself if you know it"
        )
    return module


def text_config(model: Any) -> Any:
    """The part of the configuration that the language model reads."""
    config = model.config
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder", None) is not None:
        return config.decoder
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _extra_bias(model: Any) -> Tensor | None:
    """The bias [V] that Bart and its kin add to the logits."""
    bias = getattr(model, "final_logits_bias", None)
    return bias.reshape(-1) if isinstance(bias, Tensor) else None


def _number(config: Any, attribute: str) -> float | None:
    value = getattr(config, attribute, None)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) and value != 0 else None


def proposals(model: Any) -> Iterator[Rule]:
    """What the configuration can mean, the usual meaning first."""
    config, whole = text_config(model), model.config
    values = {a: _number(config, a) or _number(whole, a) for a in SCALES}
    present = {a: v for a, v in values.items() if v is not None and v != 1.0}
    caps = [c for a in SOFTCAPS for c in (_number(config, a) or _number(whole, a),) if c is not None and c > 0]
    biases = (True, False) if _extra_bias(model) is not None else (False,)
    powers = [sorted((1, 0, -1), key=lambda p, usual=SCALES[a]: p != usual) for a in present]  # type: ignore[misc]
    for extra, cap, chosen in itertools.product(biases, (*dict.fromkeys(caps), None), itertools.product(*powers)):
        scale = math.prod(v**p for v, p in zip(present.values(), chosen, strict=True))
        yield Rule(scale, cap, extra)


def checked_rule(model: Any, module: nn.Linear) -> Rule:
    """The proposal that reproduces the model's logits, asked for once a model and configuration."""
    key = (list(proposals(model)), type(model))
    known = _asked.get(model)
    if known is None or known[0] != key:
        known = key, _ask(model, module, key[0])
        _asked[model] = known
    return known[1]


def remembered_rule(model: Any) -> Rule:
    """What was found when the model was asked (sharding it since changes nothing), else the usual meaning."""
    usual = list(proposals(model))
    known = _asked.get(model)
    return known[1] if known is not None and known[0][0] == usual else usual[0]


def _ask(model: Any, module: nn.Linear, rules: list[Rule]) -> Rule:
    name = type(model).__name__
    given, raw, logits, last = _run(model, module)
    extra = _extra_bias(model)
    columns = logits.shape[-1]
    tolerance = 4 * torch.finfo(raw.dtype).eps
    if columns > raw.shape[-1] or logits.shape[:-1] != raw.shape[:-1]:
        raise ValueError(
            f"{name} returns logits of shape {list(logits.shape)} where its projection gives {list(raw.shape)}: "
            "its head is not supported"
        )
    errors = [_distance(rule(raw, extra)[..., :columns], logits.float()) for rule in rules]
    best = min(range(len(rules)), key=errors.__getitem__)
    if not errors[best] <= tolerance:
        raise ValueError(
            f"the head of {name} is not supported: its logits differ from every rule known for its configuration "
            f"(by {errors[best]:.2g} of the largest at best), so a loss on them would train on another objective; "
            "build Head(weight, bias, logit_scale=..., softcap=...) yourself if you know the rule"
        )
    rule = rules[best]
    pre = _multiple(model, given, last, tolerance)
    return Rule(rule.scale, rule.softcap, rule.extra_bias, columns, pre)


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def _multiple(model: Any, given: Tensor, last: Tensor | None, tolerance: float) -> float | None:
    """s with given = s * last, s a number that the configuration names; None where there is none."""
    if last is None or last.shape != given.shape:
        return None
    config = text_config(model)
    options = [1.0, *(1 / v for a in DIVISORS if (v := _number(config, a)))]
    options += [v**-0.5 for a in ("d_model", "hidden_size") if (v := _number(config, a))]
    if (base := _number(config, "dim_model_base")) and (width := _number(config, "hidden_size")):
        options.append(base / width)
    fits = [s for s in options if _distance(s * last.float(), given.float()) <= tolerance]
    return fits[0] if fits else None


@torch.no_grad()
def _run(model: Any, module: nn.Linear) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(the projection's input, the raw logits put in its place, the model's logits, its last hidden state).

    The model runs as in evaluation, outside autocast; modes and random state are as before afterwards.
    """
    if module.weight.device.type == "meta":
        raise ValueError("the model's head is on the meta device (offloaded or not loaded): load it first")
    given: list[Tensor] = []
    raws: list[Tensor] = []

    def replace(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        given.append(inputs[0])
        generator = torch.Generator().manual_seed(0)
        raw = torch.randn(output.shape, generator=generator)
        reach = torch.logspace(0, 2, max(2, output.shape[-2]))[-output.shape[-2] :, None]  # so that a softcap shows
        raws.append((raw * reach).to(output.device, output.dtype))
        return raws[-1]

    device = module.weight.device
    ids = torch.tensor([_plain_tokens(model, 2)], device=device)
    inputs: dict[str, Any] = {"input_ids": ids, "output_hidden_states": True, "return_dict": True}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    modes = [(m, m.training) for m in model.modules()]
    handle = module.register_forward_hook(replace)
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=False),
        ):
            model.eval()
            output = model(**inputs)
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{type(model).__name__} could not be run on two tokens to check its head ({cause}); "
            "check=False takes what its configuration says unchecked"
        ) from error
    finally:
        handle.remove()
        for m, training in modes:
            m.training = training
    if len(given) != 1 or getattr(output, "logits", None) is None:
        raise ValueError(
            f"{type(model).__name__} called its output embeddings {len(given)} times for one sequence; once is "
            "supported: build Head(weight, bias, ...) yourself if you know what it applies"
        )
    states = getattr(output, "decoder_hidden_states", None) or getattr(output, "hidden_states", None)
    return given[0], raws[0], output.logits, states[-1] if states else None


def _plain_tokens(model: Any, count: int) -> list[int]:
    """Tokens that are no placeholder of an image, a beginning or a padding."""
    special = set()
    for config in (model.config, text_config(model)):
        for name, value in config.to_dict().items():
            if "token" in name and isinstance(value, int):
                special.add(value)
            elif "token" in name and isinstance(value, (list, tuple)):
                special.update(v for v in value if isinstance(v, int))
    size = model.get_input_embeddings().weight.shape[0]
    return [i for i in range(size) if i not in special][:count] or [0]
