"""Names of what is elsewhere: `https://…`, `s3://…`, `hf://…`. Nothing is asked for unless somebody says so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from pixtral_runtime.errors import ImageError, Option, PixtralError
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.sources.item import BrokenPicture

SCHEMES = ("abfs", "az", "gcs", "gs", "hf", "http", "https", "memory", "s3")
ADDRESS = re.compile(rf"({'|'.join(SCHEMES)})://.", re.IGNORECASE)


def is_address(name: str) -> bool:
    """Whether a name is an address, and no path."""
    return ADDRESS.match(name) is not None


def without_query(name: str) -> str:
    """A web address without what may follow its path; any other name as it is."""
    return urlsplit(name).path if name.lower().startswith(("http://", "https://")) else name


@dataclass(frozen=True)
class Addresses:
    """What becomes of pictures that a list or a table names by addresses: they are fetched if that is allowed."""

    fetch: bool

    def picture(self, address: str) -> StoredPicture:
        if self.fetch:
            return RemotePicture(name=address)
        return BrokenPicture(
            name=address,
            problem="it is elsewhere, and nothing is fetched unasked",
            remedies=(Option("fetch", note="fetches pictures that are named by their addresses"),),
        )


@dataclass(frozen=True, kw_only=True)
class RemotePicture(StoredPicture):
    """A picture that is elsewhere: its name is its address. It is fetched when it is read."""

    def read(self) -> bytes:
        from pixtral_runtime.sources.remote import fetch_picture

        try:
            return fetch_picture(self.name)
        except ImageError:
            raise
        except PixtralError as error:
            raise ImageError(str(error), *error.remedies) from error
