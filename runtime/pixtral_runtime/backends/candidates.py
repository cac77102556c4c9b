"""The best logits of each row, picked in the graph: a few hundred bytes travel instead of half a megabyte a row.

`pixtral_runtime.generation.logits` reads what is picked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pixtral_runtime.backends.onnx_nodes import add_constants
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.spec import GraphSpec, TensorSpec

if TYPE_CHECKING:
    import onnx

CANDIDATES = 64  # of a row of logits
PICKED = "picked"


def with_candidates(bundle: Bundle, graph: str) -> GraphSpec:
    """The decoder's tensors with those of `pick_candidates`; other graphs as they are."""
    spec = bundle.graph_spec(graph)
    if not spec.caches:
        return spec
    width = 2 * min(CANDIDATES, bundle.model.decoder.vocab_size) + 1
    inputs = (*spec.inputs, TensorSpec("inverse_temperature", ("R",), "float32"))
    return replace(spec, inputs=inputs, outputs=(*spec.outputs, TensorSpec(PICKED, ("R", width), "float32")))


def pick_candidates(model: onnx.ModelProto) -> None:
    """The K best logits of each row, their token ids, and what the row weighs, as one output; K is CANDIDATES or all.

    Adds the input `inverse_temperature` (R,) and the output `picked` (R, 2K + 1), float32: logits, ids (exact: a
    vocabulary has less than 2^24) and the sum of exp((logit - best) · inverse_temperature) over the row.
    """
    from onnx import TensorProto, helper

    logits = next((value for value in model.graph.output if value.name == "logits"), None)
    if logits is None:
        return
    count = min(CANDIDATES, logits.type.tensor_type.shape.dim[1].dim_value)
    add_constants(model, picked_count=[count], picked_first=[0], picked_end=[1], picked_axis=[1])
    model.graph.node.extend(
        [
            helper.make_node(
                "TopK", ["logits", "picked_count"], ["picked_logits", "picked_ids"], "picked_logits", axis=1
            ),
            helper.make_node("Cast", ["picked_ids"], ["picked_numbers"], "picked_numbers", to=TensorProto.FLOAT),
            helper.make_node(
                "Slice", ["picked_logits", "picked_first", "picked_end", "picked_axis"], ["best_logit"], "best_logit"
            ),
            helper.make_node("Sub", ["logits", "best_logit"], ["below_best"], "below_best"),
            helper.make_node("Unsqueeze", ["inverse_temperature", "picked_axis"], ["inverses"], "inverses"),
            helper.make_node("Mul", ["below_best", "inverses"], ["tempered"], "tempered"),
            helper.make_node("Exp", ["tempered"], ["weights"], "weights"),
            helper.make_node("ReduceSum", ["weights", "picked_axis"], ["mass"], "mass", keepdims=1),
            helper.make_node("Concat", ["picked_logits", "picked_numbers", "mass"], [PICKED], PICKED, axis=1),
        ]
    )
    model.graph.input.append(helper.make_tensor_value_info("inverse_temperature", TensorProto.FLOAT, ["R"]))
    model.graph.output.append(helper.make_tensor_value_info(PICKED, TensorProto.FLOAT, ["R", 2 * count + 1]))
