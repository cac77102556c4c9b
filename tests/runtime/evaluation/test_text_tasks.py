"""Text benchmarks from files as they are published: what is asked, what stands before it, and what is refused."""

from __future__ import annotations

import csv
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.places import ROOT
from pixtral_runtime.errors import InputError, MissingPackageError, Option, SettingError
from pixtral_runtime.evaluation import instructions
from pixtral_runtime.evaluation.dataset import hub_files, read_examples, with_shots
from pixtral_runtime.evaluation.row_images import ImageStore
from pixtral_runtime.evaluation.task import BrokenRow, Example, Task
from pixtral_runtime.evaluation.tasks.registry import TASKS, TEXTS

MMLU = pa.schema(
    [("question", pa.string()), ("subject", pa.string()), ("choices", pa.list_(pa.string())), ("answer", pa.int64())]
)
HEADER = "The following are multiple choice questions (with answers) about  world religions.\n\n"
SOLVED = "Is it 1?\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\n"
ASKED = "Is it 2?\nA. e\nB. f\nC. g\nD. h\nAnswer:"


def read(name: str, folder: Path, shots: int | None = None) -> tuple[list[Example], list[BrokenRow], Task]:
    task = with_shots(TASKS[name], folder, shots)
    return *read_examples(task, folder, ImageStore(folder, folder), None), task


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows, schema), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def mmlu_row(number: int, choices: str, answer: int, subject: str = "world_religions") -> dict[str, Any]:
    return {"question": f"Is it {number}?", "subject": subject, "choices": list(choices), "answer": answer}


