"""Hub ids: judged before their weights are downloaded, and an error with a remedy where they cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import close_session, constants
from huggingface_hub import errors as hub_errors
from typer.testing import CliRunner

from helpers.adapters import random_pairs, write_peft
from helpers.hub_server import HubRepository, hub_handler
from helpers.places import DEMO
from helpers.tiny import edit_json, edit_weights, tiny_config, write_checkpoint
from pixtral_cli.main import app
from pixtral_export.checkpoint.hub import fetch_weights, open_source
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.model.parameters import parameters
from pixtral_export.origin import origin_of
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_runtime.errors import CheckpointError, InputError, MachineError, PixtralError

CONFIG = tiny_config()
WEIGHTS = "consolidated.safetensors"
DEEP = (60_000).to_bytes(8, "little") + b'{"a":' * 12_000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubRepository]:
    """An empty repository `owner/name`, on a server that the hub library asks, with a cache of its own."""
    repository = HubRepository(tmp_path / "remote")
    with ThreadingHTTPServer(("127.0.0.1", 0), hub_handler(repository)) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.chdir(tmp_path)
        close_session()
        yield repository
        close_session()
        server.shutdown()


def downloaded(tmp_path: Path) -> set[str]:
    return {file.name for file in (tmp_path / "cache").rglob("snapshots/*/*")}


def refused(source: str = "owner/name", kind: type[PixtralError] = CheckpointError) -> PixtralError:
    with pytest.raises(kind) as caught:
        open_source(source)
    return caught.value


# Folders


def test_a_local_folder_is_used_as_it_is(hub: HubRepository, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "owner" / "name", CONFIG)
    checkpoint = open_source("owner/name")
    assert checkpoint.path == Path("owner/name")
    assert fetch_weights("owner/name", checkpoint) is checkpoint
    assert not hub.sent and not downloaded(tmp_path)


@pytest.mark.parametrize(
    "source",
    ["nothing", "a/b/c", "/no/such", "./name", "../owner/name", "owner/", "/name", "x" * 5000, "a\0b", "~nobody/a/b"],
    ids=lambda source: source[:12],
)
def test_other_sources_are_no_folder(hub: HubRepository, source: str) -> None:
    assert "no such folder" in str(refused(source))
    assert not hub.sent


# What is downloaded, and when


@pytest.mark.parametrize("format", ["mistral", "hf", "hf-new"])
def test_a_hub_id_is_judged_from_headers_and_downloaded_later(hub: HubRepository, tmp_path: Path, format: str) -> None:
    write_checkpoint(hub.folder, CONFIG, format=format, shards=2)
    local = open_checkpoint(hub.folder)
    checkpoint = open_source("owner/name", revision="main")
    assert not any(file.is_file() for file in checkpoint.files)
    for key in ("format", "config", "stored_dtype", "total_bytes", "image_side"):
        assert getattr(checkpoint, key) == getattr(local, key)
    assert {name: (t.dtype, t.shape) for name, t in checkpoint.tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in local.tensors.items()
    }
    plan = plan_export(checkpoint, ExportSettings())
    assert plan.weight_bytes == plan_export(local, ExportSettings()).weight_bytes
    whole = fetch_weights("owner/name", checkpoint)
    assert whole.path == checkpoint.path and all(file.is_file() for file in whole.files)
    for parameter in parameters(CONFIG):
        assert torch.equal(whole.read(parameter), local.read(parameter))
    assert fetch_weights("owner/name", open_source("owner/name")).tensors == whole.tensors


def test_an_adapter_of_this_machine_goes_with_a_model_of_the_hub(hub: HubRepository, tmp_path: Path) -> None:
    write_checkpoint(hub.folder, CONFIG)
    adapter = write_peft(tmp_path / "adapter", random_pairs(CONFIG))
    checkpoint = open_source("owner/name", lora=adapter)
    assert not any(file.is_file() for file in checkpoint.files)
    whole, local = fetch_weights("owner/name", checkpoint), open_source(str(hub.folder), lora=adapter)
    for parameter in parameters(CONFIG):
        assert torch.equal(whole.read(parameter), local.read(parameter))
    assert whole.lora == local.lora and whole.lora is not None


def test_what_a_bundle_is_made_from_is_known_before_the_weights_are_here(hub: HubRepository) -> None:
    write_checkpoint(hub.folder, CONFIG)
    judged = open_source("owner/name")
    plan = plan_export(judged, ExportSettings(max_context=512))
    before = origin_of("owner/name", judged, plan)
    assert hub.weights_sent < judged.total_bytes
    assert origin_of("owner/name", fetch_weights("owner/name", judged), plan) == before
    local = origin_of(str(hub.folder), open_source(str(hub.folder)), plan)
    assert local["checkpoint"] != before["checkpoint"] and local["settings"] == before["settings"]


def test_of_a_large_file_the_first_bytes_are_asked_for(hub: HubRepository, tmp_path: Path) -> None:
    file = write_checkpoint(hub.folder, tiny_config(decoder=replace(CONFIG.decoder, hidden_dim=4000))) / WEIGHTS
    open_source("owner/name")
    assert hub.sent[WEIGHTS] == 100_001 < file.stat().st_size / 20
    assert downloaded(tmp_path) == {"params.json", "tekken.json"}


def test_of_two_formats_only_the_mistral_weights_are_downloaded(hub: HubRepository, tmp_path: Path) -> None:
    write_checkpoint(hub.folder, CONFIG)
    write_checkpoint(hub.folder, CONFIG, format="hf", shards=2)
    (hub.folder / "notes.txt").touch()
    checkpoint = fetch_weights("owner/name", open_source("owner/name"))
    assert checkpoint.format == "mistral"
    assert downloaded(tmp_path) == {
        WEIGHTS, "params.json", "tekken.json", "config.json", "model.safetensors.index.json",
    }  # fmt: skip


def test_hf_weights_are_downloaded_where_there_are_no_others(hub: HubRepository) -> None:
    write_checkpoint(hub.folder, CONFIG, format="hf-new", shards=2)
    (hub.folder / "params.json").write_text("{}", encoding="utf-8")
    (hub.folder / "original").mkdir()
    (hub.folder / "original" / WEIGHTS).write_bytes(b"another format, in a folder of its own")
    checkpoint = fetch_weights("owner/name", open_source("owner/name"))
    assert checkpoint.format == "hf-new" and len(checkpoint.files) == 2


def test_what_was_downloaded_is_used_where_the_hub_cannot_be_reached(hub: HubRepository) -> None:
    write_checkpoint(hub.folder, CONFIG)
    judged = open_source("owner/name")
    hub.broken = True
    assert "cannot be reached" in str(refused(kind=MachineError))
    hub.broken = False
    fetch_weights("owner/name", judged)
    hub.broken = True
    assert all(file.is_file() for file in open_source("owner/name").files)


def test_a_disk_that_is_too_small_is_said_before_the_download(
    hub: HubRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(hub.folder, CONFIG)
    checkpoint = open_source("owner/name")
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    sent = hub.weights_sent
    with pytest.raises(MachineError, match="to download") as caught:
        fetch_weights("owner/name", checkpoint)
    assert "HF_HOME" in caught.value.hint and hub.weights_sent == sent


@pytest.mark.parametrize("command", [("plan",), ("export", "-o", "b", "--dry-run")], ids=lambda words: words[0])
def test_plans_download_no_weights(hub: HubRepository, tmp_path: Path, command: tuple[str, ...]) -> None:
    shutil.copytree(DEMO, hub.folder)
    done = CliRunner().invoke(app, [command[0], "owner/name", *command[1:], "--json"])
    assert done.exit_code == 0, done.stderr
    assert WEIGHTS not in downloaded(tmp_path) and hub.weights_sent == 100_001


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-o", "photos"), "is no bundle"),
        (("-o", "b", "--kv-cache", "int8", "--calibration", "nothing"), "nothing"),
        (("-o", "b", "--max-context", "0"), "context of 0"),
        (("-o", "b", "--build", "rtx:sm1"), "sm1"),
    ],
    ids=["target", "calibration", "setting", "engines"],
)
def test_what_an_export_cannot_do_is_said_before_the_download(
    hub: HubRepository, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    write_checkpoint(hub.folder, CONFIG)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    done = CliRunner().invoke(app, ["export", "owner/name", *arguments])
    assert done.exit_code == 3 and words in done.stderr
    assert WEIGHTS not in downloaded(tmp_path)


# What is refused without its weights


def test_a_damaged_header_on_the_hub_is_named(hub: HubRepository, tmp_path: Path) -> None:
    write_checkpoint(hub.folder, CONFIG)
    for data in (b"\2\0\0\0\0\0\0\0[]", b"short", b"\xff" * 100, b'\x0f\0\0\0\0\0\0\0{"a": {"b": 1}}', DEEP):
        (hub.folder / WEIGHTS).write_bytes(data)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        assert "header is broken" in str(refused())


def test_a_quantized_copy_is_refused_by_its_header_with_its_original(hub: HubRepository, tmp_path: Path) -> None:
    write_checkpoint(hub.folder, CONFIG)
    scale = {"layers.0.attention.wq.qscale_weight": torch.ones(())}
    edit_weights(hub.folder / WEIGHTS, lambda weights: weights.update(scale))
    card = "---\nlicense: apache-2.0\nbase_model:\n- mistralai/Pixtral-12B-2409\n---\n# FP8\n"
    (hub.folder / "README.md").write_text(card, encoding="utf-8")
    error = refused()
    assert "already quantized" in str(error) and "pixtral export mistralai/Pixtral-12B-2409" in error.hint
    assert WEIGHTS not in downloaded(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["pixtral-12b-q4_0.gguf", "config.json"], "GGUF"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter (LoRA)"),
        (["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "pickle"),
    ],
)
def test_other_kinds_are_refused_by_their_names(hub: HubRepository, names: list[str], words: str) -> None:
    hub.folder.mkdir()
    for name in names:
        (hub.folder / name).write_text("{}", encoding="utf-8")
    assert words in str(refused())
    assert not hub.weights_sent


@pytest.mark.parametrize("kind", ["config", "tokenizer"])
def test_a_model_of_another_family_is_refused_by_its_small_files(hub: HubRepository, kind: str) -> None:
    write_checkpoint(hub.folder, CONFIG)
    if kind == "config":
        edit_json(hub.folder / "params.json", lambda data: data.update(moe={"num_experts": 8}))
    else:
        (hub.folder / "tekken.json").rename(hub.folder / "tokenizer.model.v3")
    assert {"config": "a mixture of experts", "tokenizer": "SentencePiece"}[kind] in str(refused())
    assert not hub.weights_sent


# What the hub refuses


def test_a_gated_repository_an_unknown_one_and_an_unknown_revision(hub: HubRepository) -> None:
    write_checkpoint(hub.folder, CONFIG)
    assert "no such public repository" in str(refused("owner/other"))
    with pytest.raises(CheckpointError, match="no revision 'v2'"):
        open_source("owner/name", revision="v2")
    hub.gated = True
    error = refused()
    assert "licence" in str(error) and "hf auth login" in error.hint
    assert not hub.sent


def answer(status: int) -> Any:
    return SimpleNamespace(headers={}, request=None, status_code=status)


@pytest.mark.parametrize(
    ("error", "kind", "message", "hint"),
    [
        (hub_errors.GatedRepoError("x", response=answer(403)), InputError, "licence", "hf auth login"),
        (hub_errors.HfHubHTTPError("x", response=answer(401)), InputError, "licence", "huggingface.co/owner/name"),
        (hub_errors.RepositoryNotFoundError("x", response=answer(404)), InputError, "no such public", "spelling"),
        (hub_errors.RevisionNotFoundError("x", response=answer(404)), InputError, "no revision 'v1'", "commits"),
        (hub_errors.HFValidationError("x"), InputError, "no valid hub id", "OWNER/NAME"),
        (hub_errors.HfHubHTTPError("503 Server Error", response=answer(503)), MachineError, "503", "hf download"),
        (hub_errors.LocalEntryNotFoundError("down\nmore"), MachineError, r"reached \(down\)", "hf download owner/name"),
        (hub_errors.OfflineModeIsEnabled("offline"), MachineError, r"reached \(offline\)", "pixtral export FOLDER"),
        (hub_errors.HTTPError(""), MachineError, r"reached \(HTTPError\)", "hf download"),  # type: ignore[attr-defined]
        (TimeoutError(), MachineError, r"reached \(TimeoutError\)", "hf download"),
        (OSError(28, "No space left on device"), MachineError, "no disk space", "HF_HOME"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_hub_failures_become_errors_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[InputError], message: str, hint: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(kind, match=message) as caught:
        open_source("owner/name", revision="v1")
    assert hint in caught.value.hint and "owner/name" in str(caught.value)


def test_offline_the_hub_library_itself_ends_in_a_machine_error(tmp_path: Path) -> None:
    code = (
        "from pixtral_export.checkpoint.hub import open_source\n"
        "from pixtral_runtime.errors import MachineError\n"
        "try:\n    open_source('owner/name')\n"
        "except MachineError as error:\n    print(error, error.hint, sep='|')"
    )
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "cannot be reached" in run.stdout and "hf download owner/name" in run.stdout
