"""Distils from a teacher cache with accelerate: one process or many, FSDP2 included.

accelerate launch examples/accelerate_loop.py teacher-cache path/to/student --steps 100
"""

from __future__ import annotations

import argparse

import potstill as ps
import torch
from accelerate import Accelerator
from potstill.distributed import materialized_head
from potstill.integrations.collator import CacheCollator, next_token_labels
from potstill.integrations.transformers import student_hidden
from transformers import AutoModelForCausalLM


def main() -> float:
    parser = argparse.ArgumentParser()
    parser.add_argument("cache")
    parser.add_argument("student")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()

    accelerator = Accelerator()
    cache = ps.cache.open(args.cache)
    model = AutoModelForCausalLM.from_pretrained(args.student).train()
    ps.Head.from_model(model, hidden="head_input")  # held against its logits once, before it may be cut
    loader = torch.utils.data.DataLoader(
        [{"key": key} for key in cache.keys()],
        batch_size=args.batch_size,
        shuffle=True,
        collate_fn=CacheCollator(cache, model.config.eos_token_id or 0),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = (batch for _ in iter(int, 1) for batch in loader)
    for step in range(args.steps):
        batch = next(batches)
        rows = accelerator.reduce((batch["labels"] != -100).sum())  # of all processes
        hidden, _ = student_hidden(model, batch)
        teacher = ps.TopK(batch["teacher_ids"], batch["teacher_log_probs"], batch["teacher_log_rest"])
        labels = next_token_labels(batch["labels"])
        with materialized_head(model, hidden="head_input", dtype=hidden.dtype) as head, accelerator.autocast():
            loss = ps.linear_distill_loss(hidden, head, teacher, labels, ce_weight=0.1, num_items=rows)
        accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over processes
        optimizer.step()
        optimizer.zero_grad()
        total = accelerator.reduce(loss.detach()).item()
        accelerator.print(f"step {step}: {total:.4f}")
    return total


if __name__ == "__main__":
    last_loss = main()
