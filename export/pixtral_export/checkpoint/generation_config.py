"""What a checkpoint's `generation_config.json` says of sampling: how its makers mean it to be used.

The file is Hugging Face's. As there, nothing is drawn unless `do_sample` is true, and what is absent is 1. Other keys
are left alone: they change how an answer is made by other programs, not what the graphs compute.
"""

from __future__ import annotations

from pathlib import Path

from pixtral_export.checkpoint.config_file import DOWNLOAD_HINT, Section, read_json
from pixtral_runtime.bundle.manifest import SamplingDefaults
from pixtral_runtime.errors import CheckpointError

GENERATION_CONFIG = "generation_config.json"


def read_sampling(folder: Path) -> SamplingDefaults | None:
    """The checkpoint's own sampling, None where it has none. Raises CheckpointError for a value that cannot be."""
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return None
    section = Section(path, read_json(path), {})
    if not section.boolean("do_sample", False):
        return None
    sampling = SamplingDefaults(_share(section, "temperature"), _share(section, "top_p"))
    if faults := sampling.faults():
        raise CheckpointError(f"{path}: {faults[0]}", DOWNLOAD_HINT)
    return sampling


def _share(section: Section, key: str) -> float:
    """A number, of which 0 is one as well."""
    return 0.0 if section.get(key) == 0 and not isinstance(section.get(key), bool) else section.number(key, 1.0)
