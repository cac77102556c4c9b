"""Datasets damaged at random: whatever a cell, a line or a file holds, what comes of it is an example, a row with its
reason, or an error of ours. `python tests/runtime/evaluation/test_mutated_datasets.py 5000` tries more of them."""

from __future__ import annotations

import copy
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pixtral_runtime.errors import PixtralError
from pixtral_runtime.evaluation.dataset import read_examples
from pixtral_runtime.evaluation.metrics import LOSSES, METRICS, OF_THEIR_TASK
from pixtral_runtime.evaluation.row_images import ImageStore
from pixtral_runtime.evaluation.tasks.registry import TASKS

TALK = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Net."}]
ROW: dict[str, dict[str, Any]] = {
    "custom": {"image": "a.png", "question": "What?", "answers": ["x"], "metric": "anls", "id": "q", "group": "g"},
    "mathvista": {"pid": "1", "decoded_image": "a.png", "query": "Which?", "choices": ["one", "two"], "answer": "two",
                  "question_type": "multi_choice", "answer_type": "text", "precision": None, "unit": None},
    "mmmu": {"id": "validation_Art_1", "question": "Which <image 1>?", "options": "['one', 'two']", "answer": "A",
             "question_type": "multiple-choice", "image_1": "a.png", "subfield": "s"},
    "vqav2": {"image": "a.png", "question": "?", "answers": [{"answer": "net"}] * 3, "question_id": 7},
    "docvqa": {"image": "a.png", "question": "What?", "answers": ["net"], "questionId": "7"},
    "chartqa": {"image": "a.png", "query": "What?", "label": ["14"], "human_or_machine": 0},
    "easy_vqa": {"image": "a.png", "question": "What?", "answer": "yes", "id": 3},
    "mm_mt_bench": {"image": "a.png", "category": "charts", "conversation": json.dumps(TALK)},
    "perplexity": {"text": "Some words."},
    "mmlu": {"question": "Which?", "subject": "world_religions", "choices": ["one", "two", "three", "four"],
             "answer": 1},
    "gsm8k": {"question": "How many?", "answer": "Two.\n#### 14"},
    "math": {"problem": "What?", "solution": "So $\\boxed{\\frac12}$.", "answer": "1", "subject": "Algebra"},
    "ifeval": {"key": 1, "prompt": "Write.", "instruction_id_list": ["keywords:frequency", "punctuation:no_comma"],
               "kwargs": [{"keyword": "a", "frequency": 1, "relation": "at least", "num_words": None}, {}]},
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "mathvista": {"testmini.json": {"1": ROW["mathvista"] | {"image": "a.png"}}, "query.json": {"1": "Which?"}},
    "chartqa": {"test/test_human.json": [{"imgname": "a.png", "query": "What?", "label": "x"}]},
    "docvqa": {"val_v1.0_withQT.json": {"data": [ROW["docvqa"]]}},
    "vqav2": {
        "v2_OpenEnded_mscoco_val2014_questions.json": {
            "questions": [{"image_id": 4, "question_id": 7, "question": "?"}]
        },
        "v2_mscoco_val2014_annotations.json": {"annotations": [{"question_id": 7, "answers": [{"answer": "x"}]}]},
    },
    "easy_vqa": {"questions.json": [["What?", "yes", 1]]},
    "math": {"test/algebra/1.json": ROW["math"]},
    "gsm8k": {"grade_school_math/data/test.jsonl": ROW["gsm8k"]},
    "mmlu": {"data/test/art_test.csv": "Which?,1,2,3,4,A"},
    "perplexity": {"notes.md": "# Some words"},
}
OWN_PICTURES = {
    "chartqa": ["test/png/a.png"],
    "vqav2": ["val2014/COCO_val2014_000000000004.jpg"],
    "easy_vqa": ["images/1.png"],
}
ODD: list[Any] = [
    None, True, False, 0, -1, 1.5, float("nan"), float("inf"), 10**30, "", " ", "\0", "\ud800", "A", "[", "[]",
    "['a' 'b']", '["a", "b"]', "[1, 2]", "{}", "data:image/png;base64,AAAA", "QUJD" * 100, "../../etc", "a.png",
    "x" * 300, [], {}, [[]], [None], [1, "a"], {"a": 1}, {"bytes": None, "path": None}, {"bytes": "x", "path": 3},
    [{"answer": None}], ["a"], "open", "multiple-choice", "multi_choice", "<image 9>", "<image 1><image 99999999999>",
    "mmmu", "mathvista", "chartqa_relaxed",
]  # fmt: skip
ANSWERS = ["", "A", "(B) two", "Final Answer: 14", "**Answer:** [1, 2]\n", "\0\ud800", "9" * 40, "nan", "İ%", "1e999"]


