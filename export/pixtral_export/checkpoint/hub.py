"""Where a checkpoint comes from: a local folder, or a Hugging Face hub id.

A hub id is judged before its weights are downloaded, 25 GB and more: by its list of files, by its configuration and
tokenizer, and by the headers of its weight files, of which only those bytes are asked for. Weights are downloaded in
one format, Mistral's where a repository has two. The hub library shows progress, resumes what was interrupted and keeps
the files in its own cache.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pixtral_export.checkpoint.config_file import MODEL_CARD, SUPPORTED_MODEL
from pixtral_export.checkpoint.find_weights import ADAPTER_CONFIG, INDEX, SAFETENSORS
from pixtral_export.checkpoint.generation_config import GENERATION_CONFIG
from pixtral_export.checkpoint.headers import MALFORMED, StoredTensor, broken_header, read_header, stored_tensor
from pixtral_export.checkpoint.hf_config import HF_CONFIG
from pixtral_export.checkpoint.lora import read_lora
from pixtral_export.checkpoint.mistral_config import MISTRAL_CONFIG
from pixtral_export.checkpoint.picture_size import PREPROCESSOR_CONFIG, PROCESSOR_CONFIG
from pixtral_export.checkpoint.reader import Checkpoint, open_checkpoint
from pixtral_runtime.bundle.config import ModelConfig
from pixtral_runtime.bundle.manifest import SENTENCEPIECE, TOKENIZER
from pixtral_runtime.errors import CheckpointError, MachineError, PixtralError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SMALL_FILES = (
    *(MISTRAL_CONFIG, HF_CONFIG, TOKENIZER, SENTENCEPIECE, f"*{INDEX}"),
    *(PREPROCESSOR_CONFIG, PROCESSOR_CONFIG, GENERATION_CONFIG, ADAPTER_CONFIG, MODEL_CARD),
)
HUB = "https://huggingface.co"
LOGIN_STATUS = (401, 403)
LARGER_DISK = "HF_HOME=FOLDER_ON_A_LARGER_DISK pixtral export …"
REQUESTS_AT_ONCE = 8  # Pixtral-Large has 51 weight files


def open_source(
    source: str, *, revision: str | None = None, keep_activations: bool = False, lora: Path | None = None
) -> Checkpoint:
    """The checkpoint of `source`, a folder or `owner/name`; of the latter only small files are downloaded.

    `keep_activations` is that of `open_checkpoint`; `lora` is the folder of an adapter to merge.

    Raises CheckpointError where there is no such folder or repository, its licence is not accepted, or it cannot be
    exported, and MachineError where the hub cannot be reached.
    """
    checkpoint = _opened(source, revision, keep_activations)
    if lora is None:
        return checkpoint
    adapter = read_lora(lora, checkpoint.config)
    return replace(checkpoint, lora=adapter, warnings=(*checkpoint.warnings, *adapter.warnings))


def _opened(source: str, revision: str | None, keep_activations: bool) -> Checkpoint:
    path = Path(os.path.expanduser(source))
    if os.path.exists(path):  # False, too, for a name that no file can have
        return open_checkpoint(path, keep_activations=keep_activations)
    if HUB_ID.fullmatch(source) is None:
        raise CheckpointError(
            f"{source}: no such folder", f"pixtral export FOLDER, or pixtral export {SUPPORTED_MODEL}"
        )
    folder = _download(source, revision, SMALL_FILES)
    try:
        sizes = _list_files(source, folder.name)
    except MachineError:  # but some were downloaded before
        if not any(folder.glob(f"*{SAFETENSORS}")):
            raise
        return open_checkpoint(folder, keep_activations=keep_activations)
    return open_checkpoint(folder, _HubFiles(source, folder, sizes), keep_activations=keep_activations)


def fetch_weights(source: str, checkpoint: Checkpoint) -> Checkpoint:
    """Download the weights of what `open_source` has opened, unless they are here.

    Raises MachineError where the hub cannot be reached or the disk is too small.
    """
    absent = [file for file in checkpoint.files if not file.is_file()]
    if not absent:
        return checkpoint
    here = sum(file.stat().st_size for file in checkpoint.files if file.is_file())
    needed, free = checkpoint.total_bytes - here, shutil.disk_usage(checkpoint.path).free
    if needed > free:
        raise MachineError(
            f"{source}: {needed / 1e9:.1f} GB to download, {free / 1e9:.1f} GB are free in {checkpoint.path}",
            LARGER_DISK,
        )
    _download(source, checkpoint.path.name, [file.name for file in absent])
    fetched = open_checkpoint(checkpoint.path, keep_activations=has_other_activations(checkpoint.config))
    return replace(fetched, lora=checkpoint.lora)


def has_other_activations(config: ModelConfig) -> bool:
    """Whether a model was opened with activations that its file names and no published Pixtral has."""
    return (config.vision.hidden_act, config.decoder.hidden_act) != ("silu", "silu")


@dataclass(frozen=True)
class _HubFiles:
    """The files of a repository at one commit, whose snapshot in the hub library's cache holds the small ones."""

    source: str
    folder: Path  # its name is the commit
    sizes: Mapping[str, int]

    @property
    def names(self) -> Collection[str]:
        return [name for name in self.sizes if "/" not in name]

    def size(self, name: str) -> int | None:
        return self.sizes.get(name)

    def tensors(self, names: Sequence[str]) -> list[StoredTensor]:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool, _hub_errors(self.source, self.folder.name):
            return [tensor for found in pool.map(self._header, names) for tensor in found]

    def _header(self, name: str) -> list[StoredTensor]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import SafetensorsParsingError

        file = self.folder / name
        if file.is_file():
            return read_header(file)
        try:
            header = HfApi().parse_safetensors_file_metadata(self.source, name, revision=self.folder.name)
            return [
                stored_tensor(tensor, file, info.dtype, info.shape, info.data_offsets[0])
                for tensor, info in header.tensors.items()
            ]
        except (SafetensorsParsingError, *MALFORMED) as error:
            raise broken_header(file, str(error)) from error


