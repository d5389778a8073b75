"""A model behind an OpenAI-compatible server: chat completions, several at a time.

Requests go through urllib, as no HTTP client is a dependency on every Python: huggingface_hub 1
brings httpx, 2 brings httpx2, which needs Python 3.11. The hub's own session will not do: with
HF_HUB_OFFLINE it refuses every address, servers of the local network too.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rain_mergekit.data_building.tasks import Sampling, Task, Written
from rain_mergekit.errors import RainError

# Fields in which servers return thinking that they removed from the text (vLLM: both).
_REASONING = ("reasoning_content", "reasoning")
_MOST_BYTES = 64 * 1024**2
_TRANSIENT = {408, 409, 425, 429}
_OF_ONE_PROMPT = {400, 413, 422}  # too long for the model, or refused by its template
PAUSE = 1.0  # seconds before a request is tried again, doubled each time
_LONGEST_WAIT = 60.0  # seconds that a server may ask for by Retry-After


@dataclass(frozen=True)
class Address:
    """Where the server is; `key_variable` names the environment variable that holds its key.

    extra: further fields of each request, which the server may know or not. drawing: how the
    model's makers recommend to draw tokens; empty: the server's own way.
    """

    url: str
    model: str
    timeout: float
    parallel: int
    retries: int
    key_variable: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    drawing: Mapping[str, Any] = field(default_factory=dict)


class ServerWriter:
    """One request an answer, each with its own seed; repeatability depends on the server."""

    def __init__(
        self,
        address: Address,
        sampling: Sampling,
        url: str,
        headers: Mapping[str, str],
        opener: urllib.request.OpenerDirector,
    ) -> None:
        """url, headers: of each request, which goes through `opener`."""
        self._address, self._sampling = address, sampling
        self._url, self._headers, self._opener = url, dict(headers), opener
        self.refused: list[str] = []

    @classmethod
    def of(cls, address: Address, sampling: Sampling) -> ServerWriter:
        """Nothing is sent yet.

        Raises:
            RainError: the address is none of a server, or the variable holds no key.
        """
        url = _endpoint(address.url)
        headers = {"Content-Type": "application/json", **_key(address.key_variable)}
        return cls(address, sampling, url, headers, _opener(url))

    @property
    def identity(self) -> Mapping[str, Any]:
        """Address, model name, and what else it is told; which weights it runs is not known."""
        # The template's arguments are told beside.
        extra = {n: v for n, v in self._address.extra.items() if n != "chat_template_kwargs"}
        told = {"drawing": dict(self._address.drawing), "extra_body": extra}
        given = {name: value for name, value in told.items() if value}
        return {"server": self._url, "model": self._address.model, **given}

    def write(
        self, tasks: Sequence[Task], is_done: Callable[[Task], bool]
    ) -> Iterator[list[tuple[Task, Written]]]:
        """Answers as they come. RainError if the server cannot be used; other errors are retried.

        Before that, what is being answered already is waited for: no finished answer is lost. A
        prompt that the server refuses gives no answer; the reason goes to `refused`.
        """
        waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
        found: queue.SimpleQueue[tuple[Task, Written | Exception]] = queue.SimpleQueue()
        open_tasks = [task for task in tasks if not is_done(task)]
        for task in open_tasks:
            waiting.put(task)
        stop = threading.Event()
        for _ in range(min(self._address.parallel, len(open_tasks))):
            # Daemons: an interruption must not wait for answers that may take minutes.
            arguments = (waiting, found, stop)
            threading.Thread(target=self._work, args=arguments, daemon=True).start()
        failure: Exception | None = None
        left = len(open_tasks)
        try:
            while left > (waiting.qsize() if failure else 0):
                task, outcome = found.get()
                left -= 1
                if isinstance(outcome, _RefusedError):
                    self.refused.append(str(outcome))
                    yield []
                elif isinstance(outcome, Exception):
                    failure = failure or outcome
                    stop.set()
                else:
                    yield [(task, outcome)]
        finally:
            stop.set()
        if failure is not None:
            raise failure

    def _work(
        self,
        waiting: queue.SimpleQueue[Task],
        found: queue.SimpleQueue[tuple[Task, Written | Exception]],
        stop: threading.Event,
    ) -> None:
        while not stop.is_set():
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                found.put((task, self._answer(task, stop)))
            except Exception as error:  # noqa: BLE001 - raised again where it is waited for
                found.put((task, error))

    def _answer(self, task: Task, stop: threading.Event) -> Written:
        """One answer; what may pass is tried again, after pauses that double."""
        attempt = 0
        while True:
            try:
                return self._ask(task)
            except _PassingError as error:  # noqa: PERF203 - the pauses take longer
                wait = max(PAUSE * 2**attempt, error.wait)
                if attempt == self._address.retries or stop.wait(wait):
                    raise RainError(
                        f"the server {self._url} gives no usable answer: {error}; the answers so "
                        "far are kept, the same command goes on from there"
                    ) from None
                attempt += 1

    def _ask(self, task: Task) -> Written:
        body = json.dumps(self._body(task)).encode()
        request = urllib.request.Request(self._url, body, self._headers)  # noqa: S310 - checked
        try:
            with self._opener.open(request, timeout=self._address.timeout) as response:
                data = response.read(_MOST_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                raise self._failure(error.code, _detail(error), _asked_wait(error)) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise _PassingError(f"{reason or type(error).__name__}") from None
        return _parse(data)

    def _body(self, task: Task) -> dict[str, Any]:
        drawing = {"temperature": self._sampling.temperature, "top_p": self._sampling.top_p}
        return {
            "model": self._address.model,
            "messages": [{"role": "user", "content": task.prompt}],
            "max_tokens": self._sampling.max_new_tokens,
            "seed": task.seed(self._sampling.seed),
            **self._address.drawing,
            **{name: value for name, value in drawing.items() if value is not None},
            **self._address.extra,
        }

    def _failure(self, code: int, detail: str, wait: float) -> Exception:
        text = f"HTTP {code}{detail}"
        if code in _TRANSIENT or code >= 500:
            return _PassingError(text, wait)
        if code in _OF_ONE_PROMPT:
            return _RefusedError(f"refused by the server: {text}")
        return RainError(
            f"the server {self._url} refuses to answer as model {self._address.model!r}: {text}; "
            "correct --server, --model or --api-key-env"
        )


class _PassingError(Exception):
    """A temporary failure; wait: seconds that the server asked for."""

    def __init__(self, text: str, wait: float = 0.0) -> None:
        super().__init__(text)
        self.wait = wait


class _RefusedError(Exception):
    """This prompt gets no answer; others may."""


def _endpoint(url: str) -> str:
    """The address of chat completions; `/v1` is added where no path is given."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise RainError(
            f"--server {url}: is not the address of a server; expected http://HOST:PORT/v1"
        )
    path = parts.path.rstrip("/") or "/v1"
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def _key(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise RainError(f"--api-key-env {variable}: that environment variable holds no key")
    return {"Authorization": f"Bearer {key}"}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirections, so that a key is never sent to another host."""

    def redirect_request(self, *_: object) -> None:
        """Report a redirection as an error."""


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Use the environment's proxies, except for this machine itself."""
    here = urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    proxies = [urllib.request.ProxyHandler({})] if here else []
    return urllib.request.build_opener(_NoRedirect, *proxies)


def _asked_wait(error: urllib.error.HTTPError) -> float:
    """Seconds of `Retry-After`, at most a minute; 0 where it is a date or nothing."""
    value = error.headers.get("Retry-After", "")
    return min(float(value), _LONGEST_WAIT) if value.strip().isdecimal() else 0.0


def _detail(error: urllib.error.HTTPError) -> str:
    """The server's reason for refusing, as a short text."""
    try:
        text = error.read(4096).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
    with suppress(ValueError, AttributeError):
        value = json.loads(text)
        value = value.get("error", value)
        text = value if isinstance(value, str) else str(value.get("message", value.get("detail")))
    line = "".join(char if char.isprintable() else " " for char in text)
    return f" ({' '.join(line.split())[:200]})" if line.strip() else ""


def _parse(data: bytes) -> Written:
    """The first choice of a chat completion; anything else is no answer."""
    try:
        completion = json.loads(data)
        choice = completion["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        reasoning = next((message[n] for n in _REASONING if message.get(n) is not None), None)
        text = message.get("content") or ""
        tokens = (completion.get("usage") or {}).get("completion_tokens")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise _PassingError("what it sends is not a chat completion") from None
    if not isinstance(text, str) or not isinstance(reasoning, str | None):
        raise _PassingError("what it sends is not a chat completion")
    return Written(text, reasoning, reason == "stop", tokens if type(tokens) is int else None)
