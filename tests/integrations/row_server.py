"""A small HTTP server that answers as vLLM, SGLang and OpenAI-like servers do, with the rows of a real tiny model.

`faults` are spent one a request, before anything is answered: a status (429 may carry a Retry-After: `(429, "1")`), or
"reset" (the connection is closed without a word), "silent" (nothing comes until the server is closed), "cut" (the body
is shorter than its Content-Length), "half" (a whole body of half the JSON), "html" (200 and no JSON).
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from .. import tiny_model

VOCAB = 300


def ascii_tokenizer(extra: tuple[str, ...] = ()):
    """300 ids with a text each that no other has: byte-level BPE over printable ASCII, pairs of letters,
    end-of-text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ", *extra]
    letters = "etaoinshrdlucmfwgypbvk"
    pairs = [(a, b) for a in letters for b in letters][: VOCAB - 1 - len(plain)]
    vocab = {token: i for i, token in enumerate([*plain, *(a + b for a, b in pairs)])}
    backend = Tokenizer(models.BPE(vocab, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def tiny_llama(seed: int = 0):
    return tiny_model.tiny_llama(seed, vocab_size=VOCAB, pad_token_id=0)


@torch.no_grad()
def log_probs(model, tokens) -> torch.Tensor:
    """float32 [L, V]: row i is the model's distribution of the token after tokens[0..i]."""
    return model(torch.as_tensor(tokens, dtype=torch.int64)[None]).logits[0].log_softmax(-1)


def top(row, k):
    values, ids = row.topk(k)
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def rank(row, token):
    """As vLLM counts: entries at least as probable, so that ties inflate it."""
    return int((row >= row[token]).sum())


def vllm_prompt(lp, tokens, k):
    """The dict form: the prompt's own token first, then the k most probable."""
    out = [None]
    for row, token in zip(lp[:-1], tokens[1:], strict=True):
        entry = {str(token): {"logprob": row[token].item(), "rank": rank(row, token), "decoded_token": f"t{token}"}}
        for n, (i, value) in enumerate(top(row, k), start=1):
            entry[str(i)] = {"logprob": value, "rank": n, "decoded_token": f"t{i}"}
        out.append(entry)
    return out


def vllm_flat(lp, tokens, k):
    """The flat form: the prompt's own token stands first, and again where it is among the k."""
    flat = {
        "start_indices": [0],
        "end_indices": [0],
        "token_ids": [],
        "logprobs": [],
        "ranks": [],
        "decoded_tokens": [],
    }
    for row, token in zip(lp[:-1], tokens[1:], strict=True):
        flat["start_indices"].append(len(flat["token_ids"]))
        for n, (i, value) in enumerate([(token, row[token].item()), *top(row, k)]):
            flat["token_ids"].append(i)
            flat["logprobs"].append(value)
            flat["ranks"].append(n or rank(row, token))
            flat["decoded_tokens"].append(f"t{i}")
        flat["end_indices"].append(len(flat["token_ids"]))
    return flat


def vllm_body(lp, tokens, k, *, flat=False):
    sampled = int(lp[-1].argmin())  # an unlucky draw, outside the k
    named = {f"token_id:{i}": value for i, value in [(sampled, lp[-1][sampled].item()), *top(lp[-1], k)]}
    logprobs = {"tokens": [f"token_id:{sampled}"], "token_logprobs": [lp[-1][sampled].item()], "top_logprobs": [named]}
    prompt = (vllm_flat if flat else vllm_prompt)(lp, tokens, k)
    choice = {"index": 0, "text": "?", "logprobs": logprobs, "finish_reason": "length", "prompt_logprobs": prompt}
    return {"id": "cmpl-1", "object": "text_completion", "model": "tiny", "choices": [choice]}


def sglang_body(lp, tokens, k):
    own = [[None, tokens[0], None]]
    own += [[row[token].item(), token, None] for row, token in zip(lp[:-1], tokens[1:], strict=True)]
    tops = [None, *([[value, i, None] for i, value in top(row, k)] for row in lp[:-1])]
    last = [[value, i, None] for i, value in top(lp[-1], k)]
    meta = {
        "prompt_tokens": len(tokens),
        "completion_tokens": 1,
        "input_token_logprobs": own,
        "input_top_logprobs": tops,
    }
    meta |= {"output_token_logprobs": [last[0]], "output_top_logprobs": [last]}
    return {"text": "?", "output_ids": [last[0][1]], "meta_info": meta}


def openai_body(lp, tokens, k, tokenizer):
    text = [tokenizer.decode([i]) for i in range(VOCAB)]
    drawn = int(lp[-1].argmax())
    shown = [*tokens, drawn]
    tops = [None]
    for row, token in zip(lp, shown[1:], strict=True):
        tops.append({text[i]: value for i, value in [*top(row, k), (token, row[token].item())]})
    own = [None, *(row[token].item() for row, token in zip(lp, shown[1:], strict=True))]
    logprobs = {"tokens": [text[i] for i in shown], "token_logprobs": own, "top_logprobs": tops}
    return {"object": "text_completion", "choices": [{"index": 0, "text": "?", "logprobs": logprobs}]}


class RowServer:
    """Serves on 127.0.0.1 while the with-block lasts. `asked` are the prompts that got an answer, in order."""

    def __init__(self, model, tokenizer=None, *, flat=False, change=lambda body: body, after=None):
        self.model, self.tokenizer, self.flat, self.change, self.after = model, tokenizer, flat, change, after
        self.faults: list = []
        self.asked: list[tuple[int, ...]] = []
        self.seen = 0
        self.headers: list[dict[str, str]] = []
        self.lock, self.closing = threading.Lock(), threading.Event()

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.answer(self, body)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def answer(self, handler, body):
        with self.lock:
            self.seen += 1
            self.headers.append(dict(handler.headers))
            fault = self.faults.pop(0) if self.faults else None
        if fault == "reset":
            handler.close_connection = True
            return
        if fault == "silent":
            self.closing.wait()
            return
        if fault is not None and not isinstance(fault, str):
            status, after = fault if isinstance(fault, tuple) else (fault, None)
            send(handler, status, json.dumps({"error": {"message": f"status {status}\nas planned"}}), after=after)
            return
        content = "<html>busy</html>" if fault == "html" else json.dumps(self.rows(handler.path, body))
        if fault == "half":
            content = content[: len(content) // 2]
        send(handler, 200, content, cut=fault == "cut")

    def rows(self, path, body):
        tokens = body["input_ids"] if path == "/generate" else body["prompt"]
        with self.lock:
            lp = log_probs(self.model, tokens)
            self.asked.append(tuple(tokens))
        if path == "/generate":
            found = sglang_body(lp, tokens, body["top_logprobs_num"])
        elif "prompt_logprobs" in body:
            found = vllm_body(lp, tokens, body["prompt_logprobs"], flat=self.flat)
        else:
            assert body["echo"]
            found = openai_body(lp, tokens, body["logprobs"], self.tokenizer)
        return self.change(found)


def send(handler, status, content, *, after=None, cut=False):
    data = content.encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    if after is not None:
        handler.send_header("Retry-After", after)
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2] if cut else data)
