"""Prompts that say something of what they ask about: its name, its folder, tags or text that it has already.

`{name}`, `{directory}`, `{tags}` and `{text}` are filled in, and `[image]` says where in the text the picture stands,
or all pages of a document. Nothing else is touched, so that a prompt may show JSON; what is filled in is not looked at
again.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pixtral_runtime.errors import SettingError
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.text_file import read_text
from pixtral_runtime.sources.item import Item

IMAGE = "[image]"
PLACEHOLDERS = ("name", "directory", "tags", "text")
KNOWN = re.compile(r"\{(" + "|".join(PLACEHOLDERS) + r")\}")
LIKE_ONE = re.compile(r"\{[A-Za-z_]{2,}\}")


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt as it was typed. Raises SettingError where it shows the picture twice."""

    text: str

    def __post_init__(self) -> None:
        if self.text.count(IMAGE) > 1:
            raise SettingError(f"{IMAGE} stands {self.text.count(IMAGE)} times in the prompt", "leave it there once")

    @property
    def has_tags(self) -> bool:
        return "{tags}" in self.text

    @property
    def has_text(self) -> bool:
        return "{text}" in self.text

    @property
    def unknown(self) -> list[str]:
        """What looks like a placeholder and is none, each once."""
        return [found for found in dict.fromkeys(LIKE_ONE.findall(self.text)) if not KNOWN.fullmatch(found)]

    def content(self, item: Item) -> tuple[str | Path | StoredPicture, ...]:
        """The message's parts: the item's first, or where `[image]` stands, of which the blanks around it are part."""
        values = {"name": item.name, "directory": item.directory, "tags": item.tags or "", "text": item.text}
        before, image, after = self.text.partition(IMAGE)
        texts = ("", before) if not image else (before.rstrip(), after.lstrip())
        first, second = (KNOWN.sub(lambda match: values[match[1]], text) for text in texts)
        return tuple(part for part in (first, *item.parts, second) if part)


def read_tags(picture: Path, sidecar: Path | None) -> str:
    """What a picture's sidecar holds, or else the `.txt` beside it; nothing where there is none. Raises InputError."""
    beside = Path(os.path.splitext(picture)[0] + ".txt")
    for place in (sidecar, beside):
        if place is not None and place.exists():
            return read_text(place, "check the file, or ask without {tags}").strip()
    return ""
