"""The losses that bench/parity.py asks: ours and those of other packages, each called as its own documentation says.

A subject that has no way to be told something raises NotOffered; one whose package is absent is left out of the table.
`pip install "potstill[rivals]"` brings Liger-Kernel and TRL; torchtune 0.6.1 also needs torchao and omegaconf.
"""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore", category=FutureWarning)


class NotOffered(Exception):
    """The subject has no argument for this."""


@dataclass
class Side:
    """Hidden states [N, D] and a head [V, D] with what the model does to its logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    def double(self) -> Side:
        """fp64 leaves of the same numbers."""
        bias = None if self.bias is None else self.bias.double()
        h, w = (x.detach().double().requires_grad_() for x in (self.hidden, self.weight))
        return replace(self, hidden=h, weight=w, bias=bias)

    def logits(self) -> Tensor:
        """As the model would return them."""
        z = self.hidden @ self.weight.T
        z = self.scale * (z if self.bias is None else z + self.bias)
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        return z if self.vocab_size is None else z[..., : self.vocab_size]


class Subject:
    """name in the table, package on PyPI. `loss` returns the mean over rows whose label is not -100."""

    name, package = "", ""
    chunks = True  # works from hidden states and heads, in chunks
    cross_entropy = (
        False  # the value of its forward KL is the cross-entropy with the teacher; said once, and held to that
    )

    @property
    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def loss(self, s: Side, t: Side, labels: Tensor | None = None, *, beta: float = 0.0, temperature: float = 1.0,
             num_items: int | None = None, chunk: int = 1024) -> Tensor:  # fmt: skip
        """beta 0: forward KL, 1: reverse KL, between: JSD with m = beta * teacher + (1 - beta) * student."""
        raise NotImplementedError

    def precisely(self) -> Subject:
        """The same, with matrix products as exact as it offers them."""
        return self

    def topk_loss(self, zs: Tensor, zt: Tensor, k: int) -> Tensor:
        """Mean forward KL over k entries and one for the rest, the k entries the same on both sides."""
        raise NotOffered("no top-k loss")


class Potstill(Subject):
    name, package = "potstill", "potstill"
    precise = False

    @property
    def version(self) -> str:
        import potstill

        return potstill.__version__

    def loss(self, s, t, labels=None, *, beta=0.0, temperature=1.0, num_items=None, chunk=1024):
        import potstill as ps

        kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta) or ps.divergences.jsd(teacher_weight=beta)
        heads = [
            ps.Head(x.weight, x.bias, logit_scale=x.scale, softcap=x.softcap, vocab_size=x.vocab_size) for x in (s, t)
        ]
        return ps.linear_distill_loss(
            s.hidden, heads[0], ps.HiddenTeacher(t.hidden, heads[1]), labels, divergence=kind, temperature=temperature,
            num_items=num_items, chunk_rows=chunk, precise=self.precise,
        )  # fmt: skip

    def precisely(self):
        exact = type(self)()
        exact.precise = True
        return exact

    def topk_loss(self, zs, zt, k):
        import potstill as ps

        return ps.distill_loss(zs, ps.topk(zt, k), tail="bucket")


class Liger(Subject):
    name, package = "Liger chunked JSD", "liger-kernel"

    def loss(self, s, t, labels=None, *, beta=0.0, temperature=1.0, num_items=None, chunk=1024):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        if s.softcap or t.softcap or s.scale != 1 or t.scale != 1:
            raise NotOffered("no argument for softcap or logit scale")
        if num_items is not None:
            raise NotOffered("no argument for an outside denominator")
        if labels is None:
            labels = torch.zeros(s.hidden.shape[:-1], dtype=torch.int64)
        # vocab_size: its own rule for a wider teacher applies, there is no argument
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=temperature, compiled=False,
            chunk_size=chunk,
        )  # fmt: skip
        return loss(s.hidden, s.weight, t.hidden, t.weight, labels, s.bias, t.bias)


class TrlChunked(Subject):
    name, package = "TRL chunked divergence", "trl"

    def loss(self, s, t, labels=None, *, beta=0.0, temperature=1.0, num_items=None, chunk=1024):
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        lead = s.hidden.shape[:-1]
        mask = torch.ones(lead) if labels is None else (labels != -100).to(torch.float32)
        batch = (lambda x: x[None]) if s.hidden.dim() == 2 else (lambda x: x)
        return _chunked_divergence_loss(
            batch(s.hidden), batch(t.hidden), s.weight, t.weight, batch(mask), beta, num_items_in_batch=num_items,
            student_lm_head_bias=s.bias, teacher_lm_head_bias=t.bias, student_logit_scale=s.scale,
            teacher_logit_scale=t.scale, student_final_logit_softcapping=s.softcap,
            teacher_final_logit_softcapping=t.softcap, temperature=temperature,
        )[0]  # fmt: skip


class TrlGkd(Subject):
    name, package = "TRL on logits (GKD, SDFT)", "trl"
    chunks = False

    def loss(self, s, t, labels=None, *, beta=0.0, temperature=1.0, num_items=None, chunk=1024):
        from trl.experimental.gkd.gkd_trainer import GKDTrainer

        s_logits, t_logits = whole(s), whole(t)
        if labels is None:
            labels = torch.zeros(s_logits.shape[:-1], dtype=torch.int64)
        return GKDTrainer.generalized_jsd_loss(
            s_logits, t_logits.detach(), labels, beta=beta, temperature=temperature, num_items_in_batch=num_items
        )

    def topk_loss(self, zs, zt, k):
        from trl.experimental.sdft.loss_utils import compute_topk_self_distillation_loss

        return compute_topk_self_distillation_loss(
            zs, zt, distillation_topk=k, distillation_alpha=0.0, distillation_add_tail=True
        ).mean()


class Torchtune(Subject):
    name, package = "torchtune KD on logits", "torchtune"
    cross_entropy = True
    chunks = False

    def loss(self, s, t, labels=None, *, beta=0.0, temperature=1.0, num_items=None, chunk=1024):
        from torchtune.modules.loss import ForwardKLLoss, ReverseKLLoss

        if beta not in (0.0, 1.0):
            raise NotOffered("no JSD")
        if temperature != 1.0:
            raise NotOffered("no temperature")
        if num_items is not None:
            raise NotOffered("no argument for an outside denominator")
        s_logits, t_logits = whole(s), whole(t)
        if labels is None:
            labels = torch.zeros(s_logits.shape[:-1], dtype=torch.int64)
        return (ForwardKLLoss() if beta == 0.0 else ReverseKLLoss())(s_logits, t_logits.detach(), labels)


def whole(side: Side) -> Tensor:
    """The model's logits, its padding columns included: what a loss on logits is handed."""
    return replace(side, vocab_size=None).logits()


SUBJECTS: list[Subject] = [Potstill(), Liger(), TrlChunked(), TrlGkd(), Torchtune()]
