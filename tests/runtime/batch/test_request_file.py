"""From images and questions, or from JSONL, to requests."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pixtral_runtime.batch.item_requests import requests_of_images
from pixtral_runtime.batch.records import Request, Settings
from pixtral_runtime.batch.request_file import read_request_file, read_requests
from pixtral_runtime.batch.shards import parse_shard, share_of
from pixtral_runtime.errors import InputError
from pixtral_runtime.inputs.conversation import Message, ToolCall

PICTURE = Path("animals/cat.1.png")
FOLDER = Path("data")


def read(*entries: object, system: str | None = None) -> list[Request]:
    """What a file of these lines asks; what is no string is written as JSON."""
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    return read_requests(lines, "jobs.jsonl", max_new_tokens=64, system=system, folder=FOLDER)


def user(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


def test_one_question_is_asked_of_every_image_under_its_path() -> None:
    first, second = requests_of_images([Path("a.png"), Path("b/c.png")], ["What?"], "Be brief.", 9)
    assert [first.id, second.id] == ["a.png", "b/c.png"]
    assert first.messages == (Message("system", ("Be brief.",)), Message("user", (Path("a.png"), "What?")))
    assert first.max_new_tokens == 9


def test_several_questions_of_an_image_stand_together_and_are_numbered() -> None:
    requests = requests_of_images([Path("a.png"), Path("b.png")], ["What?", "Where?"], None, 9)
    assert [request.id for request in requests] == ["a.png#1", "a.png#2", "b.png#1", "b.png#2"]
    assert [request.question for request in requests] == ["What?", "Where?"] * 2
    assert requests[1].messages == (Message("user", (Path("a.png"), "Where?")),)


@pytest.mark.parametrize(
    ("prompt", "content"),
    [
        ("Is this {name} of {directory}?", (PICTURE, "Is this cat.1 of animals?")),
        ("Tags: {tags}. {name}", (PICTURE, "Tags: {name}, [image]. cat.1")),
        ("Before [image]\nafter {name}", ("Before", PICTURE, "after cat.1")),
        ("[image] What?", (PICTURE, "What?")),
        ("What? [image]", ("What?", PICTURE)),
        (
            '{"name": "{name}", "x": {}, {{name}} {Name} {tag} [Image]',
            (PICTURE, '{"name": "cat.1", "x": {}, {cat.1} {Name} {tag} [Image]'),
        ),
    ],
)
def test_only_exact_placeholders_of_a_prompt_are_filled_in_and_once(prompt: str, content: tuple[Any, ...]) -> None:
    (request,) = requests_of_images([PICTURE], [prompt], "Be {name}.", 9, lambda *_: "{name}, [image]")
    assert request.messages == (Message("system", ("Be {name}.",)), Message("user", content))
    assert request.tags == ("{name}, [image]" if "{tags}" in prompt else None)


def test_what_was_asked_is_the_final_text() -> None:
    settings = Settings("fingerprint")
    (filled,) = requests_of_images([PICTURE], ["Is it {name}?"], None, 9)
    (typed,) = requests_of_images([PICTURE], ["Is it cat.1?"], None, 9)
    (placed,) = requests_of_images([PICTURE], ["Is it cat.1? [image]"], None, 9)
    assert filled.asked(settings) == typed.asked(settings) != placed.asked(settings)


def test_a_picture_in_the_working_folder_has_that_one_as_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dogs").mkdir()
    monkeypatch.chdir(tmp_path / "dogs")
    for picture in (Path("a.png"), Path("../dogs/a.png"), Path(os.fsdecode(b"\xff.png"))):
        (request,) = requests_of_images([picture], ["{name} {directory}"], None, 9)
        assert request.question == f"{'a' if picture.name == 'a.png' else chr(0xFFFD)} dogs"


def test_tags_are_those_of_the_text_beside_the_picture(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone, two\r\n")
    first, second = requests_of_images([tmp_path / "a.png", tmp_path / "b.png"], ["({tags})"], None, 9)
    assert (first.question, second.question) == ("(one, two)", "()")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"b\.txt"):
        requests_of_images([tmp_path / "b.png"], ["({tags})"], None, 9)


def test_a_picture_is_shown_once() -> None:
    with pytest.raises(InputError, match="2 times"):
        requests_of_images([PICTURE], ["[image] and [image]"], None, 9)


def test_a_prompt_of_a_request_file_is_taken_as_it_is() -> None:
    (request,) = read({"prompt": "{name} [image]", "images": ["a.png"]})
    assert request.question == "{name} [image]"


def test_a_prompt_comes_after_its_images_and_takes_the_defaults() -> None:
    (request,) = read({"prompt": "Which?", "images": ["a.png", "/abs/b.png"]}, system="Be brief.")
    images = (Path("data/a.png"), Path("/abs/b.png"))
    system = Message("system", ("Be brief.",))
    assert request == Request("1", (system, Message("user", (*images, "Which?"))), 64)


def test_an_image_url_may_say_how_much_detail_is_wanted(tmp_path: Path) -> None:
    for detail in (None, "auto", "low", "high"):
        part = {"type": "image_url", "image_url": {"url": "a.png", "detail": detail}}
        assert read(user(part, {"type": "text", "text": "Which?"}))[0].images == (Path("data/a.png"),)
    for wrong in ("medium", 3, ["low"]):
        with pytest.raises(InputError, match="detail: expected one of auto, low, high"):
            read(user({"type": "image_url", "image_url": {"url": "a.png", "detail": wrong}}))


def test_images_of_a_pipe_are_looked_for_in_the_working_folder(tmp_path: Path) -> None:
    line = b'{"prompt": "Which?", "images": ["a.png"]}\n'
    (tmp_path / "asked.jsonl").write_bytes(line)
    (request,) = read_request_file(tmp_path / "asked.jsonl", max_new_tokens=4)
    assert request.images == (tmp_path / "a.png",)
    end, start = os.pipe()
    os.write(start, line)
    os.close(start)
    (request,) = read_request_file(Path(f"/dev/fd/{end}"), max_new_tokens=4)
    os.close(end)
    assert request.images == (Path("a.png"),)


def test_each_request_draws_with_a_seed_of_its_own_that_follows_from_the_jobs() -> None:
    drawn = Settings("bundle", temperature=0.5, seed=3)
    first, second = requests_of_images([Path("a.png"), Path("b.png")], ["What?"], None, 9)
    odd = Request("caf\udce9.png", first.messages)
    seeds = {drawn.sampling(request).seed for request in (first, second, odd)}
    assert len(seeds) == 3
    assert drawn.sampling(first) == Settings("other", temperature=0.5, seed=3).sampling(first)
    assert replace(drawn, seed=4).sampling(first).seed not in seeds


def test_what_is_not_drawn_has_no_seed_and_what_cannot_be_is_refused() -> None:
    assert Settings("bundle", seed=7, top_p=0.1) == Settings("bundle")
    for wrong in ({"seed": -1}, {"top_p": 0.0}, {"temperature": -1.0}):
        with pytest.raises(InputError):
            Settings("bundle", **wrong)


def test_a_request_may_bring_its_own_system_prompt_and_limit() -> None:
    own, without = read(
        {"id": "x", "prompt": "Go", "system": "Shout.", "max_new_tokens": 3},
        {"id": "y", "prompt": "Go", "system": ""},
        system="Be brief.",
    )
    assert (own.messages[0], own.max_new_tokens) == (Message("system", ("Shout.",)), 3)
    assert [message.role for message in without.messages] == ["user"]


def test_messages_keep_the_order_of_text_and_images() -> None:
    parts = [
        {"type": "text", "text": "Before:"},
        {"type": "image", "path": "a.png"},
        {"type": "text", "text": "after:"},
        {"type": "image_url", "image_url": {"url": "b.png"}},
        {"type": "image_url", "image_url": "file:///photos/c%20d.png"},
        {"type": "image_url", "image_url": {"url": "file://localhost/photos/e.png"}},
    ]
    (request,) = read(user(*parts))
    paths = [Path("data/a.png"), Path("data/b.png"), Path("/photos/c d.png"), Path("/photos/e.png")]
    assert request.messages[0].content == ("Before:", paths[0], "after:", *paths[1:])
    assert request.images == tuple(paths)


def test_images_beside_plain_messages_go_before_the_users_first_text() -> None:
    turns = [("system", "Be brief."), ("user", "What?"), ("assistant", "A cat."), ("user", "Sure?")]
    entry = {"messages": [{"role": role, "content": text} for role, text in turns], "images": ["a.png"]}
    (request,) = read(entry, system="The file's own system message is kept.")
    contents = [message.content for message in request.messages]
    assert contents == [("Be brief.",), (Path("data/a.png"), "What?"), ("A cat.",), ("Sure?",)]
    assert request.question == "Sure?"


CALL = {"id": "a", "type": "function", "function": {"name": "zoom", "arguments": '{"times": 2}'}}
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "Which bird?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "A crest."}]},
]


def test_a_conversation_may_end_with_a_tools_result() -> None:
    (request,) = read({"messages": CALLED})
    assert [message.role for message in request.messages] == ["user", "assistant", "tool"]
    assert request.messages[1].tool_calls == (ToolCall("a", "zoom", '{"times": 2}'),)
    assert (request.messages[2].tool_call_id, request.question) == ("a", "A crest.")
    (silent,) = read({"messages": [*CALLED[:2], CALLED[2] | {"content": ""}]})
    assert silent.messages[2].content == ()


def test_ids_may_be_numbers_and_default_to_the_line() -> None:
    requests = read({"id": 12, "prompt": "a"}, "", "  \n", {"prompt": "b"}, {"id": None, "prompt": "c"})
    assert [request.id for request in requests] == ["12", "4", "5"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('{"prompt": ', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([1], "expected an object, found [1]"),
        ({}, "found neither"),
        ({"prompt": "a", "messages": []}, "found both"),
        ({"prompt": "a", "image": "b.png"}, "unknown key 'image'"),
        ({"prompt": 3}, "prompt: expected a string, found 3"),
        ({"prompt": ""}, "a message is empty"),
        ({"prompt": "a", "images": "b.png"}, "images: expected a list"),
        ({"prompt": "a", "images": [1]}, "expected an image's path, found 1"),
        ({"prompt": "a", "images": ["a\0b"]}, "expected an image's path"),
        ({"prompt": "a", "max_new_tokens": True}, "expected a whole number, found true"),
        ({"prompt": "a", "max_new_tokens": 1.5}, "expected a whole number, found 1.5"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": "a", "id": True}, "id: expected"),
        ({"prompt": "a", "id": ""}, "id: expected"),
        ({"prompt": "a", "id": "first"}, "the id 'first' was there before"),
        ({"messages": []}, "not the user's"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "not the user's"),
        ({"messages": ["a"]}, "messages: expected objects"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "system, user, assistant"),
        ({"messages": [{"role": [], "content": "a"}]}, "system, user, assistant"),
        ({"messages": [{"role": "user", "content": 3}]}, "content: expected a string or a list"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "unknown key 'name'"),
        ({"messages": [{"role": "user", "content": ""}]}, "a message is empty"),
        ({"messages": CALLED[:2]}, "not the user's"),
        ({"messages": [*CALLED[:2], CALLED[0]]}, "the tool call 'a' has no result"),
        ({"messages": CALLED[::2]}, "which no call before it waits for"),
        ({"prompt": "a", "tools": []}, "unknown key 'tools'"),
        ('{"prompt": "Which?", "prompt": "What?"}', "the key 'prompt' is there twice"),
        ('{"prompt": "half \\ud83d"}', "surrogates not allowed"),
        (user({"type": "text", "text": ""}), "a message is empty"),
        (user("text"), 'found "text"'),
        (user({"type": "audio"}), "text, image, image_url"),
        (user({"type": []}), "text, image, image_url"),
        (user({"type": "text"}), "text: expected a string, found null"),
        (user({"type": "image"}), "expected an image's path, found null"),
        (user({"type": "image_url", "image_url": {"url": "a", "size": 3}}), "unknown key 'size'"),
        (user({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}), "nothing is downloaded"),
        (user({"type": "image_url", "image_url": {"url": "http://[x"}}), "nothing is downloaded"),
        (user({"type": "image_url", "image_url": {"url": "file://server/a.png"}}), "is no local file"),
        (user({"type": "image", "path": "a"}) | {"images": ["b"]}, "'images' beside images"),
        (user({"type": "text", "text": "a"}) | {"messages": [
            {"role": "system", "content": [{"type": "image", "path": "a"}]}, {"role": "user", "content": "b"}
        ]}, "an image in a message of the system"),
        ({"system": "x", "messages": [
            {"role": "system", "content": "y"}, {"role": "user", "content": "b"}
        ]}, "'system' beside a system message"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_with_what_was_expected(entry: object, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read({"id": "first", "prompt": "a"}, "", entry)
    assert str(caught.value).startswith("jobs.jsonl, line 3: ")
    assert words in str(caught.value)
    assert caught.value.hint


def test_an_id_must_not_be_the_number_of_another_line() -> None:
    with pytest.raises(InputError, match="line 2: the id '2' was there before"):
        read({"id": 2, "prompt": "a"}, {"prompt": "b"})


@pytest.mark.parametrize("lines", [[], ["", " \n"]])
def test_a_file_without_requests_is_refused(lines: list[str]) -> None:
    with pytest.raises(InputError, match=r"no requests in jobs\.jsonl"):
        read(*lines)


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "schön"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.jsonl, line 1 is not UTF-8"):
        read_request_file(tmp_path / "latin.jsonl", max_new_tokens=1)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_hold_each_request_once(count: int) -> None:
    requests = requests_of_images([Path(f"{n}.png") for n in range(5)], ["?"], None, 1)
    parts = [share_of(requests, index, count) for index in range(1, count + 1)]
    assert sorted(request.id for part in parts for request in part) == [request.id for request in requests]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_shard_is_written_as_part_and_whole() -> None:
    assert parse_shard("2/4") == (2, 4)
    assert parse_shard("1/1") == (1, 1)


@pytest.mark.parametrize("text", ["0/4", "5/4", "2", "2/", "a/b", "-1/2", "1/0", " 1/2"])
def test_a_wrong_shard_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_shard(text)
    assert "shard=2/4" in caught.value.hint
