"""The pictures of a request: data: URLs, files below one folder, and what http and https lead to if that is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image

from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.data_url import StorePicture, data_of, is_data_url
from pixtral_runtime.inputs.decode_memory import DecodeMemory
from pixtral_runtime.inputs.image import decode_image
from pixtral_runtime.inputs.image_files import SmallFile, read_image_file
from pixtral_runtime.inputs.openai_chat import FieldError
from pixtral_runtime.inputs.openai_messages import shown
from pixtral_runtime.inputs.preprocess import LOW_DETAIL_TOKENS, see_within

REMOTE = re.compile(r"https?://", re.IGNORECASE)
EXAMPLE = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}'


@dataclass(frozen=True)
class Media:
    """Which pictures a request may name. `folder` is where local files may lie, None for nowhere."""

    folder: Path | None = None
    is_remote_allowed: bool = False
    apply_exif: bool = True
    memory: DecodeMemory = field(default_factory=lambda: DecodeMemory(1))

    def open(self, url: object, detail: str, fetched: Mapping[str, bytes]) -> Image.Image:
        """The picture behind a URL; `fetched` holds what remote ones led to. Raises FieldError, ImageError."""
        if not isinstance(url, str) or not url:
            raise FieldError("image_url", f"expected a URL, found {shown(url)}", EXAMPLE)
        name = shown(url).strip('"')
        data = fetched[url] if url in fetched else self._read(url, name)
        with self.memory.room_for([data]):
            picture = decode_image(data, name, apply_exif=self.apply_exif).pixels
        return see_within(picture, LOW_DETAIL_TOKENS) if detail == "low" else picture

    def later(self, url: object, detail: str, store: StorePicture) -> StoredPicture:
        """The picture behind a URL, not read yet; `store` keeps data: URLs. Raises FieldError."""
        if not isinstance(url, str) or not url:
            raise FieldError("image_url", f"expected a URL, found {shown(url)}", EXAMPLE)
        is_small = detail == "low"
        if is_data_url(url):
            return store(url, is_small)
        if not url.lower().startswith("file:"):
            raise FieldError("image_url", "a batch fetches no pictures from elsewhere", EXAMPLE)
        return SmallFile(name=shown(url).strip('"'), file=self._local(url), is_small=is_small)

    def _read(self, url: str, name: str) -> bytes:
        if is_data_url(url):
            return data_of(url, name)
        if REMOTE.match(url):
            raise FieldError("image_url", "this server fetches no pictures from elsewhere", EXAMPLE)
        if url.lower().startswith("file:"):
            return read_image_file(self._local(url))
        raise FieldError("image_url", f"{name} is no URL that this server reads", EXAMPLE)

    def _local(self, url: str) -> Path:
        """The file of a file:// URL, below the allowed folder, links followed. What lies elsewhere is not told."""
        path = re.fullmatch(r"file://(?:localhost)?(/.+)", url, re.IGNORECASE)
        if self.folder is None or path is None:
            raise _no_such_file()
        try:
            folder = self.folder.resolve(strict=True)
            found = Path(unquote_to_bytes(path[1]).decode("utf-8", "surrogateescape")).resolve(strict=True)
        except (OSError, ValueError, RuntimeError) as error:  # not there, a zero byte, a circle of links
            raise _no_such_file() from error
        if not found.is_relative_to(folder):
            raise _no_such_file()
        return found


def _no_such_file() -> FieldError:
    return FieldError("image_url", "this server reads no such file", "name one below the folder that it allows")


def remote_urls(body: Any) -> Iterator[str]:
    """The http and https URLs of the pictures in a body of the chat API, whatever else may be wrong with it."""
    messages = body.get("messages") if isinstance(body, dict) else None
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            value = part.get("image_url") if isinstance(part, dict) else None
            url = value.get("url") if isinstance(value, dict) else value
            if isinstance(url, str) and REMOTE.match(url):
                yield url
