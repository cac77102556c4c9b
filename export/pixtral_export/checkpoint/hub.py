"""Where a checkpoint comes from: a local folder, or a Hugging Face hub id that is downloaded first.

Only what an export needs is downloaded: configuration and tokenizer, then weights in one format, Mistral's where a
repository has two. The hub library shows progress, resumes what was interrupted and keeps the files in its own cache.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path

from pixtral_export.checkpoint.config_file import SUPPORTED_MODEL
from pixtral_export.checkpoint.hf_config import HF_CONFIG
from pixtral_export.checkpoint.mistral_config import MISTRAL_CONFIG
from pixtral_export.checkpoint.tokenizer import TOKENIZER
from pixtral_runtime.errors import CheckpointError, MachineError, PixtralError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
SMALL_FILES = (MISTRAL_CONFIG, HF_CONFIG, TOKENIZER, "*.safetensors.index.json")
HUB = "https://huggingface.co"
LOGIN_STATUS = (401, 403)


def resolve_checkpoint(source: str, *, revision: str | None = None) -> Path:
    """The local folder of `source`, a folder or `owner/name`; the latter is downloaded at `revision`.

    Raises CheckpointError where there is no such folder or repository or its licence is not accepted, and MachineError
    where the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if HUB_ID.fullmatch(source) is None:
        raise CheckpointError(
            f"{source}: no such folder", f"pixtral export FOLDER, or pixtral export {SUPPORTED_MODEL}"
        )
    folder = _download(source, revision, SMALL_FILES)
    weights = ["model*.safetensors"]
    if (folder / MISTRAL_CONFIG).is_file():
        weights.insert(0, "consolidated*.safetensors")
    for pattern in weights:
        folder = _download(source, revision, (pattern,))
        if any(folder.glob(pattern)):
            break
    return folder


def _download(source: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
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
            raise MachineError(
                f"{source}: no disk space left for the download", "HF_HOME=FOLDER_ON_A_LARGER_DISK pixtral export …"
            ) from error
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
