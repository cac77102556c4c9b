"""What pictures in archives and tables are called. Names from within them are labels: no file is opened by one."""

from __future__ import annotations

import os
import posixpath

from pixtral_runtime.inputs.image_files import IMAGE_SUFFIXES

MOST_TEXT_BYTES = 1 << 20  # of a caption: a longer one fits no context


class UniqueIds:
    """Ids of a job, each once: the second `a.jpg` is `a.jpg (2)`."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def __call__(self, wanted: str) -> str:
        id = wanted
        while id in self._counts:
            self._counts[wanted] += 1
            id = f"{wanted} ({self._counts[wanted]})"
        self._counts[id] = 1
        return id


def is_picture(member: str) -> bool:
    """Whether a name in an archive is that of a picture, and no resource fork of macOS."""
    *folders, name = member.split("/")
    is_fork = name.startswith("._") or "__MACOSX" in folders
    return not is_fork and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_text(member: str) -> bool:
    """Whether a name in an archive is that of a caption."""
    return posixpath.basename(member).lower().endswith(".txt") and not posixpath.basename(member).startswith("._")


def without_suffix(member: str) -> str:
    return posixpath.splitext(member)[0]


def name_and_directory(member: str, within: str) -> tuple[str, str]:
    """A picture's name without its suffix, and its folder's: that of the archive or table where it has none."""
    folder, _, name = member.rpartition("/")
    return posixpath.splitext(name)[0], posixpath.basename(folder) or stem_of(within)


def stem_of(name: str) -> str:
    """`000` of `shards/000.tar.gz`."""
    base = posixpath.basename(name.rstrip("/"))
    return base.partition(".")[0] if ".tar." in base.lower() else posixpath.splitext(base)[0]


def caption(data: bytes) -> str:
    """A caption's text; what is no UTF-8 in it becomes U+FFFD."""
    return data[:MOST_TEXT_BYTES].decode("utf-8-sig", "replace").strip()
