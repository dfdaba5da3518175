"""Distils from a teacher cache in a plain PyTorch loop.

python examples/plain_loop.py teacher-cache path/to/student --steps 100
"""

from __future__ import annotations

import argparse

import potstill as ps
import torch
from potstill.integrations.collator import CacheCollator, next_token_labels
from potstill.integrations.transformers import student_hidden
from transformers import AutoModelForCausalLM


def main() -> float:
    parser = argparse.ArgumentParser()
    parser.add_argument("cache")
    parser.add_argument("student")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1)
    args = parser.parse_args()

    cache = ps.cache.open(args.cache)
    student = AutoModelForCausalLM.from_pretrained(args.student).train()
    head = ps.Head.from_model(student, hidden="head_input")  # reads the model's own weight: follows the optimiser
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    loader = torch.utils.data.DataLoader(
        [{"key": key} for key in cache.keys()],
        batch_size=args.batch_size,
        shuffle=True,
        collate_fn=CacheCollator(cache, student.config.eos_token_id or 0),
    )
    batches = (batch for _ in iter(int, 1) for batch in loader)  # over and over
    for step in range(args.steps):
        group = [next(batches) for _ in range(args.accumulate)]
        rows = sum((batch["labels"] != -100).sum() for batch in group)  # one denominator for the whole step
        total = torch.zeros(())
        for batch in group:
            hidden, _ = student_hidden(student, batch)
            teacher = ps.TopK(batch["teacher_ids"], batch["teacher_log_probs"], batch["teacher_log_rest"])
            labels = next_token_labels(batch["labels"])  # labels[i] is token i's; row i predicts the next
            loss = ps.linear_distill_loss(hidden, head, teacher, labels, ce_weight=0.1, num_items=rows)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: {total.item():.4f}")
    return total.item()


if __name__ == "__main__":
    last_loss = main()
