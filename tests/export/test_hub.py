"""Hub ids: downloaded where the network allows, and an error with a remedy where not."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors as hub_errors

from helpers.tiny import tiny_config, write_checkpoint
from pixtral_export.checkpoint.hub import resolve_checkpoint
from pixtral_export.checkpoint.reader import Checkpoint, open_checkpoint
from pixtral_runtime.errors import InputError, MachineError

CONFIG = tiny_config()


class Hub:
    """A hub of one repository, in place of `snapshot_download`. Records what is asked for."""

    def __init__(self, remote: Path, cache: Path) -> None:
        self.remote, self.cache = remote, cache
        self.asked: list[tuple[str, str | None]] = []

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((repo_id, revision))
        self.cache.mkdir(exist_ok=True)
        for file in self.remote.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, self.cache / file.name)
        return str(self.cache)

    @property
    def downloaded(self) -> set[str]:
        return {file.name for file in self.cache.iterdir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "remote", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return hub


def test_a_local_folder_is_used_as_it_is(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_checkpoint("owner/name") == Path("owner/name")
    assert resolve_checkpoint(str(tmp_path)) == tmp_path
    assert not hub.asked


@pytest.mark.parametrize("source", ["nothing", "a/b/c", "/no/such", "./name", "../owner/name", "owner/", "/name", ""])
def test_other_sources_are_no_folder(hub: Hub, source: str, tmp_path: Path) -> None:
    if source == "":
        assert resolve_checkpoint(source) == Path()  # the working folder, as everywhere in pathlib
        return
    with pytest.raises(InputError, match="no such folder"):
        resolve_checkpoint(source)
    assert not hub.asked


def test_of_two_formats_only_the_mistral_weights_are_downloaded(hub: Hub) -> None:
    write_checkpoint(hub.remote, CONFIG)
    write_checkpoint(hub.remote, CONFIG, format="hf", shards=2)
    (hub.remote / "README.md").touch()
    folder = resolve_checkpoint("owner/name", revision="v1")
    assert set(hub.asked) == {("owner/name", "v1")}
    assert hub.downloaded == {
        "consolidated.safetensors", "params.json", "tekken.json", "config.json", "model.safetensors.index.json",
    }  # fmt: skip
    assert open_checkpoint(folder).format == "mistral"


@pytest.mark.parametrize("has_params", [False, True])
def test_hf_weights_are_downloaded_where_there_are_no_others(hub: Hub, has_params: bool) -> None:
    write_checkpoint(hub.remote, CONFIG, format="hf-new", shards=2)
    if has_params:
        (hub.remote / "params.json").write_text("{}", encoding="utf-8")
    checkpoint: Checkpoint = open_checkpoint(resolve_checkpoint("owner/name"))
    assert checkpoint.format == "hf-new" and len(checkpoint.files) == 2


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
        resolve_checkpoint("owner/name", revision="v1")
    assert hint in caught.value.hint and "owner/name" in str(caught.value)


def test_offline_the_hub_library_itself_ends_in_a_machine_error(tmp_path: Path) -> None:
    code = (
        "from pixtral_export.checkpoint.hub import resolve_checkpoint\n"
        "from pixtral_runtime.errors import MachineError\n"
        "try:\n    resolve_checkpoint('owner/name')\n"
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
