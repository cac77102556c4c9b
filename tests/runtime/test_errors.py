"""Errors: their kinds, what they carry, and how a Python caller reads it."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest

from pixtral_runtime import errors
from pixtral_runtime.errors import (
    CheckFailed,
    InputError,
    MachineError,
    MissingPackageError,
    Option,
    PixtralError,
    SettingError,
    extra_missing,
    unwritable,
)

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PixtralError)]

OWN_CODES = {PixtralError: 1, CheckFailed: 6}


def test_options_read_as_python_and_are_there_as_data() -> None:
    error = SettingError("top-p 2 is outside 0..1", Option("top_p", 0.8), "a smaller number")
    assert (str(error), error.hint) == ("top-p 2 is outside 0..1", "top_p=0.8; a smaller number")
    assert error.options == (Option("top_p", 0.8),)
    assert InputError("no images").hint == "" and InputError("no images", "name some").options == ()


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (Option("force"), "force=True"),
        (Option("backend", ("auto", "ort-cpu")), "backend=auto|ort-cpu"),
        (Option("image_tokens", 64, "for smaller images"), "image_tokens=64 for smaller images"),
    ],
)
def test_an_option_in_python(option: Option, text: str) -> None:
    assert str(option) == text


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_has_an_exit_code_and_crosses_processes(kind: type[PixtralError]) -> None:
    expected = 3 if issubclass(kind, InputError) else 4 if issubclass(kind, MachineError) else OWN_CODES[kind]
    assert kind.exit_code == expected
    error = kind("it is broken", Option("top_p", 0.8), "mend it")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.remedies) == (kind, str(error), error.remedies)


def test_what_the_system_refuses_to_write() -> None:
    option = Option("output", "another.jsonl")
    refused = unwritable(Path("results.jsonl"), PermissionError(errno.EACCES, "Permission denied"), option)
    assert isinstance(refused, InputError) and refused.options == (option,)
    full = unwritable(Path("results.jsonl"), OSError(errno.ENOSPC, "No space left"), option)
    assert isinstance(full, MachineError) and "full" in str(full)


def test_a_missing_extra_can_be_caught_by_its_kind() -> None:
    error = extra_missing("ray", "ray", "Running on a cluster")
    assert isinstance(error, MissingPackageError) and error.hint == "pip install 'pixtral[ray]'"
