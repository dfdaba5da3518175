"""Teacher rows from servers: what vLLM, SGLang and OpenAI-like servers answer -> `TopK`, and the client that asks.

Every parser gives `ServerRows`: row i predicts tokens[i + 1], the realised token is kept apart, and a row that cannot
be used is left empty and counted by reason. `potstill build --server` writes a cache of them.
"""

from __future__ import annotations

from .columns import axolotl_rows, trl_rows
from .http import Client, Retry, ServerError
from .openai import TokenStrings, openai_answer, openai_chat_rows, openai_request, openai_rows
from .rows import ServerRows, topk_rows
from .sglang import sglang_answer, sglang_request, sglang_rows
from .vllm import vllm_answer, vllm_request, vllm_rows

__all__ = [
    "Client",
    "Retry",
    "ServerError",
    "ServerRows",
    "TokenStrings",
    "axolotl_rows",
    "openai_answer",
    "openai_chat_rows",
    "openai_request",
    "openai_rows",
    "sglang_answer",
    "sglang_request",
    "sglang_rows",
    "topk_rows",
    "trl_rows",
    "vllm_answer",
    "vllm_request",
    "vllm_rows",
]
