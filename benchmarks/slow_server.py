"""A server that answers each chat completion after a fixed time, with one text; prints its port.

python -m benchmarks.slow_server SECONDS
"""

from __future__ import annotations

import asyncio
import json
import sys

THINKING = " ".join(f"Step {i} adds {i * i} to what step {i - 1} gave." for i in range(100))


def reply(prompt: str) -> bytes:
    """A chat completion for the prompt, with its headers."""
    text = f"<think>\n{THINKING}\n</think>\n\nFor {prompt!r} it is 4."
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = json.dumps({"choices": [choice], "usage": {"completion_tokens": 1200}}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


async def serve(seconds: float) -> None:
    """Answer each request after so long, until the process is ended; prints the port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length:")[2].partition("\r\n")[0])
                asked = json.loads(await reader.readexactly(length))
                await asyncio.sleep(seconds)
                writer.write(reply(asked["messages"][0]["content"]))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1])))
