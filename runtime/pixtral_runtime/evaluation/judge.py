"""Another model rates answers from 1 to 10, as MM-MT-Bench wants it (specification section 5.5).

The judge is any server of OpenAI's chat API. It gets what a person would need: the conversation with its images, the
reference answers, and the answer to rate. Ratings go to a file, a line each, as they come; a run that was stopped asks
for none twice. The key comes from the environment alone and is written nowhere; see `judge_client`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pixtral_runtime.errors import ImageError, InputError, Option, unwritable
from pixtral_runtime.evaluation.judge_client import JUDGE_URL, key_name, open_client, said_by, within
from pixtral_runtime.evaluation.prompts import PROMPTS
from pixtral_runtime.evaluation.task import Example
from pixtral_runtime.files import open_locked, write_atomically
from pixtral_runtime.inputs.openai_messages import data_uri
from pixtral_runtime.json_data import from_json, sealed, unsealed
from pixtral_runtime.server_address import OPENAI_SERVER
from pixtral_runtime.workers import start_workers

JUDGE_ANSWER_TOKENS = 2048
LOWEST_RATING, HIGHEST_RATING = 1, 10
RATING_PATTERN = re.compile(r"\[\[(\d+\.?\d*)\]\]")
REFUSED_STATUSES = (401, 403, 404, 405)  # whatever the turn: all others would be refused too


@dataclass(frozen=True)
class JudgeOptions:
    """Who rates, and how patiently.

    `attempts` bounds requests for a turn whose answers hold no rating, `retries` those for an answer that a busy or
    broken server does not give; the client waits between them, longer each time. A try ends when nothing comes for
    `timeout_s`, all of them together after `deadline_s`.
    """

    url: str
    model: str = "gpt-4o-2024-05-13"
    attempts: int = 3
    retries: int = 4
    parallel: int = 8
    timeout_s: float = 300.0
    deadline_s: float = 1800.0


@dataclass(frozen=True)
class Rating:
    """A turn's rating. `key` is a hash of what the judge was asked; without a rating, `error` says why."""

    id: str
    key: str
    rating: float | None = None
    text: str = ""
    attempts: int = 0
    error: str | None = None


def judge_messages(example: Example, answer: str) -> list[dict[str, Any]]:
    """What the judge reads: OpenAI's messages, images as data URIs where they stand in the conversation."""
    parts: list[str | Path] = ["<|The Start of Conversation with User|>\n\n"]
    references = [m.content for m in example.messages if m.role == "assistant"] + [(example.references[0],)]
    questions = [m.content for m in example.messages if m.role == "user"]
    for question, reference in zip(questions, references, strict=True):
        parts += ["### User:\n", *_readable(question), "\n\n### Reference answer:\n", *_readable(reference), "\n\n"]
    parts += [f"\n\n### Assistant's answer:\n{answer}\n\n", "<|The End of Conversation with User|>\n\n\n"]
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, Path):
            content.append({"type": "image_url", "image_url": {"url": data_uri(part)}})
        elif content and content[-1]["type"] == "text":
            content[-1]["text"] += part
        else:
            content.append({"type": "text", "text": part})
    return [{"role": "system", "content": PROMPTS["judge_system"]}, {"role": "user", "content": content}]


def rate_answers(pairs: Sequence[tuple[Example, str]], path: Path, options: JudgeOptions) -> Iterator[Rating]:
    """Yield a rating for each example and its answer, as they come, and write new ones to `path`.

    Those that `path` has are not asked for again. A turn that stays without a rating says so and stops nothing. Raises
    InputError where the server refuses as such, where the key, the address or `path` cannot be used, and MachineError
    where the package openai is missing. It may be stopped at any time; requests under way hold up nothing.
    """
    client = open_client(options.url, options.timeout_s, options.retries)
    waiting, done = deque(pairs), SimpleQueue[Rating | Exception]()
    with _opened(path) as file:
        kept = _read(file)

        def keep(rating: Rating) -> None:
            if kept.get(rating.id) != rating:
                file.write(_line(rating))
                kept[rating.id] = rating

        def ask(pair: tuple[Example, str]) -> Rating:
            return _rate(client, *pair, options, kept)

        start_workers(max(1, options.parallel), waiting, ask, done)
        try:
            for _ in pairs:
                rating = done.get()
                if isinstance(rating, Exception):
                    raise rating
                keep(rating)
                yield rating
        finally:
            waiting.clear()
            client.close()
            while not done.empty():  # paid for already
                if isinstance(rating := done.get(), Rating):
                    keep(rating)
            if not _is_there(file, path):
                write_atomically(path, b"".join(map(_line, kept.values())))


