"""Names of what is elsewhere: `https://…`, `s3://…`, `hf://…`."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

SCHEMES = ("abfs", "az", "gcs", "gs", "hf", "http", "https", "memory", "s3")
ADDRESS = re.compile(rf"({'|'.join(SCHEMES)})://.", re.IGNORECASE)


def is_address(name: str) -> bool:
    """Whether a name is an address, and no path."""
    return ADDRESS.match(name) is not None


def without_query(name: str) -> str:
    """A web address without what may follow its path; any other name as it is."""
    return urlsplit(name).path if name.lower().startswith(("http://", "https://")) else name
