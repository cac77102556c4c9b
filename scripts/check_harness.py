"""Let lmms-eval, a public benchmark harness, score a bundle through `pixtral serve`, and compare with `pixtral eval`.

    python -m venv harness && harness/bin/pip install lmms-eval==0.7.3 'filelock<4'    # brings torch; needs no GPU
    python scripts/check_harness.py harness/bin/python artifacts/demo/bundle
    python scripts/check_harness.py harness/bin/python artifacts/demo/bundle --max-image-side 32    # wrong answers too

Both read the same rows: questions of easy-VQA's test split. The harness asks them by its model `openai`, in a task that
is written for it, and scores by itself. Prints JSON, and ends with 1 unless scores and all answers are equal. Nothing
is downloaded while it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demo_bundles import easy_vqa_questions

AT_A_TIME = 8
MAX_NEW_TOKENS = 8
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}
TASK = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
task: served
test_split: test
output_type: generate_until
doc_to_visual: !function served.pictures
doc_to_text: !function served.question
doc_to_target: !function served.reference
generation_kwargs: {{max_new_tokens: {longest}, temperature: 0}}
process_results: !function served.scores
metric_list: [{{metric: exact, aggregation: mean, higher_is_better: true}}]
"""
FUNCTIONS = """\
from PIL import Image

def pictures(row):
    return [Image.open(row["image"]).convert("RGB")]

def question(row, _=None):
    return row["question"]

def reference(row):
    return row["answers"][0]

def scores(row, results):
    return {"exact": float(results[0].strip().casefold() in [one.casefold() for one in row["answers"]])}
"""


def write_rows(count: int, folder: Path) -> list[dict[str, Any]]:
    """The questions as `pixtral eval --task custom` and the harness's task read them."""
    rows = [
        {"id": one.id, "image": str(one.images[0]), "question": one.question, "answers": list(one.references)}
        for one in easy_vqa_questions(count).examples
    ]
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return rows


@contextmanager
def served(bundle: Path, options: list[str]) -> Iterator[str]:
    """Run `pixtral serve` at a free port. Its API's address."""
    line = [sys.executable, "-m", "pixtral_cli", "serve", str(bundle), "--port", "0", "--served-model-name", "served"]
    with subprocess.Popen([*line, *options], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline()
            found = re.search(r"http://\S+/v1", said)
            if found is None:
                raise SystemExit(f"the server did not start: {said}")
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a line for each request
            yield found[0]
        finally:
            process.terminate()


def by_harness(python: Path, url: str, rows: Path, folder: Path) -> tuple[float, list[str]]:
    """The harness's score, and its answers in the order of the rows."""
    folder.mkdir()
    task = TASK.format(rows=json.dumps(str(rows)), longest=MAX_NEW_TOKENS)
    for name, text in (("served.yaml", task), ("served.py", FUNCTIONS)):
        (folder / name).write_text(text, encoding="utf-8")
    line = [str(python), "-m", "lmms_eval", "eval", "--model", "openai", "--tasks", "served", "--batch_size", "1"]
    line += ["--model_args", f"model=served,base_url={url},num_concurrent={AT_A_TIME}", "--include_path", str(folder)]
    environment = os.environ | OFFLINE | {"HF_HOME": str(folder / "cache")}
    environment.pop("PYTHONPATH", None)
    subprocess.run([*line, "--log_samples", "--output_path", str(folder / "out")], check=True, env=environment)
    (results,) = (folder / "out").rglob("*_results.json")
    (samples,) = (folder / "out").rglob("*_samples_served.jsonl")
    told = [json.loads(one) for one in samples.read_text(encoding="utf-8").splitlines()]
    answers = [one["filtered_resps"] for one in sorted(told, key=lambda one: one["doc_id"])]
    return json.loads(results.read_text(encoding="utf-8"))["results"]["served"]["exact,none"], answers


def by_pixtral(bundle: Path, rows: Path, target: Path, options: list[str]) -> tuple[float, dict[str, str]]:
    """The score of `pixtral eval`, and its answers by the row's id."""
    line = [sys.executable, "-m", "pixtral_cli", "eval", str(bundle), "--task", "custom", "--data", str(rows.parent)]
    line += ["--save", str(target), "--max-new-tokens", str(MAX_NEW_TOKENS), "--json", *options]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE)
    told = [json.loads(one) for one in target.with_suffix(".answers.jsonl").read_text(encoding="utf-8").splitlines()]
    return json.loads(done.stdout)["scores"]["exact"]["mean"], {one["id"]: one["answer"] for one in told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", type=Path, help="the interpreter that has lmms-eval")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--max-image-side", type=int, help="pictures so small that answers are wrong")
    args = parser.parse_args()
    options = ["--batch", str(AT_A_TIME)]
    if args.max_image_side:
        options += ["--max-image-side", str(args.max_image_side)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_rows(args.questions, folder / "rows")
        listed = folder / "rows" / "rows.jsonl"
        with served(args.bundle, options) as url:
            started = time.monotonic()
            theirs, answers = by_harness(args.python, url, listed, folder / "harness")
            seconds = time.monotonic() - started
        ours, expected = by_pixtral(args.bundle, listed, folder / "eval.json", options)
    pairs = [(row["id"], answer, expected.get(row["id"])) for row, answer in zip(rows, answers, strict=True)]
    differing = [{"id": id, "harness": theirs, "eval": ours} for id, theirs, ours in pairs if theirs != ours]
    result = {
        "questions": len(rows),
        "score_harness": theirs,
        "score_eval": ours,
        "answers_that_differ": len(differing),
        "differing": differing[:10],
        "harness_seconds": round(seconds, 1),
    }
    print(json.dumps(result))
    if differing or theirs != ours:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