def rating_averages(rated: Sequence[tuple[float, str, int]]) -> dict[str, float]:
    """Means of ratings that come with their category and turn.

    micro: over turns. macro_category and macro_turn: over the means of each. mistral_evals_macro: over both kinds of
    means together, as that code does; which of them the paper's 6.05 is, is not known.
    """
    by_category, by_turn = (_means([(one[0], str(one[of])) for one in rated]) for of in (1, 2))
    return {
        "micro": _mean([one[0] for one in rated]),
        "macro_category": _mean(by_category),
        "macro_turn": _mean(by_turn),
        "mistral_evals_macro": _mean([*by_category, *by_turn]),
    }


def _means(values: Sequence[tuple[float, str]]) -> list[float]:
    groups: dict[str, list[float]] = {}
    for value, group in values:
        groups.setdefault(group, []).append(value)
    return [_mean(group) for group in groups.values()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rate(client: Any, example: Example, answer: str, options: JudgeOptions, kept: dict[str, Rating]) -> Rating:
    """Ask until there is a rating. What was rated before is not asked again."""
    import openai

    try:
        messages = judge_messages(example, answer)
    except ImageError as error:
        return Rating(example.id, "", error=str(error))
    key = hashlib.sha256(json.dumps([options.model, messages]).encode()).hexdigest()[:16]
    before = kept.get(example.id)
    if before is not None and before.key == key and before.rating is not None:
        return before
    text, attempt = "", 0
    for attempt in range(1, options.attempts + 1):
        try:
            ask = partial(client.chat.completions.create, model=options.model, messages=messages)
            text = _text_of(within(options.deadline_s, partial(ask, temperature=0.0, max_tokens=JUDGE_ANSWER_TOKENS)))
        except openai.APIStatusError as error:
            if 300 <= error.status_code < 400:
                raise _moved(options, error.response.headers.get("Location", "")) from None
            if error.status_code in REFUSED_STATUSES:
                raise _refused(options, error.status_code, str(error)) from None
            said = f"the judge answers {error.status_code}: {said_by(options.url, error)}"
            return Rating(example.id, key, None, text, attempt, said)
        except (openai.OpenAIError, ValueError, TimeoutError) as error:
            said, cause = said_by(options.url, error), said_by(options.url, error.__cause__ or "")
            return Rating(example.id, key, None, text, attempt, f"the judge gives no answer: {said} {cause}".strip())
        if (rating := _rating_in(text)) is not None:
            return Rating(example.id, key, rating, text, attempt)
    return Rating(example.id, key, None, text, attempt, f"no rating in {attempt} answers of the judge")


def _rating_in(text: str) -> float | None:
    """The first rating in a judge's answer; None where there is none, or where it is not from 1 to 10."""
    found = RATING_PATTERN.search(text)
    rating = float(found[1]) if found else 0.0
    return rating if LOWEST_RATING <= rating <= HIGHEST_RATING else None


def _text_of(made: Any) -> str:
    """A completion's text, empty where it has none. Raises ValueError for what is no completion: openai checks none."""
    try:
        text = made.choices[0].message.content if made.choices else None
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError("what came is no chat completion") from error
    return text if isinstance(text, str) else ""


def _refused(options: JudgeOptions, status: int, said: str) -> InputError:
    key = (f"export {key_name(options.url)}=…",)
    remedies = key if status in (401, 403) else (JUDGE_URL, Option("judge_model", "NAME"))
    return InputError(f"{options.url} refuses to rate by {options.model}: {said_by(options.url, said)}", *remedies)


def _moved(options: JudgeOptions, place: str) -> InputError:
    server = said_by(options.url, place).removesuffix("/chat/completions")
    return InputError(
        f"{options.url} sends everybody elsewhere, where pictures do not go unasked: {server}",
        Option("judge_url", server or OPENAI_SERVER, "if you trust it"),
    )


def _line(rating: Rating) -> bytes:
    return json.dumps(sealed(asdict(rating))).encode() + b"\n"


def _is_there(file: io.FileIO, path: Path) -> bool:
    """Whether the file that was opened still has its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _opened(path: Path) -> io.FileIO:
    try:
        return open_locked(path)
    except BlockingIOError as error:
        raise InputError(
            f"{path} is being written by another run", "wait for it", Option("save", "ELSEWHERE")
        ) from error
    except OSError as error:
        raise unwritable(path, error, Option("save", "ELSEWHERE")) from error


def _read(file: io.FileIO) -> dict[str, Rating]:
    """Ratings of an earlier run by example, the last of each; a line that was cut short does not count."""
    file.seek(0)
    lines = file.read().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        file.write(b"\n")
    found: dict[str, Rating] = {}
    for line in lines:
        try:
            rating = from_json(Rating, unsealed(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            continue
        found[rating.id] = rating
    return found


def _readable(content: Sequence[Any]) -> list[str | Path]:
    return [part for part in content if isinstance(part, str | Path)]