def _list_files(source: str, commit: str) -> dict[str, int]:
    """Names and sizes of a repository's files."""
    from huggingface_hub import HfApi

    with _hub_errors(source, commit):
        files = HfApi().model_info(source, revision=commit, files_metadata=True).siblings or []
    return {file.rfilename: file.size or 0 for file in files}


def _download(source: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(source, revision):
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))


@contextmanager
def _hub_errors(source: str, revision: str | None) -> Iterator[None]:
    """The hub library's errors as ours."""
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.HFValidationError as error:
        raise CheckpointError(f"{source}: no such folder, and no valid hub id", "pixtral export OWNER/NAME") from error
    except hub.GatedRepoError as error:
        raise _login(source) from error
    except hub.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{source}: no such folder here, and no such public repository on the Hugging Face hub",
            "check the spelling; for a private repository: hf auth login",
        ) from error
    except hub.RevisionNotFoundError as error:
        raise CheckpointError(f"{source} has no revision '{revision}'", f"see {HUB}/{source}/commits/main") from error
    except hub.HfHubHTTPError as error:
        refused = error.response.status_code in LOGIN_STATUS
        raise (_login(source) if refused else _unreachable(source, error)) from error
    except (OSError, hub.HTTPError) as error:  # type: ignore[attr-defined]  # the base class of its HTTP library
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise MachineError(f"{source}: no disk space left for the download", LARGER_DISK) from error
        raise _unreachable(source, error) from error


def _login(source: str) -> PixtralError:
    return CheckpointError(
        f"{source} needs an account that has accepted its licence",
        f"accept the licence at {HUB}/{source}, then: hf auth login",
    )


def _unreachable(source: str, error: Exception) -> PixtralError:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return MachineError(
        f"{source}: no such folder here, and the Hugging Face hub cannot be reached ({reason})",
        f"where there is a network: hf download {source} --local-dir FOLDER; then copy it here: pixtral export FOLDER",
    )
