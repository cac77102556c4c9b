"""A head that is the embeddings is stored once, as these, and turned around by the graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from helpers.bundles import exported
from helpers.family import MEMBERS
from helpers.tiny import write_checkpoint
from pixtral_engines.lowered_graph import lower
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.plan import ExportSettings, plan_export, plan_footprint
from pixtral_runtime.backends.onnx_nodes import untie
from pixtral_runtime.backends.ort_cuda_lowering import Weight, _placeholder, lowered
from pixtral_runtime.backends.ort_session import open_graph
from pixtral_runtime.bundle.manifest import WEIGHTS, Bundle
from pixtral_runtime.bundle.onnx_weights import weight_bytes

CONFIG = MEMBERS["Ministral-3-3B"]
SETTINGS = {
    "float16": ExportSettings(),
    "int4": ExportSettings(precision="int4", method="rtn"),
}
TABLE, HEAD = "tok_embeddings.weight", "output.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tied"), CONFIG)


@pytest.fixture(scope="module", params=list(SETTINGS))
def bundle(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(checkpoint, tmp_path_factory.mktemp("bundle") / "b", SETTINGS[request.param])


def test_the_file_holds_one_table_and_both_graphs_read_it(bundle: Bundle, checkpoint: Path) -> None:
    settings = replace(SETTINGS[bundle.precision], max_context=bundle.limits.max_context)
    plan = plan_export(open_checkpoint(checkpoint), settings)
    assert HEAD not in {item.name for item in plan.weights}
    assert bundle.files[WEIGHTS].bytes == plan.weight_bytes
    for graph in ("embed", "decoder"):
        names = weight_bytes(bundle.graph_path(graph))
        assert TABLE in names and HEAD not in names


def test_a_head_that_is_kept_otherwise_has_its_own_weights(checkpoint: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS["int4"], keep=("output=int4-32",))
    names = weight_bytes(exported(checkpoint, tmp_path / "b", settings).graph_path("decoder"))
    assert HEAD in names and TABLE not in names


def test_lowered_graphs_have_the_head_as_a_constant(bundle: Bundle) -> None:
    path = bundle.graph_path("decoder")
    table = onnx.load(bundle.graph_path("embed")).graph.initializer
    (codes,) = (onnx.numpy_helper.to_array(one) for one in table if one.name == TABLE)
    graph, weights, _ = lowered(path, by_length=False, block=32)
    for_cuda = onnx.load_from_string(graph).graph
    for_tensorrt = lower(path, 64, compat=True)
    for model in (for_cuda, for_tensorrt.model.graph):
        constants = {one.name for one in model.initializer}
        turned = [n for n in model.node if n.op_type == "Transpose" and n.input[0] in constants]
        assert not turned and TABLE not in constants
    found = [
        weight.data for name, weight in weights.items() if name.startswith(HEAD) and weight.data.dtype == codes.dtype
    ]
    np.testing.assert_array_equal(found[0], codes.T)
    np.testing.assert_array_equal(for_tensorrt.made[HEAD], codes.T)


def test_logits_are_those_of_the_portable_graph(bundle: Bundle) -> None:
    """With the head handed over as the CUDA provider gets it."""
    path, decoder = bundle.graph_path("decoder"), bundle.model.decoder
    model = onnx.load(path, load_external_data=False)
    weights = {name: Weight(*values) for name, values in untie(model, bundle.path).items()}
    model.graph.initializer.extend(_placeholder(name, weight) for name, weight in weights.items())
    ours = open_graph(model.SerializeToString(), weights=bundle.path, more_weights=weights)
    rng = np.random.default_rng(0)
    feeds = {
        "hidden": rng.standard_normal((1, 5, decoder.dim)).astype(np.float16),
        "position_ids": np.arange(5)[None],
        "write_index": np.zeros(1, np.int64),
        "logits_index": np.array([4]),
    }
    shape = (1, decoder.n_kv_heads, 16, decoder.head_dim)
    feeds |= {past.name: np.zeros(shape, np.float16) for past, _ in bundle.graph_spec("decoder").caches}
    (expected,), (seen,) = (session.run(["logits"], feeds) for session in (open_graph(path), ours))
    np.testing.assert_allclose(seen, expected, atol=1e-5)
    assert np.abs(expected).max() > 1


def test_a_device_has_both(bundle: Bundle, checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    plan = plan_export(opened, replace(SETTINGS[bundle.precision], max_context=64))
    footprint = plan_footprint(opened, plan)
    sizes = weight_bytes(bundle.graph_path("embed"))
    table = sizes[TABLE] + sizes.get(f"{TABLE}_scale", 0)
    assert abs(footprint.loaded_bytes() - plan.weight_bytes - table) <= 4096
