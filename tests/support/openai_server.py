"""An OpenAI-compatible server over one small model, for the tests; started as its own process.

What it does beside answering is chosen by the name of the model in a request:

    NAME            answers
    NAME:apart      takes the thinking out of the text, as vLLM's reasoning parsers do
    NAME:stripped   does so and drops the white space around the parts, as others do
    NAME:other      writes other markers
    NAME:opened     as if the chat template had written the open marker
    NAME:flaky      every second request fails with 503
    NAME:down       every request fails with 503
    NAME:garbage    sends text that is no chat completion
    NAME:strange    sends JSON of another form
    NAME:hang       never answers
    NAME:cut        closes the connection in the middle of an answer
    NAME:picky      refuses prompts that hold the word "books" with 400
    NAME:held       answers some, and the others only when GET /go has been asked for
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

NAME = "trio"
LOCK = threading.Lock()
SEEN: list[dict[str, Any]] = []
SOME = threading.Semaphore(8)


class Model:
    def __init__(self, folder: str) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, request: dict[str, Any]) -> tuple[str, bool]:
        head = self.tokenizer.apply_chat_template(
            request["messages"],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            **request.get("chat_template_kwargs", {}),
        )
        temperature = request.get("temperature", 0)
        drawing = {"do_sample": True, "temperature": temperature} if temperature else {}
        with LOCK, torch.inference_mode():
            torch.manual_seed(request.get("seed", 0))
            ids = self.model.generate(
                **head, max_new_tokens=request["max_tokens"], pad_token_id=0, **drawing
            )[0, head["input_ids"].shape[1] :].tolist()
        ended = ids[-1] == self.tokenizer.eos_token_id
        return self.tokenizer.decode(ids[:-1] if ended else ids), ended


class Handler(BaseHTTPRequestHandler):
    model: Model

    def do_GET(self) -> None:
        if self.path == "/go":
            SOME.release(1000)
        self.send(200, {"seen": SEEN})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        SEEN.append({**request, "authorization": self.headers.get("Authorization")})
        name, _, way = request["model"].partition(":")
        prompt = request["messages"][0]["content"]
        if self.path != "/v1/chat/completions" or name != NAME:
            self.send(404, {"error": {"message": f"The model `{name}` does not exist."}})
        elif way == "down" or (way == "flaky" and len(SEEN) % 2):
            self.send(503, {"detail": "busy"})
        elif way == "garbage":
            self.send_text(200, "<html>It works!</html>")
        elif way == "strange":
            self.send(200, {"choices": [{"text": "an older API"}]})
        elif way == "picky" and "books" in prompt:
            self.send(400, {"error": "the prompt is too long"})
        elif way == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"mess')
        elif way == "hang":
            time.sleep(60)
        else:
            if way == "held":
                SOME.acquire()
            self.send(200, self.completion(request, way))

    def completion(self, request: dict[str, Any], way: str) -> dict[str, Any]:
        text, ended = self.model.answer(request)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if way in ("apart", "stripped"):
            thinking, _, response = text.partition("</think>")
            thinking = thinking.replace("<think>", "")
            if way == "stripped":
                thinking, response = thinking.strip(), response.strip()
            message = {"role": "assistant", "content": response, "reasoning_content": thinking}
        if way == "other":
            message["content"] = text.replace("think>", "reasoning>")
        if way == "opened":
            message["content"] = text.replace("<think>", "").lstrip()
        reason = "stop" if ended else "length"
        return {
            "object": "chat.completion",
            "model": request["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        }

    def send(self, code: int, content: dict[str, Any]) -> None:
        self.send_text(code, json.dumps(content))

    def send_text(self, code: int, text: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    Handler.model = Model(sys.argv[1])
    ThreadingHTTPServer.daemon_threads = True
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(server.server_port, flush=True)  # noqa: T201 - the tests wait for it
        server.serve_forever()


if __name__ == "__main__":
    main()
