"""Servers that somebody names: what an address is, which key goes where, and how a server's words are quoted.

A key comes from the environment alone, goes over https or to this machine, and is written nowhere. `OPENAI_API_KEY` is
meant for OpenAI, and goes nowhere else. Evaluations ask a judge there, benchmarks measure what answers there.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from pixtral_runtime.errors import InputError, Option, SettingError

OPENAI_SERVER = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
SHOWN_CHARACTERS = 200  # of what a server says


@dataclass(frozen=True)
class Address:
    """Where a server is. `is_safe`: nobody can read what goes there, since it is this machine or by https."""

    host: str
    port: int
    path: str
    is_https: bool

    @property
    def is_safe(self) -> bool:
        return self.is_https or _is_this_machine(self.host)


def address_of(url: str, option: Option) -> Address:
    """The parts of an http address. Raises SettingError, with the `option` that takes one and an example."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if not host or parts.scheme not in ("http", "https"):
        raise SettingError(f"{url} is no address of a server", option)
    is_https = parts.scheme == "https"
    return Address(host, port or (443 if is_https else 80), parts.path.rstrip("/"), is_https)


def key_for(host: str, variable: str) -> tuple[str, str]:
    """The variable whose key is for this host, and what it holds; empty where none is set, as for one's own server."""
    key = os.environ.get(variable, "").strip()
    if not key and host == urlsplit(OPENAI_SERVER).hostname:
        return OPENAI_KEY, os.environ.get(OPENAI_KEY, "").strip()
    return variable, key


def sendable_key(address: Address, variable: str, option: Option) -> str:
    """The key for a server, empty for none. Raises InputError where it cannot be sent there."""
    name, key = key_for(address.host, variable)
    if not re.fullmatch("[!-~]*", key):  # it would stand in the error about a header that cannot be
        raise InputError(f"{name} holds characters that no key has", f"export {name}=…")
    if key and not address.is_safe:
        elsewhere = replace(option, value=f"https://{address.host}/v1")
        raise InputError(
            f"{name} would go to {address.host} for everybody on the way to read", elsewhere, f"unset {name}"
        )
    return key


def quoted(said: object, key: str) -> str:
    """What a server said, in one line, cut off, without the key."""
    text = str(said).replace(key, "…") if key else str(said)
    return " ".join(text.split())[:SHOWN_CHARACTERS]


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
