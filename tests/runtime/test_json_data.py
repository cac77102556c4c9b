"""Dataclasses read back from JSON: what was written comes back, and nothing else does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

from pixtral_runtime.json_data import from_json


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...]
    share: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    others: Sequence[Inner] = ()
    by_name: Mapping[str, Inner] = field(default_factory=dict)
    note: str | None = None
    is_whole: bool = True
    rest: dict[str, Any] = field(default_factory=dict)


WHOLE = Outer("a", Inner((1, 2)), [Inner((), 1)], {"x": Inner((3,))}, "note", False, {"free": [1, None]})


def test_what_was_written_comes_back() -> None:
    assert from_json(Outer, json.loads(json.dumps(asdict(WHOLE)))) == WHOLE
    assert from_json(Outer, {"inner": {"sizes": []}}, name="given") == Outer("given", Inner(()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": 5}, "name is 5, expected str"),
        ({"name": None}, "name is null, expected str"),
        ({"note": 5}, "note is 5, expected str"),
        ({"is_whole": 1}, "is_whole is 1, expected bool"),
        ({"inner": []}, "inner is [], expected an object"),
        ({"inner": {"sizes": [1, "2"]}}, 'inner.sizes.1 is "2", expected int'),
        ({"inner": {"sizes": [True]}}, "inner.sizes.0 is true, expected int"),
        ({"inner": {"sizes": 5}}, "inner.sizes is 5, expected a list"),
        ({"inner": {"sizes": [1.0]}}, "inner.sizes.0 is 1.0, expected int"),
        ({"inner": {"sizes": [], "share": "x"}}, 'inner.share is "x", expected float'),
        ({"inner": {"sizes": [], "share": float("nan")}}, "inner.share is NaN, expected a finite number"),
        ({"inner": {"sizes": [], "share": 10**400}}, "inner.share is 1000"),
        ({"others": {}}, "others is {}, expected a list"),
        ({"others": [None]}, "others.0 is null, expected an object"),
        ({"by_name": {"x": 5}}, "by_name.x is 5, expected an object"),
        ({"by_name": []}, "by_name is [], expected an object"),
        ({"nmae": "a"}, "unknown field 'nmae'"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_place(change: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError) as raised:
        from_json(Outer, json.loads(json.dumps(asdict(WHOLE))) | change)
    assert words in str(raised.value)


@pytest.mark.parametrize("data", [None, [], "text", 5])
def test_what_is_no_object_is_no_dataclass(data: object) -> None:
    with pytest.raises(TypeError, match="expected an object"):
        from_json(Outer, data)


def test_a_field_that_is_missing_is_named() -> None:
    with pytest.raises(TypeError, match="inner has no field 'sizes'"):
        from_json(Outer, {"name": "a", "inner": {}})
