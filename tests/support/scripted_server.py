"""An OpenAI-compatible server that says what a test has written down, and fails as it is told.

`replies`: the text for each prompt; a pair stands for thinking that the server has taken out, and
a text that ends with CUT for one that the token limit has ended. `faults`: what the first requests
get instead of an answer, one after the other:

    429, 500, ...    that status (429 with Retry-After: 0)
    "cut"            the connection closed in the middle of the answer
    "garbage"        text that is no JSON
    "strange"        JSON that is no chat completion
    "hang"           nothing, until the server is closed
    None             an answer after all
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CUT = "<cut>"
Reply = str | tuple[str, str]


class Script:
    """What the server does, and what it has seen."""

    def __init__(self, replies: Callable[[str], Reply], faults: list[int | str | None]) -> None:
        self.replies, self.faults = replies, faults
        self.asked: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.url = ""

    def next_fault(self, prompt: str) -> int | str | None:
        with self.lock:
            self.asked.append(prompt)
            return self.faults.pop(0) if self.faults else None


def _handler(script: Script) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = request["messages"][0]["content"]
            script.requests.append(request)
            fault = script.next_fault(prompt)
            if isinstance(fault, int):
                self.send(fault, {"error": {"message": "told to"}})
            elif fault == "cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [{"mess')
            elif fault == "garbage":
                self.send(200, "<html>")
            elif fault == "strange":
                self.send(200, {"choices": []})
            elif fault == "hang":
                script.closed.wait()
            else:
                self.send(200, completion(script.replies(prompt)))

        def send(self, code: int, content: object) -> None:
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            if code == 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def completion(reply: Reply) -> dict[str, Any]:
    reasoning, text = reply if isinstance(reply, tuple) else (None, reply)
    ended = not text.endswith(CUT)
    text = text.removesuffix(CUT)
    message = {"role": "assistant", "content": text, "reasoning_content": reasoning}
    tokens = len(f"{reasoning or ''} {text}".split())
    choice = {"index": 0, "message": message, "finish_reason": "stop" if ended else "length"}
    return {"choices": [choice], "usage": {"completion_tokens": tokens}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # as servers of models have; 5 would make clients wait a second


@contextmanager
def serving(
    replies: Callable[[str], Reply], faults: Sequence[int | str | None] = ()
) -> Iterator[Script]:
    script = Script(replies, list(faults))
    server = _Server(("127.0.0.1", 0), _handler(script))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield script
    finally:
        script.closed.set()
        server.shutdown()
        thread.join()
        server.server_close()
