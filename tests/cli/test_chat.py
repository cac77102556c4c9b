"""`pixtral ask` as a conversation, at a terminal and through a pipe."""

from __future__ import annotations

import io
import os
import pty
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.bundles import export_tiny, exported
from helpers.places import DEMO, IMAGES, ROOT
from helpers.terminal import CTRL_C, CTRL_D, TAB, UP, Terminal
from helpers.tiny import tiny_config, write_checkpoint
from pixtral_cli import output, typed_lines
from pixtral_cli.chat import Chat, converse
from pixtral_cli.commands.ask import DEFAULT_PROMPT
from pixtral_cli.main import app
from pixtral_cli.typed_lines import HISTORY_LINES, completions, read_message
from pixtral_export.plan import ExportSettings
from pixtral_runtime import Conversation, Message, load
from pixtral_runtime.errors import ContextError
from pixtral_runtime.inputs.image_files import open_image

BLUE, TEAL = IMAGES / "blue_circle_64x64.png", IMAGES / "teal_circle_128x64.png"
COLOR, CIRCLE, SHAPE = "what color is the shape?", "is there a circle?", "what shape is in the image?"
GREETING = "Ctrl-D leaves.\n> "


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(DEMO, tmp_path_factory.mktemp("demo") / "bundle")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, which go on until the context ends."""
    folder = tmp_path_factory.mktemp("endless")
    checkpoint = write_checkpoint(folder / "checkpoint", tiny_config())
    return exported(checkpoint, folder / "bundle", ExportSettings(max_context=8192)).path


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[list[Terminal]]:
    terminals: list[Terminal] = []
    yield terminals
    for terminal in terminals:
        terminal.close()


def terminal(opened: list[Terminal], tmp_path: Path, *arguments: object, **environment: str) -> Terminal:
    opened.append(Terminal("ask", *arguments, cache=tmp_path / "cache", **environment))
    return opened[-1]


def piped(bundle: Path, *arguments: object, stdin: str | bytes = "") -> Any:
    return CliRunner().invoke(app, ["ask", str(bundle), *map(str, arguments)], input=stdin)


def test_a_talk_has_a_history_and_pictures_that_are_dropped(
    bundle: Path, tmp_path: Path, opened: list[Terminal]
) -> None:
    odd = tmp_path / "it's a circle.png"
    odd.symlink_to(TEAL)
    model = load(bundle)
    expected = Conversation(model, max_new_tokens=20)
    talk = terminal(opened, tmp_path, bundle, BLUE, "--max-new-tokens", 20, "-v")
    assert f"{BLUE}: 64 x 64 pixels, 72 tokens" in talk.until(GREETING)
    first = expected.ask(COLOR, BLUE)
    assert talk.answer(COLOR).splitlines() == [
        first.text, f"{first.prompt_tokens} tokens of the prompt, 0 of them read before, 4 of the answer",
    ]  # fmt: skip
    second = expected.ask(CIRCLE)
    assert second.reused_tokens == first.prompt_tokens + len(first.token_ids) - 1  # all but the end of the answer
    said = f"{second.prompt_tokens} tokens of the prompt, {second.reused_tokens} of them read before"
    assert talk.answer(CIRCLE).startswith(f"{second.text}\n{said}")

    quoted = "'" + str(odd).replace("'", "'\\''") + "' "
    assert talk.answer(quoted) == f"{odd}: 128 x 64 pixels, 136 tokens"
    assert talk.answer(f"{odd.as_uri()} {COLOR}").startswith(
        f"{odd}: 128 x 64 pixels, 136 tokens\n{expected.ask(COLOR, [odd, odd]).text}\n"
    )
    assert talk.answer(f"/image {BLUE}") == f"{BLUE}: 64 x 64 pixels, 72 tokens"
    assert talk.answer("/undo") == "the pictures that waited are forgotten"
    assert talk.answer("/undo") == "the last question is forgotten"
    expected.undo()
    assert talk.answer(SHAPE).splitlines()[0] == expected.ask(SHAPE).text
    assert talk.answer("/forget") == "the oldest question is forgotten"
    expected.forget_oldest()
    assert talk.answer(CIRCLE).splitlines()[0] == expected.ask(CIRCLE).text
    assert talk.answer("/reset") == "everything is forgotten"
    alone = load(bundle).generate(COLOR)
    assert talk.answer(COLOR).startswith(f"{alone.text}\n{alone.prompt_tokens} tokens of the prompt")
    talk.type(CTRL_D)
    assert talk.end() == 0


def test_what_goes_wrong_is_said_and_the_talk_goes_on(bundle: Path, tmp_path: Path, opened: list[Terminal]) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    large = tmp_path / "large.png"
    open_image(BLUE).resize((128, 128)).save(large)
    talk = terminal(opened, tmp_path, bundle, "--max-new-tokens", 20)
    talk.until(GREETING)
    assert talk.answer("/imgae x.png").startswith("error: there is no /imgae\nhint: /image, /undo, ")
    assert talk.answer("/reset now").startswith("error: /reset takes nothing behind it")
    assert talk.answer("/image").startswith("error: /image without a file")
    assert f"{tmp_path}/broken.png" in talk.answer(f"/image {tmp_path}/broken.png")
    assert "gone.png: No such file" in talk.answer(f"{tmp_path}/gone.png")
    assert "stays part of the question" in talk.answer(f"{tmp_path}/gone.png {COLOR}")
    assert "/image FILE …" in talk.answer("/help")
    assert talk.answer("/system") == "there is no system prompt"
    talk.answer("/system Answer by one word.")
    assert talk.answer("/system") == "Answer by one word."
    assert talk.answer("/reset") == "everything is forgotten"

    talk.answer(f"/image {large} {large} {large}")
    assert "would have 1,088 tokens of pictures, of 1,024 at most" in talk.answer(f"/image {large}")
    model = load(bundle)
    expected = Conversation(model, system="Answer by one word.", max_new_tokens=20)
    assert talk.answer(SHAPE) == expected.ask(SHAPE, [large] * 3).text
    talk.answer(f"/image {large}")
    full = talk.answer(COLOR)
    assert "leaves no room" in full and "/forget drops the oldest question, /reset begins anew" in full
    talk.answer("/undo")
    assert talk.answer(COLOR) == expected.ask(COLOR).text
    talk.type("/exit\n")
    assert talk.end() == 0


def test_ctrl_c_stops_the_answer_and_not_the_talk(endless: Path, tmp_path: Path, opened: list[Terminal]) -> None:
    talk = terminal(opened, tmp_path, endless, BLUE, "--max-new-tokens", 8000, "-v")
    talk.until(GREETING)
    for message, reused in (("one", " 0 of them read before"), ("two", "")):
        talk.type(f"{message}\n")
        talk.until(f"{message}\n")
        talk.until_more(30)
        talk.type(CTRL_C)
        stopped = talk.until("\n> ")
        assert "\nstopped; what was said is kept\n" in stopped
        assert " 8,000 of the answer" not in stopped
        assert (" 0 of them read before" in stopped) == bool(reused), "an answer that was stopped is history, as others"
    talk.type("half a line")
    talk.until("half a line")
    talk.interrupt()
    talk.until("Ctrl-C again leaves")
    talk.until("> ")
    assert talk.answer("/system") == "there is no system prompt", "the line was cleared"
    talk.interrupt()
    talk.until("Ctrl-C again leaves, as Ctrl-D does\n> ")
    talk.interrupt()
    assert talk.end() == 0


def test_ctrl_c_before_the_answer_forgets_the_question(
    endless: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(load(endless), max_new_tokens=50)
    talk = Chat(conversation, True, print)
    typed = iter([f"{BLUE} one", "two"])

    def read(prompt: str) -> str:
        if (message := next(typed, None)) is None:
            raise EOFError
        return message

    build = conversation.model.prompts.build

    def build_slowly(*arguments: Any) -> Any:
        monkeypatch.setattr(conversation.model.prompts, "build", build)
        os.kill(os.getpid(), signal.SIGINT)
        return build(*arguments)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(conversation.model.prompts, "build", build_slowly)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    converse(talk, conversation)
    assert "stopped before there was an answer" in capsys.readouterr().err
    (question, _) = conversation.messages
    assert question.content[1:] == ("two",), "and its picture waited for the next one"


def test_a_signal_to_end_ends_the_talk(endless: Path, tmp_path: Path, opened: list[Terminal]) -> None:
    talk = terminal(opened, tmp_path, endless, "--max-new-tokens", 8000)
    talk.until(GREETING)
    talk.type("one\n")
    talk.until("one\n")
    talk.process.send_signal(signal.SIGTERM)
    assert talk.end() == 130
    assert "Traceback" not in talk.shown


def test_lines_are_remembered_for_their_user_alone(bundle: Path, tmp_path: Path, opened: list[Terminal]) -> None:
    file = tmp_path / "cache" / "pixtral" / "conversation_history"
    file.parent.mkdir(parents=True)
    file.write_text("old\n" * (HISTORY_LINES + 50))
    file.chmod(0o644)
    talk = terminal(opened, tmp_path, bundle, "--max-new-tokens", 1, TERM="xterm")
    talk.until(GREETING)
    (tmp_path / "a b.png").symlink_to(BLUE)
    talk.type(f"/im{TAB}{tmp_path}/a{TAB}\n")
    assert talk.until("\n> ").startswith(f"/image {tmp_path}/a\\ b.png \n{tmp_path}/a b.png: 64 x 64 pixels")
    talk.type(UP + UP + "\n")
    talk.until("old")
    talk.until("\n> ")
    talk.type("first \\\nsecond\n")
    talk.until("cut at 1 tokens, as --max-new-tokens says\n")
    talk.until("> ")
    talk.type(CTRL_D)
    assert talk.end() == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    lines = file.read_text().splitlines()
    assert len(lines) == HISTORY_LINES
    assert lines[-4:] == [f"/image {tmp_path}/a\\ b.png ", "old", "first \\", "second"]


def test_an_answer_says_that_the_context_ended_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(bundle)
    (token, *_) = model.prompts.encode("and")
    monkeypatch.setattr("pixtral_runtime.generation.scheduler.Sampler", lambda *_: lambda logits: token)
    notes: list[str] = []
    chat = Chat(Conversation(model, max_new_tokens=5000), True, notes.append)
    chat.say(COLOR)
    assert notes[-1].startswith("cut, as the context is full; /forget drops the oldest question")
    with pytest.raises(ContextError, match="leaves no room"):
        chat.say(CIRCLE)


def test_without_a_terminal_to_answer_on_there_is_no_conversation(bundle: Path) -> None:
    master, slave = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "pixtral_cli", "ask", str(bundle), str(BLUE)],
        stdin=slave, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    os.close(master)
    os.close(slave)
    assert (done.stdout, done.stderr) == (load(bundle).generate(DEFAULT_PROMPT, BLUE).text + "\n", "")


def test_who_waits_for_a_question_on_standard_input_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    end, begin = os.pipe()
    said: list[str] = []

    def talk(text: str) -> None:
        said.append(text)
        os.write(begin, b"Which?\r\n")
        os.close(begin)

    monkeypatch.setattr(output, "talk", talk)
    monkeypatch.setattr(typed_lines, "PATIENCE_S", 0)
    with os.fdopen(end) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert list(typed_lines.piped_messages()) == ["Which?"]
    assert "-p asks one" in said[0]


def test_lines_of_a_pipe_are_a_conversation(bundle: Path) -> None:
    done = piped(bundle, BLUE, "--max-new-tokens", 9, stdin=f"{COLOR}\n\n/image {TEAL}\n{CIRCLE}\n/reset\n{COLOR}\n")
    expected = Conversation(load(bundle), max_new_tokens=9)
    answers = [expected.ask(COLOR, BLUE), expected.ask(CIRCLE, TEAL), load(bundle).generate(COLOR, max_new_tokens=9)]
    assert done.stdout == "".join(f"{answer.text}\n" for answer in answers), done.stderr
    assert (done.exit_code, done.stderr) == (0, "")


def test_a_message_may_have_several_lines(bundle: Path) -> None:
    for stdin in ('"""what color\nis the shape?"""\n', "what color\\\nis the shape?\n", '"""what color\nis the shape?'):
        done = piped(bundle, BLUE, stdin=stdin)
        assert done.stdout == load(bundle).generate("what color\nis the shape?", BLUE).text + "\n", stdin
    left = iter(['"""a', "b\\", '"""', "c"])
    assert [read_message(lambda _: next(left)) for _ in range(2)] == ["a\nb\\\n", "c"]


