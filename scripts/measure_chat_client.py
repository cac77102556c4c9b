"""What the client of `pixtral bench --url` takes for itself: microseconds a request, and a piece of an answer.

    python scripts/measure_chat_client.py

The server is a process of its own that computes nothing: it sends a number of pieces, one every half millisecond. Two
numbers of pieces tell what a request takes from what a piece takes. `cpu` is the client's processor time, which is what
it takes from other requests when many are under way; `ttft` is the median time to the first piece, which the server
sends at once, so all of it is the client, the server's Python and the way between.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from collections.abc import Sequence
from statistics import median

from pixtral_runtime.bench.cases import Case
from pixtral_runtime.bench.chat_client import Answer, ChatServer
from pixtral_runtime.bench.serving import keep_busy, requests_of

GAP_S = 0.0005
FEW, MANY = 2, 258
CHUNK = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1764300000, "model": "none"}
CHOICE = {"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _event(data: str) -> bytes:
    line = f"data: {data}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(line), line)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    piece = _event(json.dumps(CHUNK | {"choices": [CHOICE]}))
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            body = json.loads(await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0])))
            writer.write(HEAD)
            for _ in range(body["max_tokens"]):
                writer.write(piece)
                await asyncio.sleep(GAP_S)
            usage = {"prompt_tokens": 1, "completion_tokens": body["max_tokens"]}
            writer.write(_event(json.dumps(CHUNK | {"choices": [], "usage": usage})) + _event("[DONE]") + b"0\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def _serve(port: multiprocessing.Queue[int]) -> None:
    async def run() -> None:
        server = await asyncio.start_server(_answer, "127.0.0.1", 0, limit=1 << 26)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def _round(server: ChatServer, pieces: int, at_a_time: int, count: int) -> tuple[float, Sequence[Answer]]:
    """Processor seconds of the client for a request, and the answers."""
    requests = requests_of(Case("throughput", at_a_time, pieces, 512), "none", (), count, 0)
    before = time.process_time()
    answers = keep_busy(server, requests, at_a_time)
    return (time.process_time() - before) / count, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-a-time", default="1,8,32", help="requests at a time, comma-separated")
    parser.add_argument("--requests", type=int, default=4, help="requests of each that is under way at a time")
    options = parser.parse_args()
    port: multiprocessing.Queue[int] = multiprocessing.Queue()
    process = multiprocessing.Process(target=_serve, args=(port,), daemon=True)
    process.start()
    server = ChatServer(f"http://127.0.0.1:{port.get()}/v1")
    for at_a_time in map(int, options.at_a_time.split(",")):
        count = max(16, at_a_time * options.requests)
        _round(server, FEW, at_a_time, count)
        few, answers = _round(server, FEW, at_a_time, count)
        many, _ = _round(server, MANY, at_a_time, count)
        piece = (many - few) / (MANY - FEW)
        ttft = median(answer.ttft_ms for answer in answers)
        print(
            f"{at_a_time} at a time: cpu {1e6 * (few - FEW * piece):.0f} µs a request, {1e6 * piece:.0f} µs a piece; "
            f"ttft {ttft:.2f} ms"
        )
    process.terminate()


if __name__ == "__main__":
    main()
