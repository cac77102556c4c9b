"""The application around the commands: help, shared flags, and errors that become messages and exit codes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import typer
from typer.testing import CliRunner, Result

from helpers.places import ROOT
from pixtral_cli import output
from pixtral_cli.main import COMMANDS, GROUPS, app, application
from pixtral_runtime.errors import CheckFailed, ImageError, InputError, MachineError, Option, SettingError
from pixtral_runtime.version import __version__

HEAVY = ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "mistral_common", "cv2", "numpy", "PIL", "rich")
NAMES = [function.__name__ for function, _ in COMMANDS]


def invoke(*arguments: str, commands: typer.Typer = app) -> Result:
    return CliRunner().invoke(commands, list(arguments))


def failing(error: BaseException) -> typer.Typer:
    """An application of one command, which raises."""

    def fail() -> None:
        raise error

    return application([(fail, "Example: pixtral fail")])


def terminal(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run pixtral as a program, outside the project's folder."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "export", "runtime"))}
    code = f"{before}\nfrom pixtral_cli.main import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, cwd="/", check=False
    )


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command(flag: str) -> None:
    result = invoke(flag)
    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.stdout for name in NAMES)


def test_every_command_stands_in_one_group() -> None:
    assert sorted(name for members in GROUPS.values() for name in members) == sorted(NAMES)


def test_help_shows_the_groups_with_whole_sentences_one_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = invoke("-h").stdout
    headings = page.split("Options:")[1].split("\n\n")[1:-1]  # the last is the example
    sentences = {function.__name__: (function.__doc__ or "").partition("\n")[0] for function, _ in COMMANDS}
    assert headings == [
        "\n".join([f"{heading}:", *(f"  {name:7}  {sentences[name]}" for name in members)])
        for heading, members in GROUPS.items()
    ]
    assert all(sentence.endswith(".") and not sentence.endswith("..") for sentence in sentences.values())
    assert all(len(line) <= 80 for line in page.splitlines())


def test_a_sentence_too_long_for_its_line_is_wrapped_and_not_cut() -> None:
    def long() -> None: ...

    long.__doc__ = f"Say {'word ' * 40}at last."
    page = invoke("-h", commands=application([(long, "Example: pixtral long")])).stdout
    assert f"Say {'word ' * 40}at last. Example:" in " ".join(page.split())


@pytest.mark.parametrize("name", NAMES)
def test_the_summary_of_a_command_is_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    summary = invoke(name, "-h").stdout.split("\n\n")[1]
    assert summary.endswith(".")
    assert not any(cut in summary for cut in ("...", "…"))


@pytest.mark.parametrize(("function", "epilog"), COMMANDS, ids=NAMES)
def test_every_help_page_ends_with_one_example_of_its_command(function: Callable[..., None], epilog: str) -> None:
    result = invoke(function.__name__, "-h")
    assert result.exit_code == 0
    assert result.stdout.rstrip().endswith(epilog)
    assert epilog.startswith(f"Example: pixtral {function.__name__} ")


@pytest.mark.parametrize("name", NAMES)
def test_every_command_takes_the_shared_flags(name: str) -> None:
    page = invoke(name, "-h").stdout
    assert all(flag in page for flag in ("-v, --verbose", "-q, --quiet", "--debug", "-V, --version", "-h, --help"))


@pytest.mark.parametrize("arguments", [("-V",), ("--version",), ("doctor", "-V")])
def test_version_is_one_line_on_stdout(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (0, f"pixtral {__version__}\n")


def test_help_imports_nothing_heavy() -> None:
    spy = (
        f"import atexit, sys\natexit.register(lambda: print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr))"
    )
    done = terminal("-h", before=spy)
    assert (done.returncode, done.stderr) == (0, "[]\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("no such bundle", "pixtral export"), 3),
        (ImageError("truncated", "open it"), 3),
        (MachineError("no torch", "pip install it"), 4),
        (CheckFailed("differs by 3", "look closer"), 6),
    ],
)
def test_an_error_is_a_message_a_hint_and_its_exit_code(error: InputError, code: int) -> None:
    result = invoke("fail", commands=failing(error))
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == f"error: {error}\nhint: {error.hint}\n"


@pytest.mark.parametrize(
    ("option", "typed"),
    [
        (Option("top_p", 0.8), "--top-p 0.8"),
        (Option("backend", ("auto", "ort-cpu")), "--backend auto|ort-cpu"),
        (Option("force"), "--force"),
        (Option("resume", note="to go on with it"), "--resume to go on with it"),
        (Option("keep", "layers.0.*=float16"), "--keep 'layers.0.*=float16'"),
        (Option("output", "another.jsonl"), "-o another.jsonl"),
        (Option("prompt", "What is it?"), "-p 'What is it?'"),
    ],
)
def test_an_option_of_the_library_is_shown_as_its_flag(option: Option, typed: str) -> None:
    error = SettingError("this cannot be", option, "look closer")
    result = invoke("fail", commands=failing(error))
    assert (result.exit_code, result.stderr) == (3, f"error: this cannot be\nhint: {typed}; look closer\n")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "big.bin"), 4, "the disk is full: big.bin"),
        (MemoryError("40 GB"), 4, "not enough memory: 40 GB"),
        (PermissionError(errno.EACCES, "Permission denied", "locked/x"), 3, "locked/x: permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300), 3, "nnn: File name too long"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "loop"), 3, "loop: Too many levels"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/x"), 3, "file/x: Not a directory"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "folder"), 3, "folder: Is a directory"),
        (OSError(errno.EROFS, "Read-only file system", "/mnt/x"), 4, "/mnt/x: Read-only file system"),
        (typer.Exit(5), 5, ""),
    ],
)
def test_what_the_system_refuses_is_no_bug(error: Exception, code: int, words: str) -> None:
    result = invoke("fail", commands=failing(error))
    assert result.exit_code == code
    assert words in result.stderr
    assert "bug" not in result.stderr


def test_a_bug_is_one_short_message_and_debug_shows_the_trace() -> None:
    short = invoke("fail", commands=failing(ZeroDivisionError("oh")))
    assert short.exit_code == 1
    assert short.stderr == f"error: bug in pixtral {__version__}: ZeroDivisionError: oh\nhint: --debug shows where\n"
    for arguments in (("fail", "--debug"), ("--debug", "fail")):
        full = invoke(*arguments, commands=failing(ZeroDivisionError("oh")))
        assert full.exit_code == 1
        assert "Traceback" in full.stderr
        assert "test_cli.py" in full.stderr
        assert full.stderr.endswith(short.stderr)


@pytest.mark.parametrize("error", [OSError(errno.ELOOP, "no name"), FileNotFoundError(errno.ENOENT, "absent", "x")])
def test_what_the_system_says_of_a_file_that_nobody_named_is_a_bug(error: OSError) -> None:
    assert invoke("fail", commands=failing(error)).exit_code == 1


def test_an_interrupt_says_what_was_kept() -> None:
    result = invoke("fail", commands=failing(KeyboardInterrupt("12 records are in results.jsonl")))
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "error: interrupted: 12 records are in results.jsonl\n"


@pytest.mark.parametrize("arguments", [("dcotor",), ("doctor", "--jsno"), ("inspect",), ()])
def test_wrong_usage_exits_2_with_the_talk_on_stderr(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr


def test_a_misspelt_command_is_answered_with_the_right_one() -> None:
    assert "Did you mean 'doctor'" in invoke("dcotor").stderr


@pytest.mark.parametrize(
    "arguments", [("inspect", "no-such-bundle"), ("inspect", "--wrong"), ("-V",), ("inspect", "no-such-bundle", "-q")]
)
def test_terminal_and_test_runner_agree(arguments: tuple[str, ...]) -> None:
    real, tested = terminal(*arguments), invoke(*arguments)
    assert (real.returncode, real.stdout) == (tested.exit_code, tested.stdout)
    assert real.stderr.splitlines()[-1:] == tested.stderr.splitlines()[-1:]


@pytest.mark.parametrize(
    ("arguments", "heard"),
    [
        (("speak",), ["talk", "warning: warn"]),
        (("speak", "-v"), ["talk", "detail", "warning: warn"]),
        (("-v", "speak"), ["talk", "detail", "warning: warn"]),
        (("speak", "-q"), ["warning: warn"]),
    ],
)
def test_verbose_and_quiet_choose_the_talk_and_never_the_data(arguments: tuple[str, ...], heard: list[str]) -> None:
    def speak(as_json: bool = True) -> None:
        output.talk("talk")
        output.verbose("detail")
        output.warn("warn")
        output.print_json({"answer": "ja, schön", "as_json": as_json})

    result = invoke(*arguments, commands=application([(speak, "")]))
    assert result.exit_code == 0
    assert result.stderr.splitlines() == heard
    assert json.loads(result.stdout) == {"answer": "ja, schön", "as_json": True}


def test_progress_without_a_terminal_is_one_line_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    output.set_flags(output.Flags())
    with output.progress() as bars:
        for done in range(3):
            bars.stage("reading", done, 2)
        bars.stage("writing", 1, 1)
        print("data")
    seen = capsys.readouterr()
    assert (seen.out, seen.err) == ("data\n", "reading\nwriting\n")


def test_colour_only_on_a_terminal_that_wants_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output.warn("plain")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    output.warn("plain")
    monkeypatch.delenv("NO_COLOR")
    output.warn("yellow")
    assert capsys.readouterr().err == "warning: plain\n" * 2 + "\x1b[33mwarning:\x1b[0m yellow\n"


def test_tables_and_pairs_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("name", "size"), [("a", "1"), ("longer", "")])
    output.print_pairs({"bundle": "x", "bundle_bytes": 12_300_000, "limit": None, "verified": True})
    assert capsys.readouterr().out.splitlines() == [
        "",
        "name    size",
        "a       1",
        "longer",
        "bundle        x",
        "bundle_bytes  12,300,000 (12.3 MB)",
        "limit         -",
        "verified      True",
    ]


@pytest.mark.parametrize(("text", "size"), [("8GB", 8 * 10**9), ("1.5m", 1_500_000), ("512", 512), (" 2 kb ", 2000)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert output.parse_size(text, "--memory-limit") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "8 GiB", "nan", "inf"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--memory-limit"):
        output.parse_size(text, "--memory-limit")


def test_a_missing_extra_names_its_install_line() -> None:
    output.require("json", "export", "Exporting")
    with pytest.raises(MachineError) as caught:
        output.require("no_such_package", "export", "Exporting")
    assert caught.value.hint == "pip install 'pixtral[export]'"
