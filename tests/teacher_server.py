"""Servers of a model on 127.0.0.1 that answer as vLLM, SGLang and llama.cpp do, with faults on demand."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

OWNERS = {"vLLM": "vllm", "SGLang": "sglang", "llama.cpp": "llamacpp"}


class TeacherServer(ThreadingHTTPServer):
    """A model behind a server of some kind, and what it was asked."""

    daemon_threads = True

    def __init__(self, model, tokenizer, kind="vLLM", key=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.tokenizer, self.kind, self.key = model, tokenizer, kind, key
        self.owner, self.names, self.most = OWNERS[kind], ["teacher"], 20
        self.address = f"http://127.0.0.1:{self.server_port}/v1"
        self.statuses, self.asked, self.lock = [], [], threading.Lock()
        self.slots, self.context, self.busy, self.busiest = 2, 64, 0, 0  # of llama.cpp
        self.spoil = lambda answer: answer  # changes an answer about a prompt

    def log_probs(self, ids):
        """Those of the token after each of a prompt."""
        with self.lock, torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def models(self):
        return {"object": "list", "data": [{"id": name, "owned_by": self.owner} for name in self.names]}

    def tokenize(self, asked):
        text, special = ("content", "add_special") if self.kind == "llama.cpp" else ("prompt", "add_special_tokens")
        return {"tokens": self.tokenizer(asked[text], add_special_tokens=asked[special])["input_ids"]}

    def vllm(self, asked):
        """`/v1/completions` with `prompt_logprobs`: the likeliest tokens, and the prompt's own with its rank."""
        assert asked["model"] in self.names
        ids, logp, found = asked["prompt"], self.log_probs(asked["prompt"]), [None]
        for row, own in zip(logp[:-1], ids[1:], strict=True):
            ranks = row.argsort(descending=True).argsort()
            named = {*row.topk(asked["prompt_logprobs"]).indices.tolist(), own}
            found.append({str(i): {"logprob": row[i].item(), "rank": int(ranks[i]) + 1, "decoded_token": "x"} for i in named})
        return {"choices": [{"index": 0, "text": "x", "prompt_logprobs": found}]}

    def sglang(self, asked):
        """`/generate` with `return_logprob` from the first token on."""
        assert (asked["return_logprob"], asked["logprob_start_len"]) == (True, 0)
        ids, logp = asked["input_ids"], self.log_probs(asked["input_ids"])
        tops = [row.topk(asked["top_logprobs_num"]) for row in logp[:-1]]
        tables = [[[p, i, None] for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)] for top in tops]
        own = [[None, ids[0], None], *([logp[n, token].item(), token, None] for n, token in enumerate(ids[1:]))]
        return {"text": "x", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": [None, *tables]}}

    def llamacpp(self, asked):
        """`/completion` with `n_probs`: the likeliest tokens at the place that is generated, if that is no part of a letter."""
        with self.lock:
            self.busy += 1
            self.busiest = max(self.busy, self.busiest)
        top = self.log_probs(asked["prompt"])[-1].topk(asked["n_probs"])
        rows = [{"id": i, "logprob": p} for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
        with self.lock:
            self.busy -= 1
        answer = {"content": "x", "tokens_evaluated": len(asked["prompt"])}
        if rows[0]["id"] % 2 and not asked.get("logit_bias"):
            return answer
        return {**answer, "completion_probabilities": [{**rows[0], "top_logprobs": rows}]}

    def props(self):
        return {"total_slots": self.slots, "default_generation_settings": {"n_ctx": self.context}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        props = {"/props": lambda asked: self.server.props()} if self.server.kind == "llama.cpp" else {}
        self._reply({"/v1/models": lambda asked: self.server.models(), **props}, None)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        prompts = {"vLLM": ("/v1/completions", server.vllm), "SGLang": ("/generate", server.sglang),
                   "llama.cpp": ("/completion", server.llamacpp)}  # fmt: skip
        path, answer = prompts[server.kind]
        self._reply({"/tokenize": server.tokenize, path: lambda asked: server.spoil(answer(asked))}, asked)

    def _reply(self, routes, asked):
        server, status, said = self.server, 200, {}
        with server.lock:
            server.asked.append((self.path, asked, self.headers.get("Authorization")))
            if server.statuses:
                status, said = server.statuses.pop(0), {"error": {"message": f"no: {self.headers.get('Authorization')}"}}
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            status = 401
        elif status == 200 and self.path not in routes:
            status = 404
        elif status == 200 and asked and asked.get("prompt_logprobs", 0) > server.most:
            status = 400
            said = {"error": {"message": f"Requested prompt logprobs of {asked['prompt_logprobs']}, more than {server.most}"}}
        elif status == 200:
            said = routes[self.path](asked)
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(*args, **kwargs):
    """A server that answers until the context ends."""
    server = TeacherServer(*args, **kwargs)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
