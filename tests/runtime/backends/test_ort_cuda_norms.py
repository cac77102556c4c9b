"""A sum and its normalization as one node give what two nodes give, where they are what they seem."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from pixtral_runtime.backends.ort_cuda_lowering import add_and_normalize

HIDDEN = 96
ULPS = {"float16": 2**-10, "float32": 1e-6}  # of a normalized value: the CPU rounds its sum to float16 or does not


def graph(dtype: str, addend: str = "skip", axis: int = -1, op_type: str = "Add") -> onnx.ModelProto:
    """y = norm(x + addend) and z = 2 · (x + addend)."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    random = np.random.default_rng(3)
    stored = {"gamma": random.standard_normal(HIDDEN), "bias": random.standard_normal(HIDDEN)}
    nodes = [
        helper.make_node(op_type, ["x", addend], ["sum"]),
        helper.make_node("RMSNormalization", ["sum", "gamma"], ["y"], axis=axis, epsilon=1e-2),
        helper.make_node("Add", ["sum", "sum"], ["z"]),
    ]
    values = {
        name: helper.make_tensor_value_info(name, kind, ["B", "T", HIDDEN]) for name in ("x", "skip", "y", "z", "sum")
    }
    made = helper.make_graph(
        nodes,
        "sum and norm",
        [values["x"], values["skip"]],
        [values["y"], values["z"]],
        [numpy_helper.from_array(array.astype(dtype), name) for name, array in stored.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


def outputs(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(["y", "z"], feeds))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (3, 1), (2, 5)])
def test_one_node_gives_the_sum_and_its_norm(dtype: str, shape: tuple[int, int]) -> None:
    portable, ours = graph(dtype), graph(dtype)
    add_and_normalize(ours)
    assert [node.op_type for node in ours.graph.node] == ["SkipSimplifiedLayerNormalization", "Add"]
    random = np.random.default_rng(5)
    feeds = {name: random.standard_normal((*shape, HIDDEN)).astype(dtype) for name in ("x", "skip")}
    (y, z), (expected, twice) = outputs(ours, feeds), outputs(portable, feeds)
    np.testing.assert_array_equal(z, twice)
    assert (np.abs(y - expected.astype(np.float64)) <= 2 * ULPS[dtype] * np.abs(expected)).all()


@pytest.mark.parametrize(
    "other", [{"addend": "bias"}, {"axis": 1}, {"op_type": "Mul"}], ids=["stored bias", "other axis", "no sum"]
)
def test_other_norms_are_left(other: dict[str, object]) -> None:
    model = graph("float16", **other)  # type: ignore[arg-type]
    before = model.SerializeToString()
    add_and_normalize(model)
    assert model.SerializeToString() == before
