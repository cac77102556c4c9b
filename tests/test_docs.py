"""What the documents say about interfaces is what the code does."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest
import typer

from helpers.places import ROOT
from make_synthetic_checkpoint import pixtral_12b
from pixtral_cli.main import app
from pixtral_runtime.bundle.spec import GRAPHS, graph_spec
from pixtral_runtime.inputs.openai_chat import IGNORED, NEUTRAL
from test_layers import FOLDERS, ORDER, imported_modules, modules

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_the_table_of_graph_tensors_is_the_spec() -> None:
    page = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
    expected = []
    for name in GRAPHS:
        spec = graph_spec(name, pixtral_12b(), "Act")
        for kind, tensors in (("in", spec.inputs), ("out", spec.outputs)):
            caches = [tensor.name for pair in spec.caches for tensor in pair if tensor in tensors]
            for tensor in tensors:
                if tensor.name in caches[1:]:
                    continue
                shown = f"`{caches[0]}` … `{caches[-1]}`" if caches[:1] == [tensor.name] else f"`{tensor.name}`"
                expected.append(f"| {name} {kind} | {shown} | {' × '.join(map(str, tensor.shape))} | {tensor.dtype} |")
    assert re.findall(r"^\| (?:vision|embed|decoder) (?:in|out) .*$", page, re.MULTILINE) == expected


@pytest.mark.parametrize("page", PAGES)
def test_links_between_documents_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\((?!https?://)([^)]+)\)", text)]
    assert not [target for target in targets if target and not (ROOT / page).parent.joinpath(target).exists()]


def ways(page: str) -> dict[str, list[str]]:
    """The files of each numbered list, in order, by the sentence above it."""
    lists = re.findall(r"^(\S.*:)\n\n((?:\d+\. .*\n(?:   .*\n)*)+)", page, re.MULTILINE)
    return {title: re.findall(r"`([\w/.]+/[\w.]+\.py)`", text) for title, text in lists}


def reached(first: str) -> set[str]:
    """The file itself, and every file that it imports, by whatever way."""
    paths = {module: path for package in FOLDERS for module, path in modules(package).items()}
    todo, seen = [next(module for module, path in paths.items() if path == ROOT / first)], set[str]()
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += imported_modules(paths[module].read_text(encoding="utf-8"), paths)
    return {paths[module].relative_to(ROOT).as_posix() for module in seen}


@pytest.mark.parametrize("command", ["run", "export", "build"])
def test_the_ways_through_the_code_lead_over_files_that_are_there(command: str) -> None:
    (files,) = (files for title, files in ways(CONTRIBUTING).items() if f"`pixtral {command}`" in title)
    assert files[0] == f"pixtral_cli/commands/{command}.py"
    assert len(files) == len(set(files)) >= 8
    assert [file for file in files if not (ROOT / file).is_file()] == []
    assert set(files) <= reached(files[0])


def test_a_way_over_a_file_that_is_gone_is_seen() -> None:
    page = "What it does:\n\n1. `pixtral_cli/main.py` reads,\n   `a/gone.py` writes.\n2. `b/c.py` ends.\n\nMore.\n"
    assert ways(page) == {"What it does:": ["pixtral_cli/main.py", "a/gone.py", "b/c.py"]}
    assert "pixtral_cli/output.py" in reached("pixtral_cli/main.py")
    assert "pixtral_cli/main.py" not in reached("pixtral_cli/output.py")


def test_the_picture_of_rooms_is_the_order() -> None:
    (block,) = re.findall(r"```\n(evaluation.*?)```", CONTRIBUTING, re.DOTALL)
    assert (
        tuple(tuple(re.split(r"  +", line)[0].split(", ")) for line in block.splitlines()) == ORDER["pixtral_runtime"]
    )


def test_every_python_file_that_a_document_names_is_there() -> None:
    named = {name for page in PAGES for name in re.findall(r"\b(?:[\w]+/)+\w+\.(?:py|sh)\b", read(page))}
    assert len(named) > 30
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_every_module_that_a_document_names_is_there() -> None:
    known = {module for package in FOLDERS for module in modules(package)}
    named = {name for page in PAGES for name in re.findall(r"`(pixtral_\w+(?:\.\w+)+)`", read(page))}
    assert named
    assert [name for name in sorted(named) if not {name, name.rpartition(".")[0]} & known] == []


def command_lines(page: str) -> Iterator[list[str]]:
    """The arguments of each `pixtral` in the blocks of a page."""
    for block in re.findall(r"^```(?:console)?\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            found = re.search(r"(?:^|^\$ |[|/] ?)pixtral (.*)", line)
            if found and not line.startswith("docker"):
                yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("page", [page for page in PAGES if list(command_lines(page))])
def test_commands_in_documents_have_the_options_that_they_name(page: str) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    for name, *arguments in command_lines(page):
        group.commands[name].make_context(name, arguments)  # raises where typer would refuse


def options_of(command: str) -> set[str]:
    """The flags of a command, those of every command apart."""
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    flags = {flag for one in group.commands[command].params for flag in (*one.opts, *one.secondary_opts)}
    everywhere = {"--help", "--version", "--verbose", "--quiet", "--debug"}
    return {flag for flag in flags if flag.startswith("--")} - everywhere


def test_the_page_about_serving_has_every_option_and_no_other() -> None:
    page = read("docs/serving.md")
    table = re.findall(r"^\| (`--.*?) \| .* \|$", page.partition("## Coming from vLLM")[0], re.MULTILINE)
    assert {flag for cell in table for flag in re.findall(r"`(--[\w-]+)", cell)} == options_of("serve")
    ours = re.findall(r"^\| `.*? \| (.*) \|$", page.partition("## Coming from vLLM")[2], re.MULTILINE)
    named = {flag for cell in ours for flag in re.findall(r"`(--[\w-]+)", cell)}
    assert named > {"--max-context", "--precision"}
    assert named <= options_of("serve") | options_of("export")


def test_the_page_about_serving_has_every_field_that_is_not_honoured() -> None:
    table = read("docs/serving.md").partition("## Requests")[2].partition("## Pictures")[0]
    named = {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.rpartition(" | ")[0])}
    assert named >= IGNORED | NEUTRAL.keys()


def test_an_option_that_is_gone_is_seen() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    with pytest.raises(typer.TyperException, match="No such option"):
        group.commands["run"].make_context("run", ["bundle", "--gone"])