@pytest.mark.parametrize("stdin", ["", "\n \n", f"{TEAL}\n"])
def test_pictures_without_a_question_are_described(stdin: str, bundle: Path) -> None:
    pictures = [BLUE, TEAL] if stdin.strip() else [BLUE]
    done = piped(bundle, BLUE, stdin=stdin)
    assert done.stdout == load(bundle).generate(DEFAULT_PROMPT, pictures).text + "\n"


def test_json_is_one_answer_to_all_of_standard_input(bundle: Path) -> None:
    model = load(bundle)
    for stdin, question in (("", DEFAULT_PROMPT), ("what color\nis it?\n", "what color\nis it?")):
        text = model.generate(question, BLUE, max_new_tokens=9).text
        done = piped(bundle, BLUE, "--json", "--max-new-tokens", 9, stdin=stdin)
        assert f'"text": "{text}"' in done.stdout, done.stderr


def test_a_pipe_ends_at_the_first_thing_that_goes_wrong(bundle: Path) -> None:
    for line, words in (("/imgae x", "there is no /imgae"), ("/x/gone.png", "gone.png"), (b"caf\xe9", "not UTF-8")):
        wrong = line if isinstance(line, bytes) else line.encode()
        done = piped(bundle, BLUE, "--max-new-tokens", 2, stdin=wrong + b"\nis there a circle?\n")
        assert (done.exit_code, done.stdout) == (3, "")
        assert words in done.stderr


