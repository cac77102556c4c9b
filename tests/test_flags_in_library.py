"""Library code does not speak command line: it names options in Python, and the command line knows a flag for each.

Whole commands are text that anybody may type in a shell, `pixtral export CHECKPOINT -o BUNDLE --force` as `df -h .`;
those of pixtral are held to the flags that the command has.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from helpers.places import ROOT
from pixtral_cli.main import app
from pixtral_cli.output import remedy_text
from pixtral_runtime.errors import Option

LIBRARIES = ("runtime/pixtral_runtime", "export/pixtral_export", "engines/pixtral_engines")
FILES = [path for folder in LIBRARIES for path in sorted((ROOT / folder).rglob("*.py"))]
FOREIGN = ("df", "git", "hf", "iconv", "ls", "magick", "nvidia-smi", "pip", "ps", "ray", "sed", "sudo")
FOREIGN_COMMAND = re.compile(rf"\b({'|'.join(FOREIGN)}) ")
OUR_COMMAND = re.compile(r"\bpixtral (?P<name>[a-z]+)\b")
FLAG = re.compile(r"(?<![\w-])--?[A-Za-z][A-Za-z-]*(?![\w=-])")  # --query-gpu=… is for another program
ARGUMENTS = ("-q",)  # of another program, an argument of its own
BETWEEN_REMEDIES = re.compile(r"; |, or |, then ")


def flags_by_command() -> dict[str, set[str]]:
    group = typer.main.get_command(app)
    return {
        name: {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }


COMMANDS = flags_by_command()
OURS = set[str]().union(*COMMANDS.values())


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every string but docstrings; what an f-string fills in is an ellipsis."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        if isinstance(node, ast.JoinedStr):
            skipped |= set(node.values)
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node.lineno, node.value


def complaints(code: str) -> list[str]:
    """Flags that a file of the library names outside a whole command, or that the command does not have."""
    found = []
    for line, text in texts(ast.parse(code)):
        for part in BETWEEN_REMEDIES.split(text):
            foreign, ours = FOREIGN_COMMAND.search(part), OUR_COMMAND.search(part)
            end = min(command.start() for command in (foreign, ours) if command) if foreign or ours else len(part)
            alone = [flag for flag in FLAG.findall(part[:end]) if flag in OURS and part not in ARGUMENTS]
            found += [f"{line}: {flag} in {text!r}" for flag in alone]
            if ours and ours["name"] in COMMANDS and not foreign:
                wanted = FLAG.findall(part[ours.end() :])
                found += [
                    f"{line}: {ours['name']} has no {flag}" for flag in wanted if flag not in COMMANDS[ours["name"]]
                ]
    return found


def options(code: str) -> Iterator[tuple[int, ast.expr]]:
    """Line and name of every `Option(…)`."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Option":
            yield node.lineno, node.args[0] if node.args else node.keywords[0].value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_of_the_library_names_a_flag(path: Path) -> None:
    assert not complaints(path.read_text(encoding="utf-8"))


def test_every_option_that_the_library_names_is_a_flag_of_some_command() -> None:
    names = {}
    for path in FILES:
        for line, name in options(path.read_text(encoding="utf-8")):
            where = f"{path.relative_to(ROOT)}:{line}"
            assert isinstance(name, ast.Constant), f"{where}: the name must be there to read"
            names[str(name.value)] = where
    assert len(names) > 30
    assert not {name: where for name, where in names.items() if remedy_text(Option(name)) not in OURS}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ('raise InputError("too much", "--top-p 0.8")', "--top-p"),
        ('raise InputError(f"--batch {wanted} is too much")', "--batch"),
        ('hint = f"{remake} --force"', "--force"),
        ('HINT = "-o another.jsonl"', "-o"),
        ('hint = "choose --backend, or pixtral build BUNDLE --batch 4"', "--backend"),
        ('hint = f"pixtral build {path} --top-p 1"', "build has no --top-p"),
        ('hint = f"pixtral doctor, or --backend ort-cpu"', "--backend"),
    ],
)
def test_a_flag_in_the_library_is_found(code: str, words: str) -> None:
    (complaint,) = complaints(code)
    assert words in complaint


@pytest.mark.parametrize(
    "code",
    [
        'raise SettingError("too much", Option("top_p", 0.8))',
        'hint = f"a shorter prompt, or pixtral export … --max-context {rows}"',
        'hint = "pip install --upgrade pixtral"',
        'query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]',
        'def save() -> None:\n    """What `--save` writes."""',
        'CSS = ":root { --back: #fff; }"',
    ],
)
def test_whole_commands_docstrings_and_other_programs_may_stay(code: str) -> None:
    assert not complaints(code)


def test_an_option_that_no_command_has_is_seen() -> None:
    ((_, name),) = options('raise SettingError("no", Option("top_q", 1))')
    assert isinstance(name, ast.Constant) and remedy_text(Option(str(name.value))) not in OURS