def mutated(value: Any, rng: random.Random) -> Any:
    """The value with something in it replaced, dropped or doubled."""
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return copy.deepcopy(rng.choice(ODD))
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    value, kind = copy.copy(value), rng.random()
    if kind < 0.1:
        del value[key]
    elif kind < 0.2 and isinstance(value, list):
        value.append(value[key])
    else:
        value[key] = mutated(value[key], rng)
    return value


def scrambled(data: bytes, rng: random.Random) -> bytes:
    """Bytes cut off, changed or repeated, now and then."""
    kind, place = rng.random(), rng.randrange(len(data) + 1)
    if kind < 0.1:
        return data[:place]
    if kind < 0.2:
        return data[:place] + rng.randbytes(rng.randrange(1, 9)) + data[place:]
    if kind < 0.25:
        return data[: place + 1] + data[place:]
    return data


def as_parquet(row: Any, path: Path) -> None:
    columns = row if isinstance(row, dict) else {"question": row}
    try:
        pq.write_table(pa.table({name: pa.array([value]) for name, value in columns.items()}), path)
    except (pa.ArrowException, ValueError, OverflowError):  # no table can hold it
        pq.write_table(pa.table({"question": ["?"]}), path)


def plant(folder: Path, task: str, rng: random.Random) -> None:
    """A damaged dataset of one of the forms that a task is read in."""
    (folder / "a.png").write_bytes(b"png")
    form = rng.choice(["jsonl", "parquet", "own"] if task in OWN else ["jsonl", "parquet"])
    if form == "own":
        files = {
            name: scrambled(json.dumps(mutated(content, rng)).encode(), rng) for name, content in OWN[task].items()
        }
        for name, data in (files | dict.fromkeys(OWN_PICTURES.get(task, ()), b"png")).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return
    row = mutated(ROW[task], rng)
    if form == "parquet":
        path = folder / f"{TASKS[task].split or 'rows'}-0000{rng.randrange(3)}-of-00002.parquet"
        as_parquet(row, path)
        path.write_bytes(scrambled(path.read_bytes(), rng))
    else:
        lines = "\n".join(json.dumps(one) for one in (row, mutated(row, rng), ROW[task]))
        (folder / "rows.jsonl").write_bytes(scrambled(lines.encode(), rng))


def outcomes(count: int, seed: int) -> Counter[str]:
    """What became of so many datasets. Raises what is no error of ours."""
    rng, found = random.Random(seed), Counter[str]()
    for number in range(count):
        task = rng.choice(list(TASKS))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plant(folder, task, rng)
            try:
                examples, broken = read_examples(TASKS[task], folder, ImageStore(folder / "cache", folder), None)
            except PixtralError as error:
                found[type(error).__name__] += 1
                continue
            except Exception as error:
                error.add_note(f"dataset {number} of seed {seed}, {task}")
                raise
            found["broken"] += bool(broken)
            found["examples"] += 1
            for example in examples:
                json.dumps(example.details)
                for metric in {*METRICS} - OF_THEIR_TASK | {*TASKS[task].metrics} - LOSSES:
                    assert 0 <= METRICS[metric](rng.choice(ANSWERS), example) <= 1
    return found


def test_no_damage_to_a_dataset_is_a_bug() -> None:
    found = outcomes(120, seed=1)
    assert set(found) == {"InputError", "broken", "examples"} and min(found.values()) > 10


if __name__ == "__main__":
    print(outcomes(int(sys.argv[1]), seed=2))
