"""Decoders of fewer cache rows beside those of most: built together, listed, checked, and gone with the next build."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from pixtral_cli.main import app
from pixtral_runtime.backends.trt_package import import_tensorrt, version_of
from pixtral_runtime.bundle.engine_list import listed_engines, names_of_target, open_engines
from pixtral_runtime.bundle.manifest import Bundle, open_bundle

SM89 = "rtx:sm89"
OPTIONS = ("--target", SM89, "--chunk", "64", "--opt-level", "0")
VERSION = version_of(import_tensorrt("rtx"))


def test_the_command_builds_lists_checks_and_replaces_them(copy: Bundle) -> None:
    def invoke(*arguments: str) -> str:
        result = CliRunner().invoke(app, [arguments[0], str(copy.path), *arguments[1:]])
        assert result.exit_code == 0, result.output
        return result.stdout

    dry = json.loads(invoke("build", *OPTIONS, "--context", "128,256", "--dry-run", "--json"))
    assert [(one["target"], one["context"]) for one in dry["targets"]] == [(SM89, 256), (f"{SM89}@128", 128)]
    invoke("build", *OPTIONS, "--context", "128,256")
    built = open_bundle(copy.path)
    most, fewer = (listed_engines(built, name) for name in names_of_target(built, SM89))
    assert (most.context, fewer.context) == (256, 128)
    assert all((most.graphs[name] == fewer.graphs[name]) == (name != "decoder") for name in most.graphs)
    assert len(list((copy.path / "engines/rtx-sm89").glob("*.engine"))) == 4
    for rows, context in ((None, 256), (100, 128), (200, 256)):
        assert open_engines(built, SM89, VERSION, rows).context == context
    assert f"{SM89}@128" in invoke("inspect", "--verify")
    report = json.loads(invoke("check", "--engine", SM89, "--json"))
    assert {name: plan["passed"] for name, plan in report["plans"].items()} == {SM89: True, f"{SM89}@128": True}
    assert report["plans"][SM89]["least_bytes"] > report["plans"][f"{SM89}@128"]["least_bytes"]

    invoke("build", *OPTIONS, "--context", "256")
    assert names_of_target(open_bundle(copy.path), SM89) == [SM89]
    assert len(list((copy.path / "engines/rtx-sm89").glob("*.engine"))) == 3


@pytest.mark.parametrize(("context", "told"), [("128,x", "no number of rows"), ("0", "less than 1"), ("99999", "rows")])
def test_rows_that_cannot_be_are_refused(context: str, told: str, plain: Bundle) -> None:
    result = CliRunner().invoke(app, ["build", str(plain.path), *OPTIONS, "--context", context, "--dry-run"])
    assert result.exit_code == 3 and told in result.stderr