def mmlu_csv(path: Path, *rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def test_mmlu_is_asked_as_its_authors_ask_it_from_the_hubs_files(tmp_path: Path) -> None:
    write(tmp_path / "all" / "test-00000-of-00001.parquet", [mmlu_row(2, "efgh", 3), mmlu_row(3, "ijkl", 0)], MMLU)
    write(tmp_path / "all" / "dev-00000-of-00001.parquet", [mmlu_row(1, "abcd", 1), mmlu_row(9, "abcd", 1)], MMLU)
    write(tmp_path / "all" / "validation-00000-of-00001.parquet", [mmlu_row(8, "abcd", 1)], MMLU)
    found, broken, task = read("mmlu", tmp_path, 1)
    assert found[0].question == HEADER + SOLVED + ASKED
    assert ([example.references for example in found], broken) == ([("D",), ("A",)], [])
    assert (found[0].id, found[0].group, task.shots and task.shots.number) == (
        "world_religions/0", "world_religions", 1,
    )  # fmt: skip
    assert read("mmlu", tmp_path, 0)[0][0].question == HEADER + ASKED
    assert "Is it 9?" in read("mmlu", tmp_path, 2)[0][0].question
    with pytest.raises(InputError, match="2 solved questions of world_religions, and 5 are wanted"):
        read("mmlu", tmp_path)


def test_mmlu_is_read_from_its_authors_archive(tmp_path: Path) -> None:
    mmlu_csv(tmp_path / "data/test/world_religions_test.csv", ["Is it 2?", *"efgh", "D"], ["short", "row"])
    mmlu_csv(tmp_path / "data/test/anatomy_test.csv", ['A "quoted", long\nquestion?', *"efgh", "A"])
    mmlu_csv(tmp_path / "data/dev/world_religions_dev.csv", ["Is it 1?", *"abcd", "B"])
    mmlu_csv(tmp_path / "data/dev/anatomy_dev.csv", ["Is it 0?", *"abcd", "B"])
    found, broken, _ = read("mmlu", tmp_path, 1)
    assert [example.group for example in found] == ["anatomy", "world_religions"]
    assert found[1].question == HEADER + SOLVED + ASKED
    assert 'A "quoted", long\nquestion?\nA. e' in found[0].question
    assert [row.id for row in broken] == ["world_religions_test.csv, row 2"]
    assert read("mmlu", tmp_path / "data", 1)[0][1].question == HEADER + SOLVED + ASKED


@pytest.mark.parametrize("shots", [0, 1, 2])
def test_mmlu_prompts_are_those_of_the_authors_script(tmp_path: Path, shots: int) -> None:
    """Their functions made them of these tables."""
    gold = json.loads((ROOT / "tests/data/text_scores.json").read_text(encoding="utf-8"))["mmlu"]
    for split in ("dev", "test"):
        mmlu_csv(tmp_path / f"data/{split}/{gold['subject']}_{split}.csv", *gold[split])
    found, _, _ = read("mmlu", tmp_path, shots)
    seen = [[shots, example.question, *example.references] for example in found]
    assert seen == [row for row in gold["prompts"] if row[0] == shots]


def test_questions_of_the_test_never_stand_solved_before_others(tmp_path: Path) -> None:
    write(tmp_path / "all" / "test-00000-of-00001.parquet", [mmlu_row(2, "efgh", 3)], MMLU)
    with pytest.raises(InputError, match=r"no solved questions to begin with: .* has no dev/\*_dev.csv") as caught:
        read("mmlu", tmp_path)
    assert Option("shots", 0) in caught.value.options
    write(tmp_path / "all" / "dev-00000-of-00001.parquet", [mmlu_row(1, "abcd", 1, "anatomy")], MMLU)
    with pytest.raises(InputError, match="no solved question of world_religions"):
        read("mmlu", tmp_path, 1)


@pytest.mark.parametrize("change", [{"choices": ["a"]}, {"answer": 4}, {"answer": None}, {"question": " "}])
def test_mmlu_rows_that_are_none_are_broken(tmp_path: Path, change: dict[str, Any]) -> None:
    rows = [mmlu_row(2, "efgh", 3), mmlu_row(3, "ijkl", 0) | change]
    write(tmp_path / "test-00000-of-00001.parquet", rows, MMLU)
    found, broken, _ = read("mmlu", tmp_path, 0)
    assert (len(found), len(broken)) == (1, 1)


GSM8K = [
    {"question": f"What is {n} + 1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"} for n in range(9)
]


@pytest.mark.parametrize("kind", ["main/{}-00000-of-00001.parquet", "{}.jsonl", "grade_school_math/data/{}.jsonl"])
def test_gsm8k_has_solved_questions_as_earlier_turns(tmp_path: Path, kind: str) -> None:
    write(tmp_path / kind.format("train"), GSM8K[:6])
    write(tmp_path / kind.format("test"), GSM8K[6:])
    found, broken, _ = read("gsm8k", tmp_path)
    assert (len(found), broken, found[0].references) == (3, [], ("7",))
    assert [message.role for message in found[0].messages] == ["user", "assistant"] * 5 + ["user"]
    assert found[0].messages[1].content == (GSM8K[0]["answer"],)
    assert found[0].question == "Question: What is 6 + 1?\nAnswer:"
    alone = read("gsm8k", tmp_path, 0)[0][0]
    assert len(alone.messages) == 1 and "####" in alone.question


def test_gsm8k_without_a_number_is_a_broken_row(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", [GSM8K[0], {"question": "?", "answer": "no mark"}])
    assert [row.reason for row in read("gsm8k", tmp_path, 0)[1]] == ["answer has no number after '####'"]
    with pytest.raises(InputError, match=r"no solved questions to begin with: .* has no train\.jsonl"):
        read("gsm8k", tmp_path)
    write(tmp_path / "train.jsonl", [{"question": "?"}])
    with pytest.raises(InputError, match="a solved question cannot be used: answer is no text"):
        read("gsm8k", tmp_path, 1)
    with pytest.raises(InputError, match="there are 1 solved questions, and 5 are wanted"):
        read("gsm8k", tmp_path)


MATH = {"problem": "What is half?", "solution": "So $\\boxed{\\frac{1}{2}}$.", "level": "Level 1"}


def test_math_is_read_as_the_hub_and_as_its_authors_have_it(tmp_path: Path) -> None:
    row = MATH | {"answer": "\\frac{1}{2}", "subject": "Algebra", "unique_id": "test/algebra/1.json"}
    write(tmp_path / "hub" / "test.jsonl", [row, row | {"solution": "none", "unique_id": "b"}, {"problem": "?"}])
    found, broken, _ = read("math", tmp_path / "hub")
    assert [example.references for example in found] == [("\\frac{1}{2}",)] * 2
    assert (found[0].id, found[0].group, len(broken)) == ("test/algebra/1.json", "Algebra", 1)
    assert found[0].question.startswith("What is half?\n") and "\\boxed{}" in found[0].question
    for number in (10, 9):
        write(tmp_path / "MATH/test/algebra" / f"{number}.json", [MATH | {"type": "Algebra"}])
    (tmp_path / "MATH/test/algebra/11.json").write_text("{")
    found, broken, _ = read("math", tmp_path)
    assert ([example.id for example in found], [row.id for row in broken]) == (
        ["algebra/9", "algebra/10"], ["algebra/11"],
    )  # fmt: skip
    with pytest.raises(SettingError, match="no solved questions"):
        read("math", tmp_path, 4)


IFEVAL_KEYS = ("num_words", "relation", "keywords")


def test_ifeval_is_read_from_lines_and_from_tables(tmp_path: Path) -> None:
    names = ["punctuation:no_comma", "length_constraints:number_words"]
    told = [{}, {"num_words": 300, "relation": "at least"}]
    row = {"key": 1000, "prompt": "Write a summary.", "instruction_id_list": names, "kwargs": told}
    write(tmp_path / "lines" / "ifeval_input_data.jsonl", [row])
    table = row | {"kwargs": [{key: one.get(key) for key in IFEVAL_KEYS} for one in told]}
    kwargs = pa.struct([("num_words", pa.float64()), ("relation", pa.string()), ("keywords", pa.list_(pa.string()))])
    schema = pa.schema(
        [("key", pa.int64()), ("prompt", pa.string()), ("instruction_id_list", pa.list_(pa.string())),
         ("kwargs", pa.list_(kwargs))]
    )  # fmt: skip
    write(tmp_path / "table" / "train-00000-of-00001.parquet", [table], schema)
    for folder in ("lines", "table"):
        ((example,), broken, _) = read("ifeval", tmp_path / folder)
        assert (example.id, example.question, broken) == ("1000", "Write a summary.", [])
        assert example.details["instructions"] == [{"id": names[0]}, {"id": names[1], **told[1]}]


@pytest.mark.parametrize(
    ("name", "told", "reason"),
    [
        ("length_constraints:number_words", {"num_words": 3}, "has no relation"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "at most"}, "expected 'less than'"),
        ("keywords:existence", {"keywords": ["("]}, "is no pattern"),
        ("keywords:existence", {"keywords": [3]}, "is no text"),
        ("keywords:all", {}, "no instruction 'keywords:all'"),
    ],
)
def test_instructions_that_cannot_be_checked_are_broken_rows(
    tmp_path: Path, name: str, told: dict[str, Any], reason: str
) -> None:
    good = {"key": 1, "prompt": "?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    bad = good | {"key": 2, "instruction_id_list": [name], "kwargs": [told]}
    write(tmp_path / "train.jsonl", [good, bad, good | {"key": 3, "kwargs": []}])
    found, broken, _ = read("ifeval", tmp_path)
    assert len(found) == 1 and reason in broken[0].reason and "0 sets of arguments" in broken[1].reason


PUBLISHED = {  # some of what the hub has of each
    "mmlu": (
        "all/test-00000-of-00001.parquet",
        "all/dev-00000-of-00001.parquet",
        "anatomy/test-00000-of-00001.parquet",
    ),
    "gsm8k": ("main/test-00000-of-00001.parquet", "main/train-00000-of-00001.parquet", "socratic/test-00000.parquet"),
    "math": ("test.jsonl", "README.md"),
    "ifeval": ("ifeval_input_data.jsonl", "README.md"),
}


def test_what_is_downloaded_is_the_split_and_that_of_the_solved_questions() -> None:
    for name, files in PUBLISHED.items():
        wanted = [file for file in files if any(fnmatch(file, pattern) for pattern in hub_files(TASKS[name]))]
        assert wanted == list(files[:-1])
    assert not fnmatch("main/test-00000-of-00001.parquet", hub_files(TASKS["mmlu"])[0])


def test_tasks_of_texts_have_no_pictures() -> None:
    assert {name for name, task in TASKS.items() if not task.has_pictures} == {module.TASK.name for module in TEXTS}


def test_languages_that_could_not_be_told_later_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"key": 1, "prompt": "?", "instruction_id_list": ["change_case:english_capital"], "kwargs": [{}]}
    write(tmp_path / "train.jsonl", [row])
    assert len(read("ifeval", tmp_path)[0]) == 1
    monkeypatch.setattr(instructions, "find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match="langdetect"):
        read("ifeval", tmp_path)
