"""`pixtral check --engine`: what TensorRT understood is compared, and a wrong understanding is found and named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from torch import Tensor
from typer.testing import CliRunner, Result

from helpers.bundles import exported, seal_again
from helpers.places import DEMO
from helpers.tiny import edit_weights, tiny_config, write_checkpoint
from pixtral_cli.main import app
from pixtral_engines import layer_semantics as layers
from pixtral_engines.check import NetworkCheck
from pixtral_export.plan import ExportSettings
from pixtral_runtime.backends.session import Array
from pixtral_runtime.backends.trt_package import import_tensorrt
from pixtral_runtime.bundle.manifest import Bundle, open_bundle
from pixtral_runtime.bundle.spec import GRAPHS
from pixtral_runtime.compare.parity import TensorCheck
from pixtral_runtime.inputs.preprocess import default_preprocess
from pixtral_runtime.inputs.prompt import PromptBuilder

RTX = import_tensorrt("rtx")
SETTINGS = {
    "float16": ExportSettings(),
    "int4": ExportSettings(precision="int4", group_size=32, method="rtn"),
    "int8": ExportSettings(precision="int8"),
    "fp8": ExportSettings(precision="fp8", method="rtn"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_config())


@pytest.fixture(scope="module")
def plain(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(checkpoint, tmp_path_factory.mktemp("plain") / "b", SETTINGS["float16"])


def checked(bundle: Bundle) -> tuple[NetworkCheck, list[TensorCheck]]:
    check = NetworkCheck(bundle, PromptBuilder(bundle, default_preprocess(bundle)), RTX)
    return check, list(check.run())


@pytest.mark.parametrize("name", list(SETTINGS))
def test_networks_of_every_recipe_agree_over_the_whole_sweep(name: str, checkpoint: Path, tmp_path: Path) -> None:
    check, seen = checked(exported(checkpoint, tmp_path / "b", SETTINGS[name]))
    assert all(agreement.passed for agreement in seen), max(seen, key=lambda a: a.error)
    assert {agreement.stage for agreement in seen} == set(GRAPHS)
    steps = {agreement.case for agreement in seen if agreement.stage == "decoder"}
    assert {case.partition(",")[0] for case in steps} == {"0 images", "1 images", "2 images", "4 images"}
    for graph in GRAPHS:
        layer, largest = check.activations[graph].worst
        assert layer and 0 < largest < 65504


def test_the_first_layer_that_is_understood_otherwise_is_named(plain: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if TensorRT had lost the mask."""
    kind, attention = layers.LAYERS["ATTENTION_INPUT"]

    def blind(layer: Any, inputs: Sequence[Array], output: Any) -> Array | tuple[Array, ...]:
        return attention(layer, [x if x.dtype != np.bool_ else np.ones_like(x) for x in inputs], output)

    monkeypatch.setitem(layers.LAYERS, "ATTENTION_INPUT", (kind, blind))
    _, seen = checked(plain)
    failed = [agreement for agreement in seen if not agreement.passed]
    model = onnx.load(plain.graph_path("decoder"), load_external_data=False)
    first = next(node.name for node in model.graph.node if node.op_type == "Attention")
    assert failed and {agreement.stage for agreement in failed} == {"decoder"}
    (layer,) = {agreement.layer for agreement in failed}
    assert re.fullmatch(rf"{re.escape(first)}(_\d+)?_AttentionOutput", layer)  # the importer may number it


def test_activations_beyond_float16_fail_and_are_named(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", tiny_config())

    def blow_up(weights: dict[str, Tensor]) -> None:
        weights["layers.0.ffn_norm.weight"][:] = 6e4
        weights["layers.0.feed_forward.w1.weight"][:] *= 100

    edit_weights(checkpoint / "consolidated.safetensors", blow_up)
    check, seen = checked(exported(checkpoint, tmp_path / "b", SETTINGS["float16"]))
    assert any(not agreement.passed for agreement in seen if agreement.stage == "decoder")
    layer, largest = check.activations["decoder"].worst
    assert layer.startswith("layers.0.") and largest == float("inf")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def copy(plain: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(plain.path, tmp_path / "b")
    return open_bundle(tmp_path / "b")


def test_a_graph_that_relies_on_cache_lengths_fails_the_check(copy: Bundle) -> None:
    """TensorRT's importer drops `nonpad_kv_seqlen` without an error: the trap that this check exists for."""
    path = copy.graph_path("decoder")
    model = onnx.load(path, load_external_data=False)
    model.graph.node.insert(0, helper.make_node("Add", ["write_index", "write_index"], ["lengths"], "lengths"))
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.input[:] = [*node.input[:3], "", "", "", "lengths"]
    onnx.save(model, path)
    seal_again(copy.path)
    done = invoke("check", copy.path, "--engine", "rtx:sm89")
    assert done.exit_code == 6
    assert "drops the input 'lengths' of node" in done.stderr


def test_the_command_compares_torch_too_and_verifies_engines(copy: Bundle, checkpoint: Path) -> None:
    assert invoke("build", copy.path, "--target", "rtx:sm89", "-q").exit_code == 0
    done = invoke("check", copy.path, "--against", checkpoint, "--engine", "rtx:sm89", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] == "PASSED" and found["network"]["engines"] == "verified"
    assert found["comparisons"] and found["network"]["comparisons"]
    table = invoke("check", copy.path, "--engine", "rtx:sm89")
    assert table.exit_code == 0 and "within tolerance (ONNX Runtime and tensorrt_rtx's networks)" in table.stdout
    (engine,) = (copy.path / "engines/rtx-sm89").glob("vision.*.engine")
    data = bytearray(engine.read_bytes())
    data[1000] ^= 1
    engine.write_bytes(data)
    spoiled = invoke("check", copy.path, "--engine", "rtx:sm89")
    assert spoiled.exit_code == 3 and f"{engine.name}: the file was changed" in spoiled.stderr
    assert "pixtral build" in spoiled.stderr


def test_without_anything_to_compare_with_it_says_what_to_type(copy: Bundle) -> None:
    done = invoke("check", copy.path)
    assert done.exit_code == 3 and "--engine rtx:sm89" in done.stderr
    assert invoke("check", copy.path, "--engine", "sm52").exit_code == 3
    two = invoke("check", copy.path, "--engine", "rtx:sm89,rtx:sm120")
    assert two.exit_code == 3 and "--engine rtx:sm89" in two.stderr


def test_engines_in_an_older_form_are_checked_in_that_form(copy: Bundle) -> None:
    assert invoke("build", copy.path, "--target", "rtx:sm89", "--compat", "trt10.3", "-q").exit_code == 0
    found = json.loads(invoke("check", copy.path, "--engine", "rtx:sm89", "--json").stdout)["network"]
    assert found["compat"] == "trt10.3"
    assert any("softmax" in layer for layer in found["largest_activations"]["decoder"])


def test_dtypes_that_onnx_runtime_lacks_are_refused(tmp_path: Path) -> None:
    bundle = exported(DEMO, tmp_path / "b", ExportSettings(dtype="bfloat16"))  # test_build.py has it exported
    done = invoke("check", bundle.path, "--engine", "rtx:sm89")
    assert done.exit_code == 4 and "no bfloat16 kernels" in done.stderr
