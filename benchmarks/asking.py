"""What does `mergekit-rain ask` cost beside what the server alone needs for the same requests?

    python -m benchmarks.asking

A server in a process of its own answers each request after a fixed time with some 4,000 characters
of thinking and response. The same requests go to it from a bare client, which sends them from as
many threads and throws the answers away, and through all that `ask` does: prompts, requests, the
file of answers, every measure of every answer. In turns, the median of the ratios of three rounds.
Exit status 1 if one is above 5 %. Beside it stands the processor time that `ask` needs more than
the bare client, as a part of the bare client's time: where other programs keep the processors busy,
both clients wait for them, and only this number says what is ours.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.slow_server import THINKING
from rain_mergekit.data_building.server import Address, ServerWriter
from rain_mergekit.data_building.tasks import Sampling, Task
from rain_mergekit.evaluation.answer_files import ask, chosen_prompts, header, read_answers
from rain_mergekit.evaluation.answer_summary import summary

MOST = 0.05
ROUNDS = 3
LIMIT = 4096


@dataclass(frozen=True)
class Load:
    """So many requests, at a time, of so many seconds each."""

    requests: int
    parallel: int
    seconds: float


LOADS = (
    Load(32, 8, 4.0),
    Load(64, 16, 6.0),
    Load(128, 64, 12.0),
)  # 100 to 300 tokens a second each


@contextmanager
def serving(seconds: float) -> Iterator[int]:
    """The port of a server in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.slow_server", str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def bare(port: int, bodies: Sequence[str], parallel: int) -> float:
    """Seconds that a client takes which only sends and receives."""

    def send(part: Sequence[str]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for body in part:
            connection.request("POST", "/v1/chat/completions", body)
            assert len(connection.getresponse().read()) > len(THINKING)
        connection.close()

    start = time.perf_counter()
    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(send, [bodies[number::parallel] for number in range(parallel)]))
    return time.perf_counter() - start


def whole(port: int, prompts: Path, parallel: int, out: Path) -> float:
    """Seconds of all that `ask` does once its modules are loaded."""
    start = time.perf_counter()
    sampling = Sampling(LIMIT, temperature=None, top_p=None, seed=0)
    address = Address(f"http://127.0.0.1:{port}/v1", "m", 600.0, parallel, 0)
    writer = ServerWriter.of(address, sampling)
    asked = chosen_prompts(str(prompts), None)
    ask(writer, asked, str(out), header(writer, sampling, None, {}), samples=1, quiet=True)
    found = summary(read_answers(str(out)))
    assert found["answers"] == len(asked)
    return time.perf_counter() - start


def overheads(load: Load, folder: Path, rounds: int = ROUNDS) -> list[tuple[float, float]]:
    """By how much `ask` takes longer, of each round, and the processor's part: 0.02 is 2 %."""
    texts = [f"What is {number} + 4?" for number in range(load.requests)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "answer": 4}) + "\n" for text in texts))
    bodies = [
        json.dumps({"model": "m", "messages": [{"role": "user", "content": text}],
                    "max_tokens": LIMIT, "seed": Task(text).seed(0)})
        for text in texts
    ]  # fmt: skip
    found = []
    with serving(load.seconds) as port:
        for number in range(rounds):
            out = folder / f"{load.parallel}-{number}.jsonl"
            before = time.process_time()
            alone = bare(port, bodies, load.parallel)
            between = time.process_time()
            ours = whole(port, prompts, load.parallel, out)
            more = (time.process_time() - between) - (between - before)
            found.append((ours / alone - 1, more / alone))
    return found


def main() -> None:
    """Measure each load; one line says what it cost."""
    worst = 0.0
    for load in LOADS:
        with tempfile.TemporaryDirectory(prefix="rain-asking-") as name:
            found = overheads(load, Path(name))
        longer, work = (median(part) for part in zip(*found, strict=True))
        worst = max(worst, longer)
        runs = ", ".join(f"{100 * one:.1f}" for one, _ in found)
        print(
            f"{load.requests} requests of {load.seconds} s, {load.parallel} at a time: "
            f"{100 * longer:+.1f} % (runs {runs}), processor {100 * work:+.1f} %",
            flush=True,
        )
    sys.exit(worst > MOST)


if __name__ == "__main__":
    main()
