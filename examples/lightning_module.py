"""Distils from a teacher cache with PyTorch Lightning.

python examples/lightning_module.py teacher-cache path/to/student --steps 100
"""

from __future__ import annotations

import argparse

import potstill as ps
import pytorch_lightning as lightning
import torch
from potstill.distributed import materialized_head
from potstill.integrations.collator import CacheCollator, next_token_labels
from potstill.integrations.transformers import student_hidden
from transformers import AutoModelForCausalLM


class Distil(lightning.LightningModule):
    def __init__(self, student: torch.nn.Module) -> None:
        super().__init__()
        self.student = student
        ps.Head.from_model(student, hidden="head_input")  # held against its logits once, before it may be cut

    def training_step(self, batch: dict, _: int) -> torch.Tensor:
        rows = (batch["labels"] != -100).sum()
        everyone = self.all_gather(rows).sum()
        hidden, _ = student_hidden(self.student, batch)
        teacher = ps.TopK(batch["teacher_ids"], batch["teacher_log_probs"], batch["teacher_log_rest"])
        labels = next_token_labels(batch["labels"])
        with materialized_head(self.student, hidden="head_input", dtype=hidden.dtype) as head:
            loss = ps.linear_distill_loss(hidden, head, teacher, labels, ce_weight=0.1, num_items=everyone)
        self.log("loss", loss.detach(), prog_bar=True, reduce_fx="sum")
        return loss * self.trainer.world_size  # gradients are averaged over processes

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def main() -> float:
    parser = argparse.ArgumentParser()
    parser.add_argument("cache")
    parser.add_argument("student")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    cache = ps.cache.open(args.cache)
    student = AutoModelForCausalLM.from_pretrained(args.student).train()
    collate = CacheCollator(cache, student.config.eos_token_id or 0)
    data = [{"key": key} for key in cache.keys()]
    loader = torch.utils.data.DataLoader(data, batch_size=args.batch_size, shuffle=True, collate_fn=collate)
    trainer = lightning.Trainer(max_steps=args.steps, logger=False, enable_checkpointing=False)
    trainer.fit(Distil(student), loader)
    return float(trainer.callback_metrics["loss"])


if __name__ == "__main__":
    last_loss = main()
