"""The README's picture of a terminal: the screen that an output makes, and the picture that is checked in."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from draw_terminal import ANSI_COLOURS, COLUMNS, COMMANDS, PLAIN, Cell, run_in_terminal, screen, svg
from helpers.places import IMAGES, ROOT

PICTURE = ROOT / "docs" / "demo.svg"
TEXT = "{http://www.w3.org/2000/svg}text"


def shown(output: str) -> list[str]:
    return ["".join(cell.character for cell in line) for line in screen(output)]


def test_a_line_of_its_own_follows_each_line_feed() -> None:
    assert shown("one\r\n\r\ntwo\r\n") == ["one", "", "two"]


def test_what_is_written_again_stands_where_it_stood() -> None:
    assert shown("50 %\r100 %\r\n") == ["100 %"]
    assert shown("bar 1\r\nbar 2\x1b[1A\r\x1b[2Kanswer\r\n\x1b[2Kbar 1\r\nbar 2") == ["answer", "bar 1", "bar 2"]


def test_colours_end_where_they_are_ended() -> None:
    (line,) = screen("\x1b[?25l\x1b[35m1\x1b[0m2\x1b[1;38;2;249;38;114m3\x1b[39m4")
    assert line == [Cell("1", ANSI_COLOURS[5]), Cell("2", PLAIN), Cell("3", "#f92672"), Cell("4", PLAIN)]


def test_a_movement_that_is_not_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="not drawn"):
        screen("\x1b[5;1Hx")


def test_the_picture_puts_each_run_in_its_columns() -> None:
    root = ElementTree.fromstring(svg(screen("a  \x1b[31m<b> &\x1b[0m"), "title"))
    first, second = root.findall(TEXT)
    assert (first.text, second.text, second.get("fill")) == ("a", "<b> &", ANSI_COLOURS[1])
    offset, width = float(second.get("x", "")) - float(first.get("x", "")), float(second.get("textLength", ""))
    assert offset / width == pytest.approx(3 / 5)


def test_a_command_sees_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\ntest -t 1 && stty size && echo "$4 $PWD"\n', encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert shown(run_in_terminal(("run", "-h"), tmp_path)) == [f"50 {COLUMNS}", f"-h {tmp_path}"]


def test_the_picture_that_is_checked_in_shows_the_demo() -> None:
    assert PICTURE.stat().st_size < 60_000
    lines: dict[str, str] = {}
    for element in ElementTree.parse(PICTURE).iter(TEXT):
        lines[element.get("y", "")] = f"{lines.get(element.get('y', ''), '')} {element.text}".strip()
    page = set(lines.values())
    assert {f"$ pixtral {' '.join(arguments)}" for arguments in COMMANDS} <= page
    assert {
        f"tests/data/images/{path.name}: A {color} {shape} on a light background."
        for path in IMAGES.glob("*.png")
        for color, shape, _ in [path.stem.split("_")]
    } <= page
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(DEMO)", "artifacts/demo")
    assert all(f"pixtral {' '.join(arguments)} --force\n" in makefile for arguments in COMMANDS)
