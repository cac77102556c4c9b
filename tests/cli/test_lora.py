"""`--lora`: what the commands make of an adapter, and say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.adapters import random_pairs, write_mistral_lora, write_peft
from helpers.tiny import tiny_config, write_checkpoint
from pixtral_cli.main import app
from pixtral_runtime.files import sha256_of_file

CONFIG = tiny_config()


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), CONFIG)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_peft(tmp_path_factory.mktemp("adapters") / "receipts", random_pairs(CONFIG))


def test_a_bundle_names_its_adapter_and_is_checked_with_it(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    made = invoke(
        "export", checkpoint, "-o", bundle, "--lora", adapter, "--dtype", "float32", "--max-context", 512, "--json"
    )
    assert made.exit_code == 0, made.stderr
    digest = sha256_of_file(adapter / "adapter_model.safetensors")
    shown = f"receipts (sha256 {digest[:16]})"
    assert json.loads(made.stdout)["lora"] == shown
    assert json.loads((bundle / "bundle.json").read_text())["lora"] == {"name": "receipts", "sha256": digest}
    assert shown in invoke("inspect", bundle).stdout
    assert json.loads(invoke("inspect", bundle, "--json").stdout)["lora"] == {"name": "receipts", "sha256": digest}
    assert json.loads(invoke("plan", bundle, "--json").stdout)["lora"] == shown

    checked = invoke("check", bundle, "--against", checkpoint, "--lora", adapter)
    assert checked.exit_code == 0 and "PASSED" in checked.stdout, checked.stderr
    other = write_mistral_lora(tmp_path / "other", CONFIG, random_pairs(CONFIG, rank=2), None)
    for options, seen in (([], "none"), (["--lora", other], "other (sha256 ")):
        refused = invoke("check", bundle, "--against", checkpoint, *options)
        assert refused.exit_code == 3
        assert f"was made with the adapter {shown}, seen {seen}" in refused.stderr
        assert "--lora FOLDER" in refused.stderr


def test_plans_name_the_adapter_and_write_nothing(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    dry = json.loads(
        invoke("export", checkpoint, "-o", tmp_path / "b", "--lora", adapter, "--dry-run", "--json").stdout
    )
    planned = json.loads(invoke("plan", checkpoint, "--lora", adapter, "--json").stdout)
    without = json.loads(invoke("plan", checkpoint, "--json").stdout)
    assert dry["lora"] == planned["lora"] and dry["lora"].startswith("receipts (sha256 ")
    assert without["lora"] is None
    assert planned["bundle_bytes"] == without["bundle_bytes"]
    assert planned["export_seconds"] >= without["export_seconds"]
    assert not (tmp_path / "b").exists()


def test_an_adapter_that_is_not_there_is_refused_with_the_flag(checkpoint: Path, tmp_path: Path) -> None:
    for command in (("export", checkpoint, "-o", tmp_path / "b"), ("plan", checkpoint)):
        refused = invoke(*command, "--lora", tmp_path / "nowhere")
        assert refused.exit_code == 3
        assert "nowhere: no such folder" in refused.stderr and "--lora FOLDER" in refused.stderr


def test_an_assumed_scaling_is_said(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_mistral_lora(tmp_path / "adapter", CONFIG, random_pairs(CONFIG), None)
    done = invoke("export", checkpoint, "-o", tmp_path / "b", "--lora", folder, "--dry-run")
    assert done.exit_code == 0 and "assumed: 2.0" in done.stderr


def test_an_adapter_in_the_place_of_a_checkpoint_is_refused_with_the_way_to_use_it(adapter: Path) -> None:
    refused = invoke("plan", adapter)
    assert refused.exit_code == 3
    assert f"with this adapter; --lora {adapter}" in refused.stderr
