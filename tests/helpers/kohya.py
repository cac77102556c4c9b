"""What a trainer of LoRA adapters takes from a folder, by the rules of kohya's sd-scripts.

The scripts are no package that could be installed. The rules are those of their `library/train_util.py`, of the class
`DreamBoothDataset`, as they stood in 2025:

- Pictures end in .png, .jpg, .jpeg, .webp or .bmp, in small letters or capitals.
- A folder `10_sks dog` has its pictures repeated ten times; its name behind the number is the caption of those that
  have none of their own. A folder without a number is passed over.
- A picture's caption is the first line, without white space around it, of the UTF-8 file of the same name with
  `--caption_extension`, `.caption` by default. If there is none and the name has five parts or more between `_`, the
  last four are left off and it is looked for again. An empty file is an error.
"""

from __future__ import annotations

import os
from pathlib import Path

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def subsets(root: Path, caption_extension: str = ".caption") -> dict[str, tuple[int, dict[str, str]]]:
    """By folder below `root`: how often it is repeated, and its pictures with their captions, by name."""
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        repeats, _, concept = folder.name.partition("_")
        if repeats.isdecimal():
            captions = {path.name: read_caption(path, caption_extension) for path in pictures(folder)}
            found[folder.name] = int(repeats), {n: concept if text is None else text for n, text in captions.items()}
    return found


def pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (*PICTURES, *map(str.upper, PICTURES)))


def read_caption(picture: Path, extension: str = ".caption") -> str | None:
    """None where there is no file. Raises ValueError for an empty one, and for what is no UTF-8."""
    stem = os.path.splitext(picture)[0]
    parts = stem.split("_")
    for name in (stem, "_".join(parts[:-4]) if len(parts) >= 5 else stem):
        file = Path(name + extension)
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            if not text:
                raise ValueError(f"{file} is empty")
            return text.split("\n")[0].strip()
    return None
