"""A certificate is replayed without an alarm, and a fault that is planted stops it at the stage where it lies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest

from check_verify import find, replayed
from helpers.bundles import exported
from helpers.host_device import HostDevice
from helpers.places import DEMO
from helpers.trt_engines import engines
from helpers.trt_standin import StandIn
from pixtral_export.certify import certify_export
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.plan import ExportSettings
from pixtral_runtime.bundle.certificate import KnownAnswer, read_certificate, settings_of
from pixtral_runtime.bundle.manifest import CERTIFICATE, Bundle, open_bundle
from pixtral_runtime.compare import certify as module
from pixtral_runtime.compare.certify import certify
from pixtral_runtime.compare.replay import Replay
from pixtral_runtime.compare.verify import TOLERANCES, _answers, _tensors, tolerance_of, verify
from pixtral_runtime.errors import BundleError, MachineError
from verify_faults import change_certificate, faults

RECIPES = {"float16": ExportSettings(), "int4": ExportSettings(precision="int4", method="rtn")}
PLANTED = {
    "float16": (
        "a bit of weights.bin", "a bit of certificate.json", "no certificate", "another bundle's certificate",
        "another certificate, bound to this bundle", "a known answer that is wrong", "a stale engine",
        "another plan in an engine's place", "other preprocessing", "other preprocessing, unsaid", "another vocabulary",
        "vision_language_adapter.w_out.weight transposed", "vision's rotary base",
        "tok_embeddings.weight rolled by a row", "words as columns", "features by the numbers of words",
        "no mask in one layer", "another rotary base", "last layers exchanged",
        "layers.1.feed_forward.w2.weight times 1.25",
    ),
    "int4": ("scales of twice the group", "halves of bytes exchanged", "layers exchanged"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder, found = tmp_path_factory.mktemp("certified"), {}
    for name, settings in RECIPES.items():
        found[name] = exported(DEMO, folder / name, settings)
        certify(found[name])
    return found


@pytest.fixture
def copy(bundles: dict[str, Bundle], tmp_path: Path) -> Bundle:
    """A float16 bundle that a test may spoil."""
    return open_bundle(copytree(bundles["float16"].path, tmp_path / "bundle"))


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (3, 4)])
def test_nothing_differs_at_any_number_of_threads_and_slots(
    name: str, threads: int, batch: int, bundles: dict[str, Bundle]
) -> None:
    bundle = bundles[name]
    checks = list(verify(bundle, read_certificate(bundle), "ort-cpu", threads=threads, batch=batch))
    assert all(check.passed for check in checks), checks[-1]
    stages = [check.stage for check in checks]
    assert stages == [
        "files", "engines", "tokenizer", "preprocess", "graphs, ort-cpu", "vision", "embed", "decoder", "logits",
        "answers", "headroom",
    ]  # fmt: skip
    assert sum(check.compared for check in checks) > 100


@pytest.mark.parametrize(("name", "planted"), [(name, one) for name, planted in PLANTED.items() for one in planted])
def test_a_fault_is_found_where_it_lies(name: str, planted: str, bundles: dict[str, Bundle]) -> None:
    other = next(bundle for recipe, bundle in bundles.items() if recipe != name)
    fault = next(one for one in faults(bundles[name], other.path) if one.name == planted)
    found = find(bundles[name].path, fault)
    assert found.caught, (found.stage, found.said)


def test_the_layer_where_it_begins_is_named(bundles: dict[str, Bundle]) -> None:
    fault = next(one for one in faults(bundles["float16"], bundles["int4"].path) if one.name == "last layers exchanged")
    assert "keys of layer 1 " in find(bundles["float16"].path, fault).said


def test_engines_get_what_they_take(bundles: dict[str, Bundle]) -> None:
    """A stand-in for TensorRT: small pictures two at a time, large ones alone, prompts in chunks of 16 tokens."""
    model, bundle = engines(StandIn(HostDevice()), bundles["float16"]), bundles["float16"]
    known, replay = read_certificate(bundle), Replay(model.prompts)
    seen = [_tensors(replay.features(model, 2), known, 8e-3, ()), _tensors(replay.embedded(model), known, 8e-3, ())]
    assert all(check.passed and check.worst > 0 for check in seen), seen


def test_a_certificate_is_the_same_at_any_number_of_threads(copy: Bundle) -> None:
    before = (copy.path / CERTIFICATE).read_bytes()
    certify(copy, threads=1)
    assert (copy.path / CERTIFICATE).read_bytes() == before


def test_settings_decide_and_engines_and_places_do_not(copy: Bundle) -> None:
    seen = settings_of(copy)
    assert seen == settings_of(replace(copy, path=Path("elsewhere"), engines={"rtx:sm89": {}}, tools={}))
    assert seen != settings_of(replace(copy, preprocess="hf"))
    assert seen != settings_of(replace(copy, limits=replace(copy.limits, max_context=100)))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"schema": 2}', b'{"schema": 1}', b"\xff", b"[" * 100_000], ids=repr
)
def test_what_is_no_certificate_is_refused(content: bytes, copy: Bundle) -> None:
    (copy.path / CERTIFICATE).write_bytes(content)
    with pytest.raises(BundleError, match="cannot be right"):
        read_certificate(copy)


def test_tokens_that_there_are_none_of_are_refused(copy: Bundle) -> None:
    change_certificate(copy.path, lambda data: data["answers"]["disc"]["top_ids"][0].__setitem__(0, 10**6))
    with pytest.raises(BundleError, match="do not go together"):
        read_certificate(copy)


def test_a_bundle_that_this_machine_cannot_run_gets_a_certificate_that_says_so(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_memory_bytes", lambda: 1000)
    certificate = certify(copy)
    assert "GB of memory" in certificate.omitted and not certificate.answers
    monkeypatch.undo()
    checks = list(verify(copy, read_certificate(copy), "ort-cpu"))
    assert checks[-1].stage == "preprocess" and checks[-1].passed  # nothing is said of what was not computed
    with pytest.raises(MachineError, match="bfloat16"):
        list(verify(replace(copy, dtype="bfloat16"), certify(copy), "ort-cpu"))


def test_export_compares_with_torch_and_keeps_how_large_activations_grow(copy: Bundle) -> None:
    warned: list[str] = []
    certify_export(copy, open_checkpoint(DEMO), warned.append)
    certificate = read_certificate(copy)
    assert warned == []
    assert set(certificate.agreement["torch"]) == {"vision", "embed", "prefill", "decode"}
    assert all(0 < error <= 0.02 for error in certificate.agreement["torch"].values())
    assert set(certificate.headroom) == {"vision", "embed", "decoder"}
    assert all(0 < one.largest < 65504 for one in certificate.headroom.values())
    assert replayed(copy.path).passed


def test_activations_beyond_float16_are_said(copy: Bundle) -> None:
    large = {"decoder": {"layer": "layers.1.feed_forward.w2", "largest": 1e5}}
    change_certificate(copy.path, lambda data: data.update(headroom=large))
    seen = replayed(copy.path)
    assert (seen.stage, seen.passed) == ("headroom", False)
    assert "layers.1.feed_forward.w2 reaches 100000" in seen.fault


def known(*logits: Sequence[float]) -> KnownAnswer:
    return KnownAnswer("", (7, 8), ((7, 8), (8, 9)), tuple(map(tuple, logits)))


@pytest.mark.parametrize(
    ("tokens", "passed"),
    [
        ((7, 8), True),
        ((7, 9), True),  # nearly a tie
        ((8, 8), False),
        ((5, 8), False),  # not even among the likeliest
        ((7,), False),
    ],
)
def test_only_what_is_no_tie_is_another_answer(tokens: tuple[int, ...], passed: bool, copy: Bundle) -> None:
    certificate = replace(read_certificate(copy), answers={"one": known((3.0, 1.0), (2.0, 1.99))})
    assert _answers({"one": tokens}, certificate, 0.05, ()).passed == passed


def test_rounded_numbers_are_allowed_more(bundles: dict[str, Bundle]) -> None:
    assert tolerance_of(bundles["float16"]) == TOLERANCES["float16"]
    assert tolerance_of(bundles["int4"]) == TOLERANCES["rounded"]
    assert tolerance_of(replace(bundles["float16"], kv_cache="int8")) == TOLERANCES["rounded"]


def test_a_certificate_holds_no_place_and_no_time(bundles: dict[str, Bundle]) -> None:
    text = (bundles["float16"].path / CERTIFICATE).read_text(encoding="utf-8")
    assert str(bundles["float16"].path) not in text
    assert len(text) < 40_000
    assert json.loads(text)["fingerprint"] == bundles["float16"].fingerprint
