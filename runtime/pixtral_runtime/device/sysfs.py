"""Small files of /proc and /sys: a value, or None where it is not readable; and what they call this machine."""

from __future__ import annotations

import re
from pathlib import Path

SYSTEM = Path("/")
"""Where /proc and /sys are; another place in tests."""


def read_text(path: Path) -> str | None:
    """The file without blanks and zero bytes around it; None where it is absent, forbidden, asleep or empty."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace").strip("\0\n\t ")
    except OSError:
        return None
    return text or None


def read_int(path: Path) -> int | None:
    """The whole number in a file."""
    text = read_text(path)
    return int(text) if text is not None and re.fullmatch(r"[+-]?\d+", text) else None


def in_order(folder: Path, pattern: str) -> list[Path]:
    """What matches, by the numbers in its name: policy2 before policy10."""
    return sorted(folder.glob(pattern), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def scaled(value: int | None, unit: int) -> int | None:
    """A value in its base unit, as kilohertz in hertz."""
    return None if value is None else value * unit


def read_fields(path: Path) -> dict[str, str]:
    """The first `name: value` of each name in a file of /proc; nothing on another system."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in reversed(lines))
    return {name.strip(): value.strip() for name, _, value in pairs}


def jetson_model(root: Path = SYSTEM) -> str | None:
    """The name of the Jetson board; None on other machines."""
    model = read_text(root / "proc/device-tree/model")
    return model if model and "jetson" in model.lower() else None


def int8_sums_saturate(root: Path = SYSTEM) -> bool:
    """Whether the processor's fastest sums of int8 products overflow: x86 with AVX2 and without VNNI."""
    flags = read_fields(root / "proc/cpuinfo").get("flags", "").split()
    return "avx2" in flags and not any(flag.endswith("vnni") for flag in flags)


def cpu_name(root: Path = SYSTEM) -> str | None:
    """The processor's name; None where the kernel does not say, as on most ARM machines."""
    return read_fields(root / "proc/cpuinfo").get("model name")