def test_without_question_and_image_there_is_nothing_to_do(bundle: Path) -> None:
    for more in ([], ["--json"]):
        done = piped(bundle, *more)
        assert done.exit_code == 3
        assert "there is no question and no image" in done.stderr


def test_a_question_on_the_command_line_leaves_standard_input_alone(bundle: Path) -> None:
    asked = load(bundle).generate([Message("user", (open_image(BLUE), COLOR))])
    assert piped(bundle, BLUE, "-p", COLOR, stdin="another?\n").stdout == asked.text + "\n"


def test_commands_and_names_of_pictures_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("it's a.png", "b.png", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "box of 2").mkdir()
    (tmp_path / "box of 2" / "c.jpg").touch()
    commands = ("image", "reset", "undo")
    assert completions("/", commands) == ["/image ", "/reset ", "/undo "]
    assert completions("/re", commands) == ["/reset "]
    assert completions("what is", commands) == completions("", commands) == completions("/undo b", commands) == []
    assert completions("/image ", commands) == ["b.png ", "box\\ of\\ 2/", "it\\'s\\ a.png "]
    assert completions("/image b.png b", commands) == ["b.png ", "box\\ of\\ 2/"]
    assert completions("/image ~/box\\ o", commands) == ["~/box\\ of\\ 2/"]
    assert completions("/image ~/box\\ of\\ 2/", commands) == ["~/box\\ of\\ 2/c.jpg "]
    assert completions("/image .h", commands) == [".hidden.png "]
    assert completions(f"/image {tmp_path}/absent/x", commands) == []
