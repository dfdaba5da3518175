"""Bytes on the wire and parsing speed of servers' answers: `python bench/servers.py` from the repository's root.

Answers of 1,024 tokens at k = 64 over V = 152,064, as each server writes them; CPU seconds of one process, best of 5.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from potstill.integrations.servers import sglang_answer, vllm_answer  # noqa: E402

from tests.integrations import row_server  # noqa: E402

LENGTH, VOCAB, K = 1024, 152_064, 64


def main() -> None:
    g = torch.Generator().manual_seed(0)
    lp = torch.cat([(3 * torch.randn(128, VOCAB, generator=g)).log_softmax(-1) for _ in range(LENGTH // 128)])
    tokens = torch.randint(0, VOCAB, (LENGTH,), generator=g).tolist()
    cases = {
        "vLLM, dict": (row_server.vllm_body(lp, tokens, K), vllm_answer),
        "vLLM, flat": (row_server.vllm_body(lp, tokens, K, flat=True), vllm_answer),
        "SGLang": (row_server.sglang_body(lp, tokens, K), sglang_answer),
    }
    print("| answer, k=64 | bytes a token | JSON, tokens/s | rows, tokens/s | together, tokens/s |")
    print("| --- | --- | --- | --- | --- |")
    for name, (body, read) in cases.items():
        text = json.dumps(body).encode()
        decoded, parsed = [], []
        for _ in range(5):
            start = time.process_time()
            answer = json.loads(text)
            between = time.process_time()
            read(answer, tokens, k=K, vocab_size=VOCAB)
            decoded.append(between - start)
            parsed.append(time.process_time() - between)
        j, r = LENGTH / min(decoded), LENGTH / min(parsed)
        print(f"| {name} | {len(text) / LENGTH:,.0f} | {j:,.0f} | {r:,.0f} | {1 / (1 / j + 1 / r):,.0f} |")


if __name__ == "__main__":
    main()
