"""Bundles: what an export writes, and how a broken one is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.bundles import export_tiny
from helpers.tiny import edit_json, tiny_config, write_checkpoint
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.export import export
from pixtral_export.plan import ExportSettings, plan_export
from pixtral_runtime.bundle.integrity import verify_bundle
from pixtral_runtime.bundle.manifest import open_bundle
from pixtral_runtime.errors import BundleError, InputError, MachineError, PixtralError
from pixtral_runtime.json_data import SEAL, sealed

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mistral"), CONFIG)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(checkpoint, tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_exporting_again_gives_the_same_bytes(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    assert contents(export_tiny(checkpoint, tmp_path / "again")) == contents(exported)


@pytest.mark.parametrize(("style", "shards"), [("hf", 1), ("hf-new", 3), ("mistral", 2)])
def test_every_checkpoint_format_gives_the_same_bundle(exported: Path, tmp_path: Path, style: str, shards: int) -> None:
    other = write_checkpoint(tmp_path / "checkpoint", CONFIG, format=style, shards=shards)
    assert contents(export_tiny(other, tmp_path / "bundle")) == contents(exported)


def test_other_weights_give_another_fingerprint(exported: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "checkpoint", CONFIG, seed=1)
    assert open_bundle(export_tiny(other, tmp_path / "b")).fingerprint != open_bundle(exported).fingerprint


def test_the_manifest_lists_every_file(exported: Path) -> None:
    bundle = open_bundle(exported)
    assert set(bundle.files) == {path.name for path in exported.iterdir()} - {"bundle.json"}
    assert list(verify_bundle(bundle)) == list(bundle.files)
    assert bundle.model == CONFIG


def test_a_flipped_byte_is_found(bundle: Path) -> None:
    data = bytearray((bundle / "weights.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "weights.bin").write_bytes(data)
    with pytest.raises(InputError, match=r"weights\.bin.*sha256"):
        list(verify_bundle(open_bundle(bundle)))


@pytest.mark.parametrize("name", ["weights.bin", "decoder.onnx", "tekken.json"])
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        open_bundle(bundle)


def test_a_short_file_is_named(bundle: Path) -> None:
    (bundle / "vision.onnx").write_bytes(b"")
    with pytest.raises(InputError, match=r"vision\.onnx: 0 bytes, expected"):
        open_bundle(bundle)


@pytest.mark.parametrize(("change", "hint"), [({"schema": 99}, "upgrade"), ({"schema": 0}, "--force")])
def test_another_schema_is_refused_with_the_remedy(bundle: Path, change: dict[str, int], hint: str) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text()) | change
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="schema") as caught:
        open_bundle(bundle)
    assert hint in caught.value.hint


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1}', '{"schema": 1, "files": []}'])
def test_a_broken_manifest_is_refused(bundle: Path, text: str) -> None:
    (bundle / "bundle.json").write_text(text)
    with pytest.raises(InputError, match=r"bundle\.json"):
        open_bundle(bundle)


def test_a_manifest_from_before_there_were_adapters_names_none(bundle: Path) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    del manifest["lora"], manifest[SEAL]
    (bundle / "bundle.json").write_text(json.dumps(sealed(manifest)))
    assert open_bundle(bundle).lora is None


def test_pictures_beyond_the_encoders_positions_are_refused(bundle: Path) -> None:
    """Earlier exports took any side; 260 px are 17 patches of 16, one more than 256 // 16 positions."""
    edit_json(bundle / "bundle.json", lambda data: data["limits"].update(max_image_side=260))
    with pytest.raises(BundleError, match=r"pictures of 260 px .* end at 256 px"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("dtype", []),
        ("dtype", "int3"),
        ("precision", 5),
        ("kv_cache", "fp8"),
        ("kv_cache", "int8"),  # without scales for its codes
        ("limits.max_context", "long"),
        ("limits.max_context", 0),
        ("limits.max_context", 2**70),
        ("limits.max_image_side", 1),
        ("model.vision.patch_size", 0),
        ("model.decoder.n_kv_heads", 3),
        ("model.decoder.rope_theta", float("nan")),
        ("model.image_tokens.image", 12),
        ("model.eos", 10**6),
        ("files", {"vision.onnx": 5}),
        ("files.vision.onnx", None),
        ("engines", []),
        ("quantization", 5),
        ("lora", "receipts"),
        ("lora", {"name": "receipts"}),
        ("odd", 1),
    ],
)
def test_a_value_that_no_export_writes_is_refused(bundle: Path, place: str, value: object) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    inner = manifest
    *parents, last = place.split(".", 1) if place.startswith("files.") else place.split(".")
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"bundle\.json") as raised:
        open_bundle(bundle)
    assert raised.value.hint


