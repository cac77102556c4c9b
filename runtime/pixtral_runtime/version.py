"""Versions: pixtral's own, which the build reads from here, and those of installed packages."""

from __future__ import annotations

__version__ = "0.1.0"


def distribution_version(name: str) -> str | None:
    """The version of an installed package by the name that pip knows; None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # takes 30 ms, which `pixtral -h` would wait for

    try:
        return version(name)
    except PackageNotFoundError:
        return None
