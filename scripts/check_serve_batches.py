"""Batches of `pixtral serve` when the server is killed again and again, and what they cost live requests and memory.

    python scripts/check_serve_batches.py BUNDLE --requests 200 --kills 6 --slots 4     # minutes; on any machine

The answers must be those of `pixtral run --requests` on the same file, each asked once; live requests are timed on a
server with nothing to do and beside a batch; a file of `--pictures` pictures as data: URLs is read, and what stays in
memory is measured. The last line is JSON; what is wrong ends it with exit 6. Needs the extras `serve` and `eval`.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[1]
ENDLESS: dict[str, Any] = {"logit_bias": {"2": -100}}  # an answer of the demo bundle then has all of its tokens
LIVE_TOKENS = 8

if TYPE_CHECKING:
    from openai import OpenAI


def lines_of(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Requests with and without pictures, long and short, drawn and not, and a few that cannot be answered."""
    from helpers.batches import batch_line, picture_url

    lines = []
    for number in range(count):
        options: dict[str, Any] = {"max_tokens": rng.randint(8, 80), **ENDLESS}
        if number % 5 == 0:
            options |= {"temperature": 1.0, "seed": number}
        if number % 50 == 7:
            options["n"] = 2
        url = picture_url(number) if rng.random() < 0.7 else None
        lines.append(batch_line(f"request-{number}", url, **options))
    return lines


def run(bundle: Path, folder: Path, lines: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The answers of `pixtral run` by id; it refuses lines that it cannot honour, which are left out."""
    asked, output = folder / "asked.jsonl", folder / "results.jsonl"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines if "n" not in line["body"]), encoding="utf-8")
    command = [sys.executable, "-m", "pixtral_cli", "run", str(bundle), "--requests", str(asked), "-o", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    return {record["id"]: record["answer"] for record in records}


def submitted(client: OpenAI, lines: Sequence[dict[str, Any]]) -> str:
    from helpers.batches import jsonl

    file = client.files.create(file=("asked.jsonl", jsonl(*lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h").id


def killed(bundle: Path, folder: Path, lines: Sequence[dict[str, Any]], kills: int, slots: int) -> dict[str, Any]:
    """A batch whose server is killed so many times; what it gave at the end, and what its results file shows."""
    from helpers.batches import ended, server_process

    options = "--batch", str(slots), "--served-model-name", "tiny"
    rng, batch, sizes, kept = random.Random(1), "", list[int](), b""
    is_append_only = True
    for _ in range(kills):
        with server_process(bundle, folder, *options) as (process, client):
            batch = batch or submitted(client, lines)
            results = folder / "batches" / f"{batch}.results.jsonl"
            wanted = kept.count(b"\n") + rng.randint(1, max(1, 2 * len(lines) // (3 * kills)))
            while process.poll() is None and count(results) < wanted:
                time.sleep(0.001)
            process.kill()
            process.wait()
            now = results.read_bytes()
            is_append_only &= now.startswith(kept)
            kept = now[: now.rfind(b"\n") + 1]
            sizes.append(kept.count(b"\n"))
    with server_process(bundle, folder, *options) as (_, client):
        found = ended(client, batch)
        files = [client.files.content(id).text for id in (found.output_file_id, found.error_file_id)]
        is_append_only &= results.read_bytes().startswith(kept)
        records = [json.loads(line)["id"] for line in results.read_text(encoding="utf-8").splitlines()]
    return {
        "status": found.status,
        "counts": found.request_counts.model_dump(),
        "answered_at_each_kill": sizes,
        "results_only_grew": is_append_only,
        "asked_twice": len(records) - len(set(records)),
        "output": [json.loads(line) for line in files[0].splitlines()],
        "errors": [json.loads(line) for line in files[1].splitlines()],
    }


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def live_ms(bundle: Path, folder: Path, lines: Sequence[dict[str, Any]], slots: int) -> dict[str, Any]:
    """Milliseconds of live requests, alone and beside a batch."""
    from helpers.batches import batch_line, picture_url, server_process, state_of

    with server_process(bundle, folder, "--batch", str(slots), "--served-model-name", "tiny") as (_, client):

        def once(number: int) -> float:
            body = batch_line("live", picture_url(number), max_tokens=LIVE_TOKENS, **ENDLESS)["body"]
            started = time.perf_counter()
            client.chat.completions.create(**body)
            return (time.perf_counter() - started) * 1e3

        once(0)
        alone = [once(number) for number in range(20)]
        batch = submitted(client, lines)
        while not state_of(client, batch).request_counts.completed:
            time.sleep(0.01)
        beside = list[float]()
        while state_of(client, batch).status == "in_progress" and len(beside) < 100:
            beside.append(once(len(beside)))
        after = state_of(client, batch)
        client.batches.cancel(batch) if after.status == "in_progress" else None
    return {
        "alone_ms": spread(alone),
        "beside_a_batch_ms": spread(beside),
        "batch_was": after.status,
        "batch_answers_meanwhile": after.request_counts.completed,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "n": len(values),
        "median": round(statistics.median(values), 1),
        "max": round(max(values), 1),
    }


def memory(folder: Path, count: int) -> dict[str, Any]:
    """What a file of so many pictures leaves in memory once it is read."""
    from helpers.batches import batch_line
    from pixtral_runtime.batch.request_file import read_request_file
    from pixtral_runtime.device.memory import resident_memory_bytes

    rng, path = random.Random(0), folder / "pictures.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            url = f"data:image/jpeg;base64,{base64.b64encode(rng.randbytes(30_000)).decode()}"
            file.write(json.dumps(batch_line(str(number), url)) + "\n")
    before = resident_memory_bytes()
    started = time.perf_counter()
    requests = read_request_file(path, max_new_tokens=8)
    seconds = time.perf_counter() - started
    grown = resident_memory_bytes() - before
    file_bytes = path.stat().st_size
    path.unlink()
    return {
        "pictures": len(requests), "file_bytes": file_bytes, "seconds": round(seconds, 2), "resident_bytes": grown,
        "bytes_a_request": round(grown / count),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=10_000)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))

    lines = lines_of(args.requests, random.Random(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = run(args.bundle, folder, lines)
        found = killed(args.bundle, folder / "killed", lines, args.kills, args.slots)
        live = live_ms(args.bundle, folder / "live", lines * 1, args.slots)
        held = memory(folder, args.pictures)
    output, errors = found.pop("output"), found.pop("errors")
    texts = {one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"] for one in output}
    refused = [line["custom_id"] for line in lines if "n" in line["body"]]
    differing = sorted(id for id in texts | expected if texts.get(id) != expected.get(id))
    is_right = (
        not differing
        and [one["custom_id"] for one in output] == [line["custom_id"] for line in lines if "n" not in line["body"]]
        and [one["custom_id"] for one in errors] == refused
        and found["status"] == "completed"
        and found["results_only_grew"]
        and not found["asked_twice"]
    )
    report = {
        "requests": args.requests, "kills": args.kills, "slots": args.slots, **found,
        "answers_differing_from_run": differing, "live": live, "memory": held, "passed": is_right,
    }  # fmt: skip
    print(json.dumps(report))
    return 0 if is_right else 6


if __name__ == "__main__":
    raise SystemExit(main())