@pytest.mark.parametrize("path", ["n" * 300, "d/" * 3000, "a\0b", "bundle/loop"])
def test_a_name_that_no_file_can_have_is_no_bundle(bundle: Path, path: str) -> None:
    (bundle / "loop").symlink_to("loop")
    with pytest.raises(BundleError, match="is no bundle"):
        open_bundle(bundle.parent / path)


def test_files_that_the_system_does_not_read_are_named(bundle: Path) -> None:
    """A disk with errors, as a process sees its own memory at address 0."""
    opened = open_bundle(bundle)
    for name in ("weights.bin", "bundle.json"):
        (bundle / name).unlink()
        (bundle / name).symlink_to("/proc/self/mem")
    with pytest.raises(BundleError, match="Input/output error"):
        open_bundle(bundle)
    with pytest.raises(BundleError, match=r"weights\.bin cannot be read: Input/output error"):
        list(verify_bundle(opened))


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no bundle\.json"):
        open_bundle(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        open_bundle(tmp_path / "nothing")


def test_an_existing_bundle_needs_force(checkpoint: Path, bundle: Path) -> None:
    with pytest.raises(InputError, match="exists"):
        export_tiny(checkpoint, bundle)
    (bundle / "weights.bin").write_bytes(b"old")
    export_tiny(checkpoint, bundle, force=True)
    assert list(verify_bundle(open_bundle(bundle)))


def test_a_folder_that_is_no_bundle_is_never_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"precious")
    with pytest.raises(InputError, match="no bundle"):
        export_tiny(checkpoint, tmp_path, force=True)
    assert (tmp_path / "photo.jpg").read_bytes() == b"precious"


def test_an_interrupted_export_leaves_nothing_and_keeps_the_old_bundle(checkpoint: Path, bundle: Path) -> None:
    before = contents(bundle)
    opened = open_checkpoint(checkpoint)

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "writing weights" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(opened, plan_export(opened, ExportSettings(max_context=1024)), bundle, force=True, progress=interrupt)
    assert contents(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_float16_overflow_names_the_tensor(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", CONFIG)
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "consolidated.safetensors")
    weights["layers.1.feed_forward.w2.weight"][3, 5] = 1e5
    save_file(weights, checkpoint / "consolidated.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.feed_forward\.w2\.weight.*float16"):
        export_tiny(checkpoint, tmp_path / "b", dtype="float16")
    export_tiny(checkpoint, tmp_path / "b", dtype="float32")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (ExportSettings(dtype="int3"), "int3"),
        (ExportSettings(opset=21), "opset"),
        (ExportSettings(max_image_side=8), "8"),
        (ExportSettings(max_image_side=100_000), "100,?000"),
        (ExportSettings(max_context=10_000_000), "10,?000,?000"),
    ],
)
def test_settings_out_of_range_are_refused(checkpoint: Path, settings: ExportSettings, words: str) -> None:
    with pytest.raises(InputError, match=words):
        plan_export(open_checkpoint(checkpoint), settings)


def test_the_plan_names_the_size_that_is_written(checkpoint: Path, exported: Path) -> None:
    plan = plan_export(open_checkpoint(checkpoint), ExportSettings(max_context=1024))
    assert plan.weight_bytes == (exported / "weights.bin").stat().st_size


def test_too_little_disk_is_said_before_any_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(MachineError, match="disk"):
        export_tiny(checkpoint, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_bfloat16_bundle_says_where_it_runs(checkpoint: Path, tmp_path: Path) -> None:
    from pixtral_runtime import load

    path = export_tiny(checkpoint, tmp_path / "b", dtype="bfloat16")
    with pytest.raises(PixtralError, match="bfloat16") as caught:
        load(path)
    assert "float16" in caught.value.hint
    bundle = open_bundle(path)  # it is whole: only this backend cannot run it
    assert bundle.dtype == "bfloat16" and "weights.bin" in list(verify_bundle(bundle))
