"""A small server that speaks OpenAI's protocol, with a tiny model behind it; it can be told to fail first."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from tenfold.engines.requests import Request
from tenfold.engines.session import Session
from tenfold.models.tiny import tiny_model


class Stub:
    """What the server does.

    Args:
        opened: the model that answers.
    """

    def __init__(self, opened=None):
        self.opened = opened or tiny_model("llama")
        self.session, self.lock = Session(self.opened), threading.Lock()
        self.script = []
        """Statuses and headers to answer with before anything works; ``"drop"`` hangs up, ``"garbage"`` is not JSON."""
        self.seen, self.running, self.most, self.delay = [], 0, 0, 0.0
        self.scores = True

    def answer(self, path, body):
        chat = path.endswith("/chat/completions")
        if body.get("echo"):
            return self._echo(body) if self.scores else {"choices": [{"text": body["prompt"]}]}
        messages, prefill = list(body.get("messages", ())), ""
        if body.get("continue_final_message"):
            prefill = messages.pop()["content"]
        request = Request(
            None if chat else body["prompt"],
            messages,
            prefill=prefill,
            stop=tuple(body.get("stop", ())),
            choices=tuple(body.get("structured_outputs", {}).get("choice", ())),
            seed=body["seed"],
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
        )
        with self.lock:
            reply = self.session.generate([request])[0]
            top = self._top(request) if body.get("top_logprobs") and self.scores else None
        choice = {"finish_reason": reply.finish, **({"logprobs": {"content": [{"top_logprobs": top}]}} if top else {})}
        choice |= {"message": {"role": "assistant", "content": reply.text}} if chat else {"text": reply.text}
        total = reply.prompt_tokens + reply.tokens
        usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens, "total_tokens": total}
        return {"choices": [choice], "usage": usage}

    @torch.no_grad()
    def _logs(self, text):
        ids = self.opened.tokenizer(text)["input_ids"]
        return ids, self.opened.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)

    def _echo(self, body):
        """One token is one byte, so for ASCII one character; the token that is written is told as well."""
        ids, logs = self._logs(body["prompt"])
        ids.append(int(logs[-1].argmax()))
        values = [None, *(float(logs[at, token]) for at, token in enumerate(ids[1:]))]
        return {"choices": [{"logprobs": {"text_offset": list(range(len(ids))), "token_logprobs": values}}]}

    def _top(self, request):
        prompt = self.session._prompt(request, 0).text
        values, tokens = self._logs(prompt)[1][-1].topk(20)
        pairs = zip(tokens.tolist(), values.tolist(), strict=True)
        return [{"token": self.opened.tokenizer.decode([token]), "logprob": value} for token, value in pairs]


@contextmanager
def serving(stub):
    """The address of the server while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub.lock:
                stub.seen.append((time.monotonic(), self.path, body, self.headers.get("Authorization")))
                stub.running += 1
                stub.most = max(stub.most, stub.running)
                first = stub.script.pop(0) if stub.script else None
            time.sleep(stub.delay)
            try:
                if first == "drop":
                    self.close_connection = True
                    return
                status, headers = first if isinstance(first, tuple) else (200, {})
                said = b"<html>" if first == "garbage" else b"{}"
                if first is None:
                    said = json.dumps(stub.answer(self.path, body)).encode()
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(said))}.items():
                    self.send_header(key, value)
                self.end_headers()
            finally:  # before the last byte: a client that has it may ask again while this thread waits for its turn
                with stub.lock:
                    stub.running -= 1
            self.wfile.write(said)

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            """A client that has stopped waiting is no error of the server."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
