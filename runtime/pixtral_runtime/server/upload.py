"""A form with one file, read piece by piece: the file goes to the disk as it comes."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from pixtral_runtime.server.http import body_pieces
from pixtral_runtime.server.problems import Problem

FORM_BYTES = 1 << 16  # of all that is not the file
MOST_PARTS = 16
MOST_NAME = 255  # characters


class Form:
    """What a form says, beside the file that is written to `path`. Raises Problem and OSError."""

    def __init__(self, content_type: str, path: Path, most_bytes: int) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise Problem(415, f"expected a body of multipart/form-data, found {content_type or 'no content-type'}")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._most_bytes, self._size, self._is_whole = most_bytes, 0, False
        self._parts = 0
        self._file = path.open("xb")
        self._name, self._is_file = "", False
        self._header, self._value, self._text = bytearray(), bytearray(), bytearray()
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._finish,
            },
        )

    def write(self, piece: bytes) -> None:
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise Problem(400, f"the form cannot be read: {error}") from error

    def close(self) -> None:
        """Bring the file to the disk."""
        if not self._is_whole:
            raise Problem(400, "the form has no end")
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def drop(self) -> None:
        self._file.close()
        Path(self._file.name).unlink(missing_ok=True)

    def _begin(self) -> None:
        self._name, self._is_file = "", False
        self._text.clear()
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise Problem(400, f"the form has more than {MOST_PARTS} parts")

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
            self._is_file = self._name == "file"
            if self._is_file:
                if self.filename is not None:
                    raise Problem(400, "file: there are two", field="file")
                self.filename = options.get(b"filename", b"").decode("utf-8", "replace")[:MOST_NAME] or "upload"
        self._header.clear()
        self._value.clear()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._size += end - start
            if self._size > self._most_bytes:
                raise Problem(413, f"the file is longer than the {self._most_bytes:,} bytes that this server keeps")
            self._file.write(data[start:end])
        else:
            self._text += data[start:end]
            if len(self._text) > FORM_BYTES:
                raise Problem(413, f"{self._name}: longer than {FORM_BYTES:,} bytes", field=self._name)

    def _end(self) -> None:
        if not self._is_file:
            self.fields[self._name] = self._text.decode("utf-8", "replace")

    def _finish(self) -> None:
        self._is_whole = True


async def read_form(request: Request, path: Path, most_bytes: int) -> Form:
    """Read a form whose file may have so many bytes, and lies at `path` then. Raises Problem and OSError."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise Problem(403, "a page of another site may upload nothing here")  # browsers send forms without being asked
    form = Form(request.headers.get("content-type", ""), path, most_bytes)
    try:
        async for piece in body_pieces(request, most_bytes + FORM_BYTES):
            await run_in_threadpool(form.write, piece)
        await run_in_threadpool(form.close)
    except BaseException:
        form.drop()
        raise
    return form
