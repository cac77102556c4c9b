"""Dataclasses read back from the JSON that they were written as, exactly: files are damaged, or written by hand.

A wrong type would otherwise be found far from the file, as an error of something else, or never. What was written here
carries a seal, a hash of its content: a letter that a failing disk changed would be an answer like any other.
"""

from __future__ import annotations

import hashlib
import json
import numbers
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
SEAL = "seal"
SHOWN_CHARACTERS = 60  # of a value
LARGEST_FLOAT = sys.float_info.max
PLAIN: dict[Any, Any] = {bool: bool, str: str, int: numbers.Integral, float: numbers.Real}


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """An object to be written, with its seal."""
    return {**data, SEAL: _seal(data)}


def unsealed(data: Any) -> Any:
    """What was read, without its seal, which files of the first versions lack. Raises ValueError where it is broken."""
    if not isinstance(data, dict) or SEAL not in data:
        return data
    content = {name: value for name, value in data.items() if name != SEAL}
    if data[SEAL] != _seal(content):
        raise ValueError("it was changed since it was written")
    return content


def _seal(data: Mapping[str, Any]) -> str:
    """16 hex digits for what an object says, however it is spelled."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def from_json(kind: type[T], data: object, name: str = "", /, **given: object) -> T:
    """A dataclass from an object of JSON. `given` are fields that do not come from there.

    `name` says in errors which object it is. Raises TypeError where a field is missing, unknown or of another type.
    """
    hints, needed = _fields(cast("Any", kind))
    if not isinstance(data, dict):
        raise TypeError(f"{name or 'it'} is {_shown(data)}, expected an object")
    if unknown := set(data) - (set(hints) - set(given)):
        raise TypeError(f"{name or 'it'} has an unknown field {min(unknown)!r}")
    if missing := needed - set(data) - set(given):
        raise TypeError(f"{name or 'it'} has no field {min(missing)!r}")
    read = {key: typed(hints[key], value, f"{name}.{key}" if name else key) for key, value in data.items()}
    return kind(**read, **given)


def typed(hint: Any, value: Any, name: str) -> Any:
    """The value as a field of this type holds it, objects as dataclasses. Raises TypeError where it is of another.

    Numbers are finite: JSON has no others.
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        hint = next(one for one in inner if one is not NoneType)
        return typed(hint, value, name)
    if hint is Any:
        return value
    if is_dataclass(kind):
        return from_json(hint, value, name)
    if kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or (kind is not bool and isinstance(value, bool)):
            raise TypeError(f"{name} is {_shown(value)}, expected {kind.__name__}")
        if kind is float and not abs(value) <= LARGEST_FLOAT:
            raise TypeError(f"{name} is {_shown(value)}, expected a finite number")
        return value
    if kind in (dict, Mapping):
        if not isinstance(value, dict):
            raise TypeError(f"{name} is {_shown(value)}, expected an object")
        return {key: typed(inner[1], one, f"{name}.{key}") for key, one in value.items()}
    if kind in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name} is {_shown(value)}, expected a list")
        read = [typed(inner[0], one, f"{name}.{place}") for place, one in enumerate(value)]
        return tuple(read) if kind is tuple else read
    raise NotImplementedError(f"fields of the type {hint}")


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], set[str]]:
    """Types of a dataclass's fields, and those without a default."""
    hints = get_type_hints(kind)
    own = fields(kind)
    needed = {one.name for one in own if one.default is MISSING and one.default_factory is MISSING}
    return {one.name: hints[one.name] for one in own}, needed


def _shown(value: object) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"
