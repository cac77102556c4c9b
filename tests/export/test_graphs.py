"""The exported graphs as files: what they hold."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from helpers.bundles import export_tiny
from helpers.tiny import tiny_config, write_checkpoint
from pixtral_export.check import load_reference
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.graphs import assemble as graphs
from pixtral_export.model.ops import group_rows
from pixtral_export.model.parameters import parameters
from pixtral_export.weight_names import DECODER_ROPE, VISION_ROPE
from pixtral_runtime.bundle.manifest import Bundle, open_bundle
from pixtral_runtime.bundle.spec import GRAPHS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_config())


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def bundle(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(export_tiny(checkpoint, tmp_path_factory.mktemp("bundle") / "b", dtype=request.param))


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_pass_the_full_check_and_hold_standard_ops_only(bundle: Bundle, name: str) -> None:
    onnx.checker.check_model(bundle.graph_path(name), full_check=True)
    model = onnx.load(bundle.graph_path(name), load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    assert not model.functions


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_tensors_are_those_of_the_spec(bundle: Bundle, name: str) -> None:
    model, spec = onnx.load(bundle.graph_path(name), load_external_data=False), bundle.graph_spec(name)
    for values, tensors in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        seen = [
            (
                value.name,
                tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
                onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower().replace("float", "float32"),
            )
            for value in values
        ]
        expected = [(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors]
        assert [(n, s, d.replace("float3216", "float16")) for n, s, d in seen] == expected


def test_every_weight_lies_in_the_weight_file_at_a_page_boundary(bundle: Bundle) -> None:
    names, spans = set(), {}
    for graph in GRAPHS:
        model = onnx.load(bundle.graph_path(graph), load_external_data=False)
        for tensor in model.graph.initializer:
            if not tensor.external_data:
                assert len(tensor.raw_data) <= 64, f"{tensor.name} stands inside {graph}.onnx"
                continue
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == "weights.bin"
            assert int(entries["offset"]) % 4096 == 0
            names.add(tensor.name)
            spans[int(entries["offset"])] = int(entries["length"])
    assert {p.name for p in parameters(bundle.model)} | {*VISION_ROPE, *DECODER_ROPE} == names
    starts = sorted(spans)
    assert all(start + spans[start] <= after for start, after in pairwise(starts))
    assert starts[-1] + spans[starts[-1]] == bundle.files["weights.bin"].bytes


def test_no_path_of_this_machine_stands_in_a_graph(bundle: Bundle) -> None:
    here = str(Path(graphs.__file__).parents[1]).encode()
    assert not any(here in bundle.graph_path(name).read_bytes() for name in GRAPHS)


def test_a_stamped_decoder_equals_a_whole_trace(checkpoint: Path, tmp_path: Path) -> None:
    """Stamping one traced block per layer computes what torch computes for the whole tower, cache and all."""
    bundle = open_bundle(export_tiny(checkpoint, tmp_path / "b", dtype="float32"))
    reference = load_reference(open_checkpoint(checkpoint), 64)
    d = bundle.model.decoder
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, d.dim, generator=random)
    positions, index = torch.tensor([[0, 1, 2], [5, 6, 7]]), torch.tensor([0, 5])
    past = [torch.randn(2, d.n_kv_heads, 16, d.head_dim, generator=random) for _ in range(2 * d.n_layers)]
    mask = group_rows(torch.arange(16)[None, None, None] <= positions[:, None, :, None], d.n_heads // d.n_kv_heads)
    x, present = hidden, []
    with torch.inference_mode():
        for n, layer in enumerate(reference.layers):
            x, k, v = layer(x, reference.cos, reference.sin, positions, mask, past[2 * n], past[2 * n + 1], index)
            present += [k, v]
        logits = reference(x, torch.tensor([2, 3, 5]))
    feeds = {"hidden": hidden, "position_ids": positions, "write_index": index, "logits_index": torch.tensor([2, 3, 5])}
    session = ort.InferenceSession(bundle.graph_path("decoder"), providers=["CPUExecutionProvider"])
    caches = [tensor.name for tensor in bundle.graph_spec("decoder").inputs[4:]]
    seen = session.run(None, {k: v.numpy() for k, v in (feeds | dict(zip(caches, past, strict=True))).items()})
    for a, b in zip(seen, [logits, *present], strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=2e-5)  # seen 2e-6
