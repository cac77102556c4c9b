"""Text from users is read as it was written, or refused; every reader goes through the same function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pixtral_cli.options import read_prompt
from pixtral_export.quantization.samples import calibration_requests
from pixtral_runtime.batch.request_file import read_request_file
from pixtral_runtime.compare.compare import read_prompts
from pixtral_runtime.errors import InputError
from pixtral_runtime.evaluation.dataset import read_rows
from pixtral_runtime.evaluation.tasks.registry import TASKS
from pixtral_runtime.inputs.text_file import read_lines, read_text

MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"a", ["a"]),
        (b"a\n", ["a"]),
        (b"a\r\nb\n\nc", ["a", "b", "", "c"]),
        (MARK + b"a\n", ["a"]),
        (b"a\n" + MARK + b"b\n", ["a", "\ufeffb"]),
        (b"a\rb\n", ["a\rb"]),
        ("a\u2028b\x85c\x0bd\x0ce\x1cf\n".encode(), ["a\u2028b\x85c\x0bd\x0ce\x1cf"]),
        ("größer\n".encode(), ["größer"]),
    ],
    ids=["empty", "no end", "one", "both ends", "mark", "mark within", "lone return", "unicode ends", "accents"],
)
def test_lines_end_at_line_feeds_only(tmp_path: Path, data: bytes, lines: list[str]) -> None:
    file = tmp_path / "text"
    file.write_bytes(data)
    assert list(read_lines(file)) == lines
    assert read_text(file) == "\n".join(lines)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"fine\ngr\xf6\xdfer\n", r"text, line 2 is not UTF-8 text: invalid start byte at byte 2"),
        ("größer".encode("utf-16"), r"text is UTF-16 text"),
        (b"\xfe\xff" + "größer".encode("utf-16-be"), r"text is UTF-16 text"),
        (b"\xed\xa0\x80", r"text, line 1 is not UTF-8"),
    ],
    ids=["latin-1", "utf-16", "big endian", "half a surrogate pair"],
)
def test_other_encodings_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        list(read_lines(tmp_path / "text"))
    assert "iconv" in caught.value.hint


@pytest.mark.parametrize("name", ["missing", "."])
def test_what_cannot_be_read_says_why(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_text(tmp_path / name, "another file")
    assert caught.value.hint == "another file"


def _requests(path: Path) -> list[str]:
    return [str(request.messages[-1].content[0]) for request in read_request_file(path, max_new_tokens=1)]


def _rows(path: Path) -> list[str]:
    return [row["prompt"] for row in read_rows(path.parent, TASKS["custom"]) if isinstance(row, dict)]


JSON_READERS: list[Callable[[Path], list[str]]] = [
    _requests,
    _rows,
    lambda path: [request.prompt for request in calibration_requests(path)],
]
READERS: list[Callable[[Path], list[str]]] = [
    read_prompts,
    lambda path: read_prompt(f"@{path}").splitlines(),
]


@pytest.mark.parametrize("reader", JSON_READERS, ids=["requests", "dataset rows", "calibration"])
def test_json_lines_hold_any_character(reader: Callable[[Path], list[str]], tmp_path: Path) -> None:
    prompts = ["What is\u2028shown?", "größer\x85?"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "x.jsonl").write_bytes(MARK + "\r\n".join(lines).encode())
    assert reader(tmp_path / "x.jsonl") == prompts


@pytest.mark.parametrize("reader", READERS, ids=["prompts", "prompt file"])
def test_prompts_are_read_without_the_mark(reader: Callable[[Path], list[str]], tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(MARK + "größer?\r\nkleiner?\r\n".encode())
    assert reader(tmp_path / "x.txt") == ["größer?", "kleiner?"]


@pytest.mark.parametrize(
    "reader", [*JSON_READERS, *READERS], ids=["requests", "dataset rows", "calibration", "prompts", "prompt file"]
)
def test_every_reader_refuses_what_is_no_utf8(reader: Callable[[Path], list[str]], tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes('{"prompt": "größer?"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match="line 1 is not UTF-8"):
        reader(tmp_path / "x.jsonl")
